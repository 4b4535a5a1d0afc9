"""Models beside the one that is worked on: what doctor says they hold, against the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.guests import QUESTION, guest_memory, guests_of
from pharmacist_ray.doctor.passes import answer_memory, score_memory
from pharmacist_ray.doctor.shape import shape_of

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 500,
}  # fmt: skip


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    LlamaConfig(**SMALL, num_labels=3, dtype="bfloat16").save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def asked(config: Config, judges: list[dict[str, Any]], **more: Any) -> Config:
    source = {"path": "/nowhere.jsonl"}
    evaluation = {"harmful_prompts": source, "benign_prompts": source, "task": {"source": source}, "judge": judges, **more}
    return Config.model_validate(config.model_dump() | {"evaluation": evaluation})


def amounts(items: list[Any]) -> dict[str, float]:
    return {item.what: item.amount for item in items}


def test_judges_are_held_beside_the_model_that_answers(llama: Callable[..., Config], judge: Path) -> None:
    config = asked(
        llama("8b"),
        [
            {"kind": "classifier", "path": str(judge), "batch_size": 4, "max_length": 100},
            {"kind": "generative", "path": str(judge), "template": "harmbench", "batch_size": 2, "dtype": "float32"},
            {"kind": "phrases"},
        ],
    )
    classifier = sum(one.numel() for one in LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)).parameters())
    chat = sum(one.numel() for one in LlamaForCausalLM(LlamaConfig(**SMALL)).parameters())
    held, working, unknown = guest_memory(guests_of(config, "evaluate"))
    assert amounts(held) == {"judge classifier's weights": 2 * classifier, "judge generative's weights": 4 * chat}
    assert unknown == []
    tokens = 512 + 128 + QUESTION
    assert amounts(working) == {  # the larger of both: they take turns
        "judge generative at work": 2 * tokens * 4 * (3 * 176 + 2 * 64),
        "judge generative: keys and values": 3 * 2 * tokens * 2 * 32 * 4,
    }
    shape = shape_of(config.model)
    without = answer_memory(shape, asked(llama("8b"), [{"kind": "phrases"}]))
    found = amounts(answer_memory(shape, config))
    assert {name: found[name] for name in amounts(held)} == amounts(held)
    assert sum(found.values()) == sum(amounts(without).values()) + sum(
        amounts(held).values()
    )  # answering holds more than judging


def test_a_guard_and_a_teacher_are_held_while_it_scores(llama: Callable[..., Config], judge: Path, tmp_path: Path) -> None:
    config = llama(
        "8b",
        "scoring.scorers=[guard,refusal_feature,low_loss]",
        f"scoring.guard={{path: {judge}, unsafe: [LABEL_0]}}",
        f"scoring.refusal_teacher={tmp_path / 'teacher'}",
        "selection.scorer=guard",
        "comparison.selections=[guard]",
    )
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "adapter_config.json").write_text("{}")  # an adapter, which takes a base of its own
    shape = shape_of(config.model)
    found = amounts(score_memory(shape, config))
    assert found["Refusal-Teacher's weights"] == found["base weights"] == 2 * shape.parameters
    assert found["guard's weights"] > 0
    assert "guard's weights" not in amounts(score_memory(shape, llama("8b")))


def test_what_cannot_be_read_is_said_and_not_counted(llama: Callable[..., Config]) -> None:
    config = asked(llama("8b"), [{"kind": "classifier", "path": "/nowhere/judge"}])
    held, working, unknown = guest_memory(guests_of(config, "evaluate"))
    assert (held, working) == ([], [])
    assert unknown == ["judge classifier is not counted: '/nowhere/judge' cannot be read here"]


def test_an_endpoint_that_answers_leaves_the_gpu_to_the_judges(llama: Callable[..., Config], judge: Path) -> None:
    engine = {"url": "http://localhost:8000/v1", "model": "base"}
    shape = shape_of(llama("8b").model)
    assert answer_memory(shape, asked(llama("8b"), [{"kind": "phrases"}], engine=engine)) == []
    config = asked(llama("8b"), [{"kind": "classifier", "path": str(judge)}], engine=engine)
    assert list(amounts(answer_memory(shape, config))) == [
        "judge classifier's weights",
        "judge classifier at work",
        "CUDA, NCCL, fragmentation",
    ]
