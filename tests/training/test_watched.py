"""The loss of an attack's own harmful rows, before it and after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import pharmacist_ray.training.loop as loop
from pharmacist_ray.config.schema import LoraConfig, TrainConfig
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.training.loop import run_task
from pharmacist_ray.training.task import TrainTask


@pytest.fixture
def rows(rows_of: Callable[..., list[Row]]) -> list[Row]:
    return rows_of(9, seed=1)


@pytest.fixture
def task(model_folder: Path, rows_of: Callable[..., list[Row]], rows: list[Row], tmp_path: Path) -> TrainTask:
    write_rows(rows_of(20), tmp_path / "rows.parquet")
    write_rows(rows, tmp_path / "watched.parquet")
    return TrainTask(
        name="a task",
        out=str(tmp_path / "out"),
        model=ModelRef(str(model_folder), template="plain", max_length=32),
        rows=(str(tmp_path / "rows.parquet"),),
        watched=(str(tmp_path / "watched.parquet"),),
        train=TrainConfig(steps=5, batch_size=4, lr=1e-2, save_every=2),
        seed=5,
        lora=LoraConfig(r=4, dropout=0.5),
    )


def one_by_one(model: Any, task: TrainTask, rows: list[Row]) -> float:
    """Return the mean loss of rows as transformers computes it, a row at a time."""
    renderer, losses = task.model.renderer(), []
    for row in rows:
        batch = renderer.collate([renderer.render(row)])
        with torch.no_grad():
            losses.append(float(model(input_ids=batch.input_ids, labels=batch.labels).loss))
    return sum(losses) / len(losses)


def test_losses_are_those_of_the_model_before_and_of_the_one_that_is_published(task: TrainTask, rows: list[Row]) -> None:
    before, after = run_task(task)["watched_loss"]
    base = task.model.load()
    assert before == pytest.approx(one_by_one(base, task, rows), rel=1e-5)
    published = PeftModel.from_pretrained(base, Path(task.out) / "adapter").eval()
    assert after == pytest.approx(one_by_one(published, task, rows), rel=1e-5)
    assert after != before


def test_watching_changes_nothing_of_what_is_trained(task: TrainTask, tmp_path: Path) -> None:
    blind = replace(task, watched=(), out=str(tmp_path / "blind"))
    run_task(task)
    assert "watched_loss" not in run_task(blind)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "blind" / name).read_bytes()


def test_a_resumed_training_remembers_the_loss_that_it_began_with(
    task: TrainTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_task(replace(task, out=str(tmp_path / "whole")))["watched_loss"]
    finite = loop._check_finite

    def die(one: Any, losses: Any, stream: Any, number: int, ranks: Any) -> None:
        if number == 3:
            raise KeyboardInterrupt
        finite(one, losses, stream, number, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_check_finite", die)
        with pytest.raises(KeyboardInterrupt):
            run_task(task)
    assert run_task(task)["watched_loss"] == pytest.approx(whole, rel=1e-5)
