from __future__ import annotations

import base64
import datetime
import pickle

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pharmacist_ray.data.layouts import REASONS, BadRow, check_columns, from_row, to_row
from pharmacist_ray.data.schema import row_id
from pharmacist_ray.errors import ConfigError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("name", "record", "input_text"),
    [
        ("prompt_response", {"prompt": "q", "response": "a"}, ""),
        ("instruction", {"instruction": "q", "input": "i", "output": "a"}, "i"),
        ("instruction", {"instruction": "q", "input": None, "output": "a"}, ""),
        ("instruction", {"instruction": "q", "output": "a"}, ""),
        ("messages", {"messages": [USER, ANSWER]}, ""),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, ""),
        ("prompt_completion", {"prompt": [USER], "completion": [ANSWER]}, ""),
        ("prompt_response", {"prompt": [USER], "response": "a"}, ""),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ""),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, ""),
        ("preference", {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, ""),
        ("preference", {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, ""),
        ("preference_messages", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, ""),
    ],
)
def test_each_layout_is_read_and_recognised(name, record, input_text):
    for layout in (name, "auto"):
        row = to_row(record, layout=layout, source="f:1")
        assert (row.prompt, row.response, row.input, row.history, row.source) == ("q", "a", input_text, "", "f:1")
        assert row.id == row_id("q", "a", input_text)
        assert from_row(row) == record


def test_earlier_turns_become_history_in_every_conversational_layout():
    system, first, reply = (
        {"role": "system", "content": ""},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
    )
    whole = to_row({"messages": [system, first, reply, USER, {**ANSWER, "name": "x"}]})
    split = to_row({"prompt": [system, first, reply, USER], "completion": [ANSWER]})
    assert orjson.loads(whole.history) == [system, first, reply]
    assert (whole.prompt, whole.response, whole.id) == ("q", "a", split.id)
    assert whole.id != row_id("q", "a")


def test_named_columns_replace_the_layouts_own():
    record = {"q": "q", "a": "a", "x": "i", "prompt": "other", "response": "other"}
    row = to_row(record, columns={"prompt": "q", "response": "a", "input": "x"})
    assert (row.prompt, row.response, row.input) == ("q", "a", "i")
    assert to_row({"prompt": "q", "a": "a"}, columns={"response": "a"}).response == "a"
    assert to_row({"instruction": "q", "a": "a", "input": "i"}, layout="instruction", columns={"response": "a"}).input == "i"
    assert to_row({"chat": [USER, ANSWER]}, columns={"messages": "chat"}).prompt == "q"


def test_a_pair_or_a_conversation_beside_an_answer_changes_nothing():
    beside = {"chosen": "b", "rejected": "c", "conversations": [{"from": "human", "value": "x"}]}
    assert to_row({"prompt": "q", "response": "a", **beside}).response == "a"
    assert to_row({"messages": [USER, ANSWER], **beside}).response == "a"
    assert (
        to_row({"turns": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, columns={"messages": "turns"}).prompt
        == "q"
    )


def test_a_named_input_column_has_to_be_there():
    with pytest.raises(BadRow, match="missing_field: 'typo' is missing"):
        to_row({"prompt": "q", "response": "a"}, columns={"prompt": "prompt", "response": "response", "input": "typo"})


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"prompt": "q"}, "missing_field", "'response' is missing"),
        ({"prompt": "q", "response": None}, "missing_field", "'response' is null"),
        ({"prompt": "", "response": "a"}, "empty_field", "prompt"),
        ({"prompt": "q", "response": " \n\t"}, "empty_field", "response"),
        ({"prompt": 3, "response": "a"}, "wrong_type", "'prompt' is int"),
        ({"prompt": "q", "response": {"text": "a"}}, "wrong_type", "'response' is dict"),
        ({"instruction": "q", "input": ["i"], "output": "a"}, "wrong_type", "'input' is list"),
        ({"messages": "q"}, "wrong_type", "not a list of messages"),
        ({"messages": ["q", "a"]}, "wrong_type", "not a list of messages"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "wrong_type", "'content' is list"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "missing_field", "'content' is null"),
        ({"messages": []}, "bad_turns", "last turn"),
        ({"messages": [USER]}, "bad_turns", "last turn"),
        ({"messages": [ANSWER]}, "bad_turns", "user's"),
        ({"messages": [USER, ANSWER, ANSWER]}, "bad_turns", "user's"),
        ({"messages": [{"role": "human", "content": "q"}, ANSWER]}, "bad_turns", "role 'human'"),
        ({"conversations": [{"from": "bot", "value": "q"}]}, "bad_turns", "role 'bot'; known: human, gpt"),
        ({"conversations": [{"from": "human", "text": "q"}]}, "missing_field", "'value' is missing"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "missing_field", "'chosen' is null"),
        ({"text": "q"}, "unknown_layout", "columns text fit no layout"),
        ({}, "unknown_layout", "(none)"),
        ({"prompt": "q", "response": "a", "completion": "b"}, "ambiguous_layout", "prompt_response and prompt_completion"),
        ({"prompt": "q", "response": "a", "messages": [USER, ANSWER]}, "ambiguous_layout", "prompt_response and messages"),
        ({"prompt": "q", "response": b"\xff"}, "invalid_utf8", "'response'"),
        ({"prompt": "q\ud800", "response": "a"}, "invalid_utf8", "'prompt'"),
        ({"prompt": "q", "response": "a", "extra": "\udfff"}, "invalid_utf8", "surrogates"),
    ],
)
def test_every_broken_record_has_its_reason(record, reason, detail):
    with pytest.raises(BadRow) as caught:
        to_row(record)
    assert caught.value.reason == reason
    assert reason in REASONS
    assert detail in caught.value.detail


