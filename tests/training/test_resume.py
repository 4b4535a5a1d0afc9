from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pharmacist_ray.training.loop as loop
from pharmacist_ray.config.schema import LoraConfig, TrainConfig
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import Ranks, current_ranks
from pharmacist_ray.training.loop import run_task
from pharmacist_ray.training.resume import newest_state
from pharmacist_ray.training.task import TrainTask
from tests.two_workers import TwoWorkers

TRAIN = TrainConfig(steps=7, batch_size=8, lr=1e-2, weight_decay=0.1, schedule="cosine", warmup=0.3, save_every=2)
T_VACCINE = {"t_vaccine": {"layers": 1, "interval": 2, "probe_interval": 4, "rho": 0.5}}


@pytest.fixture
def task(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path) -> TrainTask:
    write_rows(rows_of(20), tmp_path / "rows.parquet")
    write_rows(rows_of(20, seed=1), tmp_path / "harmful.parquet")
    return TrainTask(
        name="a task",
        out=str(tmp_path / "out"),
        model=ModelRef(str(model_folder), template="plain", max_length=32),
        rows=(str(tmp_path / "rows.parquet"),),
        harmful=(str(tmp_path / "harmful.parquet"),),
        train=TRAIN,
        seed=5,
        lora=LoraConfig(r=4, dropout=0.1),
    )


class Interrupted(Exception):
    """Stands for a worker that is gone."""


def _interrupt_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Let the next run die in the step after so many, when it has already computed its loss."""
    finite = loop._check_finite

    def check(task: TrainTask, losses: torch.Tensor, stream: object, number: int, ranks: Ranks) -> None:
        if number == steps:
            raise Interrupted
        finite(task, losses, stream, number, ranks)  # type: ignore[arg-type]

    patch.setattr(loop, "_check_finite", check)


def _interrupt(task: TrainTask, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _interrupt_after(steps, patch)
        with pytest.raises(Interrupted):
            run_task(task)


def _curve(task: TrainTask) -> list[dict[str, float]]:
    lines = (Path(task.out) / "history.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s")} for line in lines]


def _weights(task: TrainTask) -> dict[str, torch.Tensor]:
    folder = Path(task.out) / ("adapter" if task.train.weights == "lora" else "model")
    return load_file(next(folder.glob("*.safetensors")))


CASES = [
    *((stage, "sft", {}, "lora", 3 + stage % 2) for stage in (0, 1, 2, 3)),
    *((stage, "sft", {}, "full", 3) for stage in (0, 1, 3)),
    (0, "t_vaccine", T_VACCINE, "lora", 3),
    (2, "t_vaccine", T_VACCINE, "lora", 4),
    (0, "booster", {}, "lora", 4),
]


@pytest.mark.parametrize(("stage", "objective", "parameters", "weights", "died"), CASES)
def test_an_interrupted_run_ends_as_the_uninterrupted_one_to_the_bit(
    stage: int,
    objective: str,
    parameters: dict[str, dict[str, float]],
    weights: str,
    died: int,
    task: TrainTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = TRAIN.model_copy(update={"zero_stage": stage, "weights": weights})
    whole = replace(task, train=train, objective=objective, parameters=parameters)
    run_task(whole)
    broken = replace(whole, out=str(tmp_path / "broken"))
    _interrupt(broken, died, monkeypatch)
    saved = newest_state(tmp_path / "broken.partial")
    assert saved is not None
    assert saved.name == f"state-{died // 2 * 2:06d}"
    run_task(broken)
    assert _curve(broken) == _curve(whole)
    ours, theirs = _weights(broken), _weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(Path(broken.out).glob("state*"))


def test_a_state_of_other_settings_is_not_gone_on_with(task: TrainTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _interrupt(task, 3, monkeypatch)
    other = replace(task, seed=6)
    run_task(other)
    fresh = replace(other, out=str(tmp_path / "fresh"))
    run_task(fresh)
    assert _curve(other) == _curve(fresh)


def test_half_a_state_is_no_state(task: TrainTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _interrupt(task, 5, monkeypatch)
    draft = tmp_path / "out.partial"
    (draft / "state.partial").mkdir()
    (draft / "state.partial" / "tensors.safetensors").write_bytes(b"half")
    assert newest_state(draft) == draft / "state-000004"  # the older one went when this one was there
    assert sorted(path.name for path in draft.glob("state-*")) == ["state-000004"]


def _die(payload: tuple[list[TrainTask], int], ranks: Ranks) -> None:
    tasks, died = payload
    for task in tasks:
        with pytest.MonkeyPatch.context() as patch:
            _interrupt_after(died, patch)
            with contextlib.suppress(Interrupted):
                run_task(task, ranks)


def _finish(tasks: list[TrainTask], ranks: Ranks) -> None:
    for task in tasks:
        run_task(task, ranks)


@pytest.mark.parametrize(("stages", "before", "after"), [((2, 3), 2, 1), pytest.param((0, 3), 1, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_workers(
    stages: tuple[int, ...], before: int, after: int, two_workers: TwoWorkers, task: TrainTask, tmp_path: Path
) -> None:
    def at(stage: int, out: str) -> TrainTask:
        train = TRAIN.model_copy(update={"zero_stage": stage})
        return replace(task, train=train, lora=LoraConfig(r=4), out=str(tmp_path / f"{out}{stage}"))

    def on(workers: int, work: Callable[..., None], payload: object) -> None:
        if workers == 1:
            work(payload, current_ranks())
        else:
            two_workers(work, payload)

    tasks, whole = [at(stage, "out") for stage in stages], [at(stage, "whole") for stage in stages]
    _finish(whole, current_ranks())
    on(before, _die, (tasks, 4))
    assert all(newest_state(Path(f"{one.out}.partial")) is not None for one in tasks)
    on(after, _finish, tasks)
    for one, other in zip(tasks, whole, strict=True):
        for ours, theirs in zip(_curve(one), _curve(other), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["lr"] == theirs["lr"]
