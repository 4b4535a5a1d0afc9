"""Chat templates that behave as those of the families do: how a turn ends, who may speak, what else they ask for."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ModelError

ROW = Row("f" * 32, "w0 w1", "w2 w3", source="file:7")

LLAMA_3 = (
    "{{ bos_token }}{% set day = strftime_now('%d %b %Y') %}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ day }}\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GPT_OSS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}<|start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

FAMILIES: dict[str, tuple[str, list[str], str, str]] = {
    "Llama 3": (
        LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>",
        "<bos><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "w0 w1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Qwen2.5, SmolLM2": (
        CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|im_start|>user\nw0 w1<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Qwen3": (
        THINKING, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|im_start|>user\nw0 w1<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Gemma 2, 3": (
        GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>",
        "<bos><start_of_turn>user\nw0 w1<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Phi-3": (PHI_3, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>", "<|user|>\nw0 w1<|end|>\n<|assistant|>\n"),
    "Llama 2, Mistral": (MISTRAL, [], "<eos>", "<bos>[INST] w0 w1 [/INST]"),
    "gpt-oss": (
        GPT_OSS, ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"], "<|return|>",
        "<|start|>system<|message|>Current date: 2024-07-26<|end|><|start|>user<|message|>w0 w1<|end|><|start|>assistant"
        "<|channel|>final<|message|>",
    ),
}  # fmt: skip
"""Family → template, its control tokens, which of them ends a turn, and what stands before the answer to `ROW`."""


def like(tokenizer: PreTrainedTokenizerFast, family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a family's template and control tokens; its EOS stays what it was, as Gemma's and Phi's do."""
    template, control, _, _ = FAMILIES[family]
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": [AddedToken(token, special=True) for token in control]})
    other.chat_template = template
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_begins_and_ends_where_the_familys_template_has_it(tokenizer, family):
    _, _, end, prompt = FAMILIES[family]
    own = like(tokenizer, family)
    renderer = Renderer(own)
    rendered = renderer.render(ROW)
    assert renderer.prompt_text(ROW) == prompt
    assert rendered.ids[: rendered.answer_start] == renderer.prompt_ids(ROW)  # what evaluation asks with, to the byte
    assert rendered.ids[rendered.answer_start :] == [*own("w2 w3")["input_ids"], own.convert_tokens_to_ids(end)]
    assert renderer.end_id == rendered.ids[-1]
    assert rendered.ids.count(own.bos_token_id) == prompt.count("<bos>")


def test_the_last_answer_is_the_one_to_learn_and_those_before_end_as_it_does(tokenizer):
    own = like(tokenizer, "Gemma 2, 3")
    history = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    rendered = Renderer(own).render(Row("f" * 32, "w0", "w2", source="file:7", history=json.dumps(history)))
    end = own.convert_tokens_to_ids("<end_of_turn>")
    assert rendered.ids.count(end) == 4  # three turns of the prompt, and the answer
    assert rendered.ids[rendered.answer_start :] == [*own("w2")["input_ids"], end]


def test_a_template_gets_its_arguments(tokenizer):
    own = like(tokenizer, "Qwen3")
    silent = Renderer(own, arguments={"enable_thinking": False})
    assert silent.prompt_text(ROW) == Renderer(own).prompt_text(ROW) + "<think>\n\n</think>\n\n"


def test_a_system_prompt_stands_before_rows_that_bring_none(tokenizer):
    own = like(tokenizer, "Qwen2.5, SmolLM2")
    renderer = Renderer(own, system="w7 w8")
    assert renderer.prompt_text(ROW).startswith("<|im_start|>system\nw7 w8<|im_end|>\n<|im_start|>user\nw0 w1")
    theirs = Row("f" * 32, "w0", "w2", source="file:7", history=json.dumps([{"role": "system", "content": "w9"}]))
    assert renderer.prompt_text(theirs).startswith("<|im_start|>system\nw9<|im_end|>\n<|im_start|>user\nw0")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "Gemma 2, 3", {"system": "w7"},
            "the model's chat template refuses a question with its answer: System role not supported; it may take no system prompt: "
            "leave model.system out",
        ),
        (
            "Gemma 2, 3", {"system": "w7", "template": "plain"},
            "model.system needs a chat template, and model.template is 'plain'; leave model.system out",
        ),
    ],
)  # fmt: skip
def test_what_a_template_cannot_do_is_said_before_any_row(
    tokenizer: Any, family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        Renderer(like(tokenizer, family), **settings)
    assert str(caught.value) == message


def test_a_template_that_leaves_answers_out_is_refused(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ModelError, match=r"chat template leaves answers out; set model\.template to alpaca or plain"):
        Renderer(own)


def test_the_day_on_which_a_run_goes_on_changes_nothing(tokenizer):
    """The template of transformers would read the clock; that of a renderer does not."""
    own = like(tokenizer, "Llama 3")
    assert "26 Jul 2024" not in own.apply_chat_template([{"role": "user", "content": "w0"}], tokenize=False)
    assert Renderer(own).prompt_text(ROW).count("Today: 26 Jul 2024\n") == 1
