from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pharmacist_ray.data.render import TEXTS, Renderer
from pharmacist_ray.data.room import Room
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError
from tests.data.odd_tokenizers import NAMES, Own, texts, tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'x' %}{{ raise_exception('no x here') }}{% endif %}"
    "<|end|>{{ m.role }}\n{{ m.content | trim }}\n\n{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": texts}), max_size=2)
rows = st.builds(
    lambda prompt, response, input, history: Row(
        "f" * 32, prompt, response, input=input, history=json.dumps(history) if history else "", source="a.jsonl:1"
    ),
    texts, texts | st.just(""), st.just("") | texts, turns,
)  # fmt: skip


def one_at_a_time(row: Row, renderer: Renderer) -> tuple[str, str] | None:
    """Return reason and detail of a row that does not fit, the way that every row is rendered for it."""
    if renderer.template == "chat" and any(
        t in row.prompt + row.input + row.history for t in ("<s>", "</s>", "<unk>", "<|end|>")
    ):
        reason = "control_token"
    else:
        try:
            prompt = renderer.prompt_ids(row)
        except DataError as error:
            return "unrenderable", str(error)
        if (
            row.response
            and not renderer.tokenizer(row.response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ):
            reason = "unrenderable"
        elif len(prompt) >= renderer.max_length:
            reason = "no_room"
        else:
            return None
    try:
        renderer.render(row)
    except DataError as error:
        detail = str(error)
    if not row.response and reason == "no_room":
        detail = f"the prompt leaves no room for an answer within model.max_length={renderer.max_length}"
    return reason, detail


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    template=st.sampled_from(["plain", "alpaca", "chat"]),
    max_length=st.integers(1, 120) | st.integers(200, 2000),
    rows=st.lists(rows, max_size=8),
)
def test_in_a_batch_each_row_fits_or_not_as_it_would_alone(name, template, max_length, rows):
    renderer = Renderer(tokenizer(name, CHAT if template == "chat" else None), template, max_length)
    expected = {place: found for place, row in enumerate(rows) if (found := one_at_a_time(row, renderer))}
    found = Room(renderer).misfits(rows)
    assert {place: (bad.reason, bad.detail) for place, bad in found.items()} == expected
    assert list(found) == sorted(expected)


def test_a_tokenizer_of_the_models_own_code_is_asked_row_by_row():
    own = Own(tokenizer_object=tokenizer("bytes").backend_tokenizer, eos_token="</s>", bos_token="<s>")
    rows = [Row("f" * 32, "a" * size, "b", source="a.jsonl:1") for size in range(1, 20)]
    short = Renderer(own, "plain", 10)
    expected = [place for place, row in enumerate(rows) if len(short.prompt_ids(row)) >= 10]
    assert list(Room(short).misfits(rows)) == expected
    assert expected


def test_only_what_may_not_fit_is_tokenised_and_in_batches(monkeypatch):
    asked: list[list[str]] = []
    lengths = Room._lengths

    def seen(self: Room, texts: list[str], *, all_text: bool) -> list[int]:
        asked.append(list(texts))
        return lengths(self, texts, all_text=all_text)

    monkeypatch.setattr(Room, "_lengths", seen)
    room = Room(Renderer(tokenizer("bytes"), "plain", 50))
    rows = [Row("f" * 32, "c" * size, "..." if size == 7 else "yes", source="a.jsonl:1") for size in range(1, 400)]
    assert list(room.misfits(rows)) == list(range(48 - 1, 399))  # a line break and <s> beside the c's
    assert asked == [[f"{row.prompt}\n" for row in rows[48 - 1 :]], ["..."]]
    assert len(asked[0]) > TEXTS


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_no_rows_are_no_misfits(template):
    assert Room(Renderer(tokenizer("bytes", CHAT if template == "chat" else None), template, 50)).misfits([]) == {}
