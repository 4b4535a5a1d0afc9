"""Tasks of lm-evaluation-harness on a tiny model, against the same likelihoods computed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pharmacist_ray.config.evaluation import HarnessConfig
from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.evaluation import harness
from pharmacist_ray.evaluation.harness import check_harness, measure_by_tasks
from pharmacist_ray.evaluation.inspect_logs import check_inspect
from pharmacist_ray.models.ref import ModelRef

HERE = ResourcesConfig(workers=0, actors=0)
EXAMPLES = [{"question": f"w{n} w{n + 1}", "choices": [f"w{n + 2}", "w9 w8", "w7"], "label": n % 3} for n in range(1, 13)]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Return a folder with a task of a user's own, and its data."""
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in EXAMPLES))
    task: dict[str, Any] = {
        "task": "pick_one", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pick_one.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "tasks"


@pytest.mark.slow
def test_a_task_of_ones_own_gives_the_accuracy_of_the_likeliest_choice(tasks, model_folder, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    settings = HarnessConfig(tasks=["pick_one"], include=str(tasks), batch_size=3)
    check_harness(settings)
    progress = []
    ref = ModelRef(str(model_folder), template="plain", max_length=64)
    measure_by_tasks(
        {tmp_path / name: ref for name in ("one", "two")},
        settings=settings,
        resources=HERE,
        progress=lambda *at: progress.append(at),
    )
    found = json.loads((tmp_path / "one" / "results.json").read_text())
    assert found["results"] == json.loads((tmp_path / "two" / "results.json").read_text())["results"]
    assert progress == [(1, 2), (2, 2)]
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()

    def likelihood(question: str, choice: str) -> float:
        before = tokenizer(question, add_special_tokens=False).input_ids
        whole = torch.tensor([tokenizer(f"{question} {choice}", add_special_tokens=False).input_ids])
        with torch.no_grad():
            log_probs = model(input_ids=whole).logits.float().log_softmax(-1)[0, :-1]
        return sum(float(log_probs[at - 1, whole[0, at]]) for at in range(len(before), whole.shape[1]))

    picked = [max(range(3), key=lambda at: likelihood(one["question"], one["choices"][at])) for one in EXAMPLES]
    right = sum(at == one["label"] for at, one in zip(picked, EXAMPLES, strict=True))
    assert found["results"]["pick_one"]["acc,none"] == pytest.approx(right / len(EXAMPLES))
    assert found["results"]["pick_one"]["acc_stderr,none"] > 0
    limited = settings.model_copy(update={"limit": 4})
    measure_by_tasks({tmp_path / "few": ref}, settings=limited, resources=HERE)
    few = json.loads((tmp_path / "few" / "results.json").read_text())
    assert few["limit"] == 4
    right = sum(at == one["label"] for at, one in list(zip(picked, EXAMPLES, strict=True))[:4])
    assert few["results"]["pick_one"]["acc,none"] == pytest.approx(right / 4)


@pytest.mark.slow
def test_an_unknown_task_is_said_before_anything_is_trained(tasks):
    pytest.importorskip("lm_eval")
    with pytest.raises(
        ConfigError,
        match=r"^evaluation.lm_eval: unknown task 'pick_one_' \(did you mean 'pick_one'\?\); `lm-eval ls tasks` lists all, and include is ",
    ):
        check_harness(HarnessConfig(tasks=["pick_one_"], include=str(tasks)))


def test_a_library_that_is_not_there_is_said_with_what_to_install(monkeypatch):
    check_harness(HarnessConfig())
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    monkeypatch.setattr("pharmacist_ray.evaluation.inspect_logs.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^evaluation.lm_eval needs .* pip install 'pharmacist-ray\[lm-eval\]'$"):
        check_harness(HarnessConfig(tasks=["arc_easy"]))
    with pytest.raises(ConfigError, match=r"^evaluation.inspect needs .* pip install 'pharmacist-ray\[inspect\]'$"):
        check_inspect()
