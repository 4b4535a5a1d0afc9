"""Chat templates that behave as those of the families do: how a turn ends, who may speak, what else they ask for."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ModelError
from tests.families import FAMILIES, TEMPLATES, like

ROW = Row("f" * 32, "w0 w1", "w2 w3", source="file:7")


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_begins_and_ends_where_the_familys_template_has_it(tokenizer, name):
    template, own = TEMPLATES[name], like(tokenizer, name)
    renderer = Renderer(own)
    rendered = renderer.render(ROW)
    assert renderer.prompt_text(ROW) == template.before
    assert rendered.ids[rendered.answer_start :] == [*own("w2 w3")["input_ids"], own.convert_tokens_to_ids(template.end)]
    assert renderer.end_id == rendered.ids[-1]
    assert rendered.ids.count(own.bos_token_id) == template.before.count("<bos>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_prompt_stands_where_the_familys_template_has_it_or_is_refused(tokenizer, name):
    template, own = TEMPLATES[name], like(tokenizer, name)
    if not template.system:
        with pytest.raises(ModelError, match=r"leave model\.system out"):
            Renderer(own, system="w7")
        return
    prompt = Renderer(own, system="w7").prompt_text(ROW)
    assert prompt.count(template.system) == 1
    assert prompt.replace(template.system, "") == template.before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learnt_and_what_is_asked_begin_with_the_same_tokens(tokenizer, family):
    """The prompt of a training row, of the same row without its answer, and of evaluation, to the token."""
    template = TEMPLATES.get(FAMILIES[family].template)
    history = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    rows = [ROW, replace(ROW, input="w4"), replace(ROW, history=json.dumps(history))]
    for system in ("", *(["w7"] if template and template.system else [])):
        renderer = Renderer(like(tokenizer, FAMILIES[family].template), max_length=64, system=system)
        for row in rows:
            rendered = renderer.render(row)
            assert rendered.ids[: rendered.answer_start] == renderer.prompt_ids(replace(row, response=""))
            assert rendered.ids[rendered.answer_start :] == [*renderer.tokenizer("w2 w3")["input_ids"], renderer.end_id]


def test_the_last_answer_is_the_one_to_learn_and_those_before_end_as_it_does(tokenizer):
    own = like(tokenizer, "Gemma 3")
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
            "Gemma 2", {"system": "w7"},
            "the model's chat template refuses a question with its answer: System role not supported; it may take no system prompt: "
            "leave model.system out",
        ),
        (
            "Gemma 2", {"system": "w7", "template": "plain"},
            "model.system needs a chat template, and model.template is 'plain'; leave model.system out",
        ),
        (
            "Mistral", {"system": "w7"},
            "the model's chat template drops a system prompt; leave model.system out, or write it into the prompts",
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
