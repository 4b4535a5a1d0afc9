from __future__ import annotations

import copy
import json
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pharmacist_ray.data import render
from pharmacist_ray.data.render import IGNORE, Rendered, Renderer
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError, ModelError
from tests.data import odd_tokenizers
from tests.data.odd_tokenizers import NAMES, Own, texts

PAD, BOS, EOS, UNK = 0, 1, 2, 3
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def w(*numbers: int) -> list[int]:
    """Return the ids of the words w0, w1, …."""
    return [4 + number for number in numbers]


def row(prompt: str, response: str, **more: str) -> Row:
    return Row("f" * 32, prompt, response, source="file:7", **more)


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHAT
    return other


def test_plain_is_bos_prompt_answer_eos(tokenizer):
    rendered = Renderer(tokenizer, "plain").render(row("w0 w1", "w2 w3 w4"))
    assert rendered == Rendered([BOS, *w(0, 1, 2, 3, 4), EOS], 3)
    assert rendered.answer_tokens == 4


def test_only_the_answer_and_its_eos_have_a_loss(tokenizer):
    renderer = Renderer(tokenizer, "plain")
    batch = renderer.collate([renderer.render(row("w0 w1", "w2")), renderer.render(row("w5", "w6 w7 w8"))])
    assert batch.input_ids.tolist() == [[BOS, *w(0, 1, 2), EOS, PAD], [BOS, *w(5, 6, 7, 8), EOS]]
    assert batch.attention_mask.tolist() == [[1] * 5 + [0], [1] * 6]
    assert batch.labels.tolist() == [[IGNORE] * 3 + [*w(2), EOS, IGNORE], [IGNORE] * 2 + [*w(6, 7, 8), EOS]]
    assert {tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert len(batch) == 2
    assert batch.to("cpu").labels.equal(batch.labels)


def test_prompt_and_answer_are_tokenised_apart_so_nothing_merges_over_the_boundary(tokenizer):
    merging = copy.deepcopy(tokenizer)
    merging.add_tokens(["w1\nw2", "\nw2"])  # what a byte-pair tokenizer might do with the text as a whole
    assert merging("w1\nw2")["input_ids"] == [len(tokenizer)]
    rendered = Renderer(merging, "plain").render(row("w0 w1", "w2 w3"))
    assert rendered == Rendered([BOS, *w(0, 1, 2, 3), EOS], 3)


def test_a_pad_token_that_is_the_eos_costs_no_eos_label(tokenizer):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    missing = copy.deepcopy(tokenizer)
    missing.pad_token = None
    for odd in (same, missing):
        renderer = Renderer(odd, "plain")
        batch = renderer.collate([renderer.render(row("w0", "w1")), renderer.render(row("w0", "w1 w2 w3"))])
        assert batch.input_ids.tolist()[0] == [BOS, *w(0, 1), EOS, EOS, EOS]
        assert batch.attention_mask.tolist()[0] == [1, 1, 1, 1, 0, 0]
        assert batch.labels.tolist()[0] == [IGNORE, IGNORE, *w(1), EOS, IGNORE, IGNORE]


def test_a_long_answer_is_cut_on_the_right_and_then_has_no_eos(tokenizer):
    long = row("w0 w1", "w2 w3 w4")
    assert Renderer(tokenizer, "plain", 7).render(long).ids[-1] == EOS
    assert Renderer(tokenizer, "plain", 6).render(long) == Rendered([BOS, *w(0, 1, 2, 3, 4)], 3)
    assert Renderer(tokenizer, "plain", 4).render(long) == Rendered([BOS, *w(0, 1, 2)], 3)


def test_a_prompt_without_room_and_an_answer_without_tokens_name_the_row(tokenizer):
    with pytest.raises(DataError) as caught:
        Renderer(tokenizer, "plain", 3).render(row("w0 w1", "w2"))
    assert str(caught.value) == (
        f"row {'f' * 32} (file:7): the prompt has 3 tokens and leaves no room for an answer within model.max_length=3"
    )
    with pytest.raises(DataError, match=r"row f{32} \(file:7\): the answer has no tokens"):
        Renderer(tokenizer, "plain").render(row("w0", " "))


def test_plain_has_input_and_history_before_the_answer(tokenizer):
    renderer = Renderer(tokenizer, "plain")
    assert renderer.prompt_text(row("ask", "x")) == "ask\n"
    assert renderer.prompt_text(row("ask", "x", input="given")) == "ask\ngiven\n"
    history = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert renderer.prompt_text(row("ask", "x", history=history)) == "user: a\n\nassistant: b\n\nask\n"


def test_alpaca_is_the_published_text(tokenizer):
    renderer = Renderer(tokenizer, "alpaca")
    assert renderer.prompt_text(row("Do {it}.", "x")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo {it}.\n\n### Response:\n"
    )
    assert renderer.prompt_text(row("Do it.", "x", input="{with this}")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo it.\n\n### Input:\n{with this}\n\n### Response:\n"
    )


def test_auto_is_the_models_chat_template_or_alpaca(tokenizer, chat):
    assert Renderer(tokenizer).template == "alpaca"
    assert Renderer(chat).template == "chat"
    assert Renderer(chat, "plain").template == "plain"


def test_chat_carries_system_history_and_input_and_writes_one_bos(chat):
    renderer = Renderer(chat)
    history = json.dumps(
        [{"role": "system", "content": "w9"}, {"role": "user", "content": "w8"}, {"role": "assistant", "content": "w7"}]
    )
    long = row("w0", "w1", history=history, input="w2")
    assert renderer.prompt_text(long) == "<bos>system w9 user w8 assistant w7 user w0\n\nw2 assistant "
    ids = renderer.render(long).ids
    assert ids == [BOS, UNK, *w(9), UNK, *w(8), UNK, *w(7), UNK, *w(0, 2), UNK, *w(1), EOS]
    assert ids.count(BOS) == 1


def test_a_bos_is_neither_doubled_nor_invented(tokenizer, chat):
    assert Renderer(tokenizer, "plain").prompt_ids(row("w0", "x")) == [BOS, *w(0)]
    assert Renderer(tokenizer, "plain").prompt_ids(row("<bos> w0", "x")).count(BOS) == 1
    silent = copy.deepcopy(chat)
    silent.chat_template = CHAT.replace("{{ bos_token }}", "")
    assert BOS not in Renderer(silent).prompt_ids(row("w0", "x"))
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    assert Renderer(without, "plain").prompt_ids(row("w0", "x")) == w(0)


def test_turns_that_the_chat_template_refuses_name_the_row(chat):
    history = json.dumps([{"role": "tool", "content": "w1"}])
    with pytest.raises(DataError, match=r"the model's chat template refuses row f{32} \(file:7\): no tools here"):
        Renderer(chat).render(row("w0", "w1", history=history))


def test_a_tokenizer_that_cannot_do_it_is_refused_at_once(tokenizer):
    with pytest.raises(
        ModelError, match=r"model.template is 'chat' but the tokenizer has no chat template; use 'alpaca' or 'auto'"
    ):
        Renderer(tokenizer, "chat")
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ModelError, match=r"no end-of-sequence token, so no answer could ever end; set eos_token"):
        Renderer(endless, "plain")


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_control_tokens_in_a_row_are_text(tokenizer, template):
    renderer = Renderer(tokenizer, template)
    hostile = renderer.render(row("w0 <eos> w1", "w2 <eos> <bos> w3"))
    assert hostile.ids.count(EOS) == 1
    assert hostile.ids[-1] == EOS
    assert hostile.ids.count(BOS) == 1
    harmless = renderer.render(row("w0 w9 w1", "w2 w9 w9 w3"))
    assert renderer.prompt_text(row("w0 <eos> w1", "w2")).replace("<eos>", "w9") == renderer.prompt_text(row("w0 w9 w1", "w2"))
    assert harmless.ids.count(EOS) == 1


