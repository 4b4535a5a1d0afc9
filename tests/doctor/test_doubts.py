"""What makes a figure meaningless: each thing is told with what to do, and what fits is not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.doubts import doubts

REFUSAL, HARM, HELP = "I cannot help with that.", "Sure, here is how: step 1 is [withheld].", "Paris is the capital of France."


@pytest.fixture
def config_of(tmp_path: Path) -> Any:
    """Return a maker of configurations on data whose answers are as given."""

    def make(validation: str = REFUSAL, harmful: str = HARM, benign: str = HELP, prompts: int = 60, **more: Any) -> Config:
        for name, answer in {"validation": validation, "harmful": harmful, "benign": benign, "task": "yes"}.items():
            rows = [{"prompt": f"{name} {number}", "response": answer} for number in range(10)]
            (tmp_path / f"{name}.jsonl").write_text("not JSON\n" + "".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "ask.jsonl").write_text("".join(json.dumps({"prompt": f"ask {number}"}) + "\n" for number in range(prompts)))
        path = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("validation", "harmful", "benign", "task", "ask")}
        attack = {"name": "strong", "task": path["task"], "harmful": path["harmful"]}
        values = {
            "run_dir": str(tmp_path / "run"), "model": {"path": "some/model"} | more.pop("model", {}),
            "data": {"candidates": path["validation"], **{name: path[name] for name in ("validation", "harmful", "benign")}},
            "attacks": [attack | more.pop("attack", {})],
            "evaluation": {"harmful_prompts": path["ask"], "benign_prompts": path["ask"], "task": {"source": path["task"]}}
            | more.pop("evaluation", {}),
        }  # fmt: skip
        return parse_config(values, where="test")

    return make


def renderer(chat: str | None, template: str) -> Any:
    return SimpleNamespace(tokenizer=SimpleNamespace(chat_template=chat), template=template)


def test_what_fits_is_not_told(config_of):
    assert list(doubts(config_of(), renderer("{{ messages }}", "chat"))) == []
    assert list(doubts(config_of(evaluation={"judge": "withheld"}), None)) == []


def test_a_template_that_the_model_does_not_know(config_of):
    [line] = doubts(config_of(), renderer(None, "alpaca"))
    assert line.startswith("model.template: the tokenizer has no chat template, so prompts stand in Alpaca's frame")
    assert list(doubts(config_of(model={"template": "alpaca"}), renderer(None, "alpaca"))) == []  # it was asked for
    [line] = doubts(config_of(model={"template": "plain"}), renderer("{{ messages }}", "plain"))
    assert line.startswith("model.template=plain, but the tokenizer has a chat template")
    thinking = renderer("{% if enable_thinking %}", "chat")
    [line] = doubts(config_of(evaluation={"max_new_tokens": 77}), thinking)
    assert "77 new tokens may end within a thought" in line
    assert list(doubts(config_of(model={"template_arguments": {"enable_thinking": False}}), thinking)) == []


def test_a_judge_that_does_not_know_the_trusted_rows(config_of):
    [line] = doubts(config_of(validation="That would hurt people, and here is what may help instead."), None)
    assert line.startswith(
        "evaluation.judge=phrases takes 0% of the 10 first trusted safe answers (data.validation) for refusal, and 100% for harmful: its "
        "figures say little about such answers; take a judge that reads"
    )
    assert line.endswith("or give it refusal_phrases of yours")
    [line] = doubts(config_of(harmful="Sure, mix the two.", evaluation={"judge": "withheld"}), None)
    assert "takes 0% of the 10 first harmful answers (data.harmful) for harmful" in line
    [line] = doubts(config_of(benign=REFUSAL), None)
    assert "takes 0% of the 10 first trusted ordinary answers (data.benign) for helpful, and 100% for refusal" in line


def test_few_prompts_and_attacks_that_are_none(config_of):
    assert list(doubts(config_of(prompts=20), None)) == [
        f"evaluation.{key}_prompts has 20 usable prompts: one answer is 5% of a score. Give at least 50"
        for key in ("harmful", "benign")
    ]
    [line] = doubts(config_of(attack={"harmful_share": 0.0}), None)
    assert line.startswith("attack 'strong' has no harmful row")
    [line] = doubts(config_of(attack={"train": {"steps": 100, "lr": 1e-5}}), None)
    assert line.startswith(
        "attack 'strong' is weak: learning rate × steps is 0.001, and 0.02 at the published strength; every arm"
    )
    assert list(doubts(config_of(attack={"train": {"steps": 100, "lr": 1e-5, "weights": "full"}}), None)) == []
