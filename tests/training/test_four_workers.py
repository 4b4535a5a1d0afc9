"""Alignment, an attack on what it made, and answers by four workers who never hold the model: what one does who holds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config.schema import EvaluationConfig, LoraConfig, ResourcesConfig, TrainConfig
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.evaluation.answers import Answerer, AnswerSpec, GenerationUnit
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import Ranks, current_ranks
from pharmacist_ray.runtime.workers import run_on_workers
from pharmacist_ray.storage import read_table
from pharmacist_ray.training.loop import run_task
from pharmacist_ray.training.task import TrainTask

SOURCE: Any = {"path": "x"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def defend_and_attack(payload: tuple[TrainTask, str, str, bool], ranks: Ranks) -> None:
    """Align, attack the result by a fresh adapter on it, and let what comes out answer."""
    align, harmful, prompts, spread = payload
    run_task(align, ranks)
    attacked = Path(align.out).with_name("attack")
    model = align.model.plus(f"{align.out}/adapter")
    run_task(replace(align, name="attack", out=str(attacked), model=model, rows=(harmful,), objective="sft"), ranks)
    settings = EvaluationConfig(harmful_prompts=SOURCE, benign_prompts=SOURCE, task={"source": SOURCE}, max_new_tokens=5)  # type: ignore[arg-type]
    file = str(Path(align.out).with_name("answers.parquet"))
    unit = GenerationUnit("attack", model.plus(f"{attacked}/adapter"), "harmful", prompts, 0, file)
    Answerer(AnswerSpec(settings, "cpu", 1), [[unit]], ranks if spread else None)({"group": 0})


@pytest.mark.usefixtures("ray_local")
def test_four_workers_align_attack_and_answer_as_one_does(model_folder: Path, rows_of: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("safe", "harmful", "prompts")):
        write_rows(rows_of(16 if name != "prompts" else 6, seed=seed), tmp_path / f"{name}.parquet")

    def payload(where: str, zero_stage: int) -> tuple[TrainTask, str, str, bool]:
        task = TrainTask(
            name="align",
            out=str(tmp_path / where / "align"),
            model=ModelRef(str(model_folder), template="plain", max_length=32),
            rows=(str(tmp_path / "safe.parquet"),),
            harmful=(str(tmp_path / "harmful.parquet"),),
            train=TrainConfig(steps=6, batch_size=8, lr=5e-3, save_every=0, zero_stage=zero_stage),  # type: ignore[arg-type]
            seed=5,
            objective="booster",
            lora=LoraConfig(r=2),
        )
        return task, str(tmp_path / "harmful.parquet"), str(tmp_path / "prompts.parquet"), zero_stage == 3

    defend_and_attack(payload("one", 0), current_ranks())
    resources = ResourcesConfig(workers=4, cpus_per_worker=0.25, max_failures=0)
    run_on_workers(defend_and_attack, payload("four", 3), name="four", storage=tmp_path / "ray", resources=resources)
    for stage in ("align", "attack"):
        one, four = (
            [json.loads(line)["loss"] for line in (tmp_path / where / stage / "history.jsonl").read_text().splitlines()]
            for where in ("one", "four")
        )
        assert len(one) == 6
        assert one[0] - one[-1] > 0.01
        assert four == pytest.approx(one, rel=1e-4)
    want, got = (read_table(tmp_path / where / "answers.parquet") for where in ("one", "four"))
    assert got.equals(want)