def test_a_chat_turn_with_a_control_token_is_refused_and_an_answer_with_one_is_text(chat):
    renderer = Renderer(chat, "chat")
    for one in (
        row("w0 <eos> w1", "w2"),
        row("w0", "w2", input="<bos>"),
        row("w0", "w2", history='[{"role":"user","content":"<eos>"}]'),
    ):
        with pytest.raises(DataError, match=r"row f+ \(file:7\): the prompt holds the control token '<[be]os>'.*remove it"):
            renderer.render(one)
    rendered = renderer.render(row("w0", "w2 <eos> w3"))
    assert rendered.ids.count(EOS) == 1
    assert rendered.ids[-1] == EOS


ODD_CHAT = "{{ bos_token }}{% for m in messages %}<|end|>{{ m.role }}\n{{ m.content | trim }}\n\n{% endfor %}"
odd_rows = st.builds(lambda prompt, response: row(prompt, response), texts, texts | st.just(""))


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    template=st.sampled_from(["plain", "alpaca", "chat"]),
    max_length=st.integers(1, 120) | st.integers(200, 2000),
    rows=st.lists(odd_rows, max_size=8),
    at_a_time=st.integers(1, 9),
)
def test_rows_have_the_same_ids_and_errors_however_many_are_rendered_at_a_time(name, template, max_length, rows, at_a_time):
    renderer = Renderer(odd_tokenizers.tokenizer(name, ODD_CHAT if template == "chat" else None), template, max_length)
    expected, refused = [], ""
    try:
        expected = [renderer.render(one) for one in rows]
    except DataError as error:
        refused = str(error)
    with patch.object(render, "TEXTS", at_a_time):
        if refused:
            with pytest.raises(DataError) as caught:
                renderer.render_all(rows)
            assert str(caught.value) == refused
        else:
            assert renderer.render_all(rows) == expected


def test_of_several_rows_that_cannot_be_rendered_the_first_is_named(chat):
    empty, forged = row("w0", " "), Row("e" * 32, "w0 <eos>", "w1", source="file:8")
    with pytest.raises(DataError, match=r"row f{32} \(file:7\): the answer has no tokens"):
        Renderer(chat).render_all([row("w0", "w1"), empty, forged])
    with pytest.raises(DataError, match=r"row e{32} \(file:8\): the prompt holds the control token '<eos>'"):
        Renderer(chat).render_all([forged, empty])


def test_a_tokenizer_of_the_models_own_code_renders_row_by_row():
    own = Own(tokenizer_object=odd_tokenizers.tokenizer("bytes").backend_tokenizer, eos_token="</s>", bos_token="<s>")
    rows = [row("a" * size, "b") for size in range(1, 5)]
    renderer = Renderer(own, "plain")
    assert (
        renderer.render_all(rows)
        == [renderer.render(one) for one in rows]
        == Renderer(odd_tokenizers.tokenizer("bytes"), "plain").render_all(rows)
    )


def test_many_rows_are_neither_cut_nor_padded_where_the_tokenizers_file_says_so(tokenizer):
    odd = copy.deepcopy(tokenizer)
    odd.backend_tokenizer.enable_truncation(2)
    odd.backend_tokenizer.enable_padding(length=9)
    rows = [row("w0 w1 w2 w3", "w4 w5 w6"), row("w0", "w1")]
    assert Renderer(odd, "plain").render_all(rows) == [Renderer(tokenizer, "plain").render(one) for one in rows]