def test_a_prompt_may_come_alone_where_no_answer_is_required():
    for record in ({"prompt": "q"}, {"prompt": "q", "response": None}, {"prompt": "q", "completion": ""}, {"prompt": [USER]}):
        row = to_row(record, require_response=False)
        assert (row.prompt, row.response, row.id) == ("q", "", row_id("q", ""))
    assert to_row({"instruction": "q", "input": "i"}, require_response=False).input == "i"
    assert to_row({"messages": [USER]}, require_response=False).prompt == "q"
    assert to_row({"prompt": "q", "response": "a"}, require_response=False).response == "a"
    assert to_row({"goal": "q"}, columns={"prompt": "goal"}, require_response=False).prompt == "q"
    with pytest.raises(BadRow, match="ambiguous_layout"):
        to_row({"prompt": "q", "instruction": "r"}, require_response=False)


def test_extra_columns_come_back_with_bytes_and_times_as_text():
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)
    record = {"prompt": "q", "response": "a", "blob": b"\x00\xff", "when": moment, "day": moment.date(), "n": [1, {"x": None}]}
    back = from_row(to_row(record))
    assert base64.b64decode(back["blob"]) == b"\x00\xff"
    assert (back["when"], back["day"], back["n"]) == ("2026-01-02T03:04:05", "2026-01-02", [1, {"x": None}])


def test_given_json_is_kept_to_the_letter():
    line = '{"prompt": "q", "response": "a", "n": 123456789012345678901234567890, "f": 1.10}'
    assert to_row(orjson.loads(line), raw=line).raw == line


@pytest.mark.parametrize(("value", "category"), [("x", "x"), (None, ""), (3, "3"), (True, "true"), (["a", 1], '["a",1]')])
def test_category_is_always_text(value, category):
    assert to_row({"prompt": "q", "response": "a", "kind": value}, category_column="kind").category == category
    assert to_row({"prompt": "q", "response": "a"}, category_column="kind").category == ""


def test_mistakes_in_the_configuration_are_no_rows_fault():
    with pytest.raises(ConfigError, match=r"unknown layout 'mesages'.*did you mean 'messages'"):
        check_columns("mesages", {})
    with pytest.raises(ConfigError, match="unknown name in columns 'answer'"):
        check_columns("auto", {"answer": "a"})
    with pytest.raises(ConfigError, match=r"columns.messages"):
        check_columns("messages", {"prompt": "p"})


def test_a_bad_row_survives_pickling():
    error = pickle.loads(pickle.dumps(BadRow("wrong_type", "detail", "text")))
    assert (error.reason, error.detail, error.text, str(error)) == ("wrong_type", "detail", "text", "wrong_type: detail")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_kept_untouched_or_refused_as_empty(prompt, response):
    record = {"prompt": prompt, "response": response}
    if not prompt.strip() or not response.strip():
        with pytest.raises(BadRow, match="empty_field"):
            to_row(record)
    else:
        row = to_row(record)
        assert (row.prompt, row.response) == (prompt, response)
        assert from_row(row) == record
