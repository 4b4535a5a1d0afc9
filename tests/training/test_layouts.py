"""Every objective is the same function of its rows, whatever computes it: workers, ZeRO stages, micro-batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pharmacist_ray.config.schema import LoraConfig, TrainConfig
from pharmacist_ray.config.scoring import GuardConfig
from pharmacist_ray.data.render import Batch
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.models.load import add_lora, load_model
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.training.engine import build_engine
from pharmacist_ray.training.loop import run_task
from pharmacist_ray.training.objectives import OBJECTIVES, Step
from pharmacist_ray.training.objectives.t_vaccine import TVaccineSettings
from pharmacist_ray.training.task import TrainTask
from tests.two_workers import TwoWorkers

STEPS = 10
STAGES = (0, 2, 3)  # stage 1 is 2 without sharded gradients; test_engine has it
LORA = [(name, "lora") for name, one in OBJECTIVES.items() if name == "unlearn" or (one.stage != "repair" and not one.compose)]
FULL = [("sft", "full"), ("booster", "full")]
CELLS = [(*case, stage) for case in LORA + FULL for stage in STAGES]
FEW = [(*case, stage) for case, stage in zip([case for case in LORA if "+" not in case[0]] + FULL[:1], cycle((3, 0, 2)))]
"""One stage for each objective that is not put together of others, each stage for some of them."""
PARAMETERS = {
    "vaccine": {"rho": 1.0},
    "t_vaccine": {"rho": 1.0, "layers": 1, "interval": 3, "probe_interval": 5, "probe_rows": 3},
    "repnoise": {"alpha": 0.5, "beta": 0.5},
    "booster": {"lambda": 1.0, "alpha": 0.1},
    "lisa": {"rho": 0.5, "round_steps": 5, "safe_share": 0.4, "free_share": 0.0},
    "bds": {"lr": 0.1},
    "panacea": {"lambda": 1.0, "rho": 0.1},
    "antibody": {"xi": 0.5},
    "refusal_teacher": {"anchors": 24, "threshold": 0.3},
    "unlearn": {"weighted": True},
}

pytestmark = pytest.mark.timeout(900)  # everything runs in the setup of the first test


def _name(objective: str, weights: str, layout: str) -> str:
    return f"{objective.replace('+', '-')}-{weights}-{layout}"


def _curve(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name / "history.jsonl").read_text().splitlines()]


def _run(tasks: list[TrainTask], ranks: Ranks) -> None:
    for task in tasks:
        run_task(task, ranks)


def _draw(payload: tuple[str, list[Batch]], ranks: Ranks) -> list[list[list[float]]]:
    """Return which layers every worker drew for T-Vaccine, and what it measured, over steps, from rows of its own."""
    model, batches = payload
    own = batches[ranks.rank]
    engine = build_engine(
        add_lora(load_model(model), LoraConfig(r=2), seed=0),
        TrainConfig(batch_size=8),
        ranks,
        group=OBJECTIVES["t_vaccine"].group,
    )
    state: dict[str, torch.Tensor] = {}
    settings = {TVaccineSettings: TVaccineSettings(layers=1, interval=1, probe_interval=2)}
    places = [list(range(ranks.rank * 4, ranks.rank * 4 + 4))]
    found = []
    for number in range(8):
        step = Step(number, engine, ranks, [own], places, seed=1, settings=settings, harmful=[own], state=state)
        for loss in OBJECTIVES["t_vaccine"].run(step):
            engine.backward(loss)
        both = ranks.gather(torch.cat([state["t_vaccine.norms"].double(), state["t_vaccine.active"].double()])[None])
        found.append(both.tolist())
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def folder(tiny: Any, tokenizer: Any, rows_of: Any, moderator: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and rows, for finished tasks."""
    folder = tmp_path_factory.mktemp("layouts")
    tiny(hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "guard").symlink_to(moderator("single_label_classification"))
    safe: list[Row] = rows_of(24)
    bad = [
        Row(row_id(row.prompt, answer), row.prompt, answer, source=row.source, raw=row.raw)
        for row, answer in zip(safe, (other.response for other in rows_of(24, seed=9)), strict=True)
    ]
    write_rows(safe, folder / "safe.parquet")
    write_rows(bad, folder / "harmful.parquet")
    write_rows(rows_of(16, seed=4), folder / "trusted.parquet")
    write_rows(rows_of(16, seed=6), folder / "ordinary.parquet")
    return folder


def _task(folder: Path, objective: str, weights: Any, layout: str, **train: Any) -> TrainTask:
    settings = TrainConfig(steps=STEPS, batch_size=8, lr=6e-3, weight_decay=0.1, save_every=0, weights=weights, **train)
    name = _name(objective, weights, layout)
    return TrainTask(
        name=name,
        out=str(folder / name),
        model=ModelRef(str(folder / "model"), template="plain", max_length=32),
        rows=(str(folder / "safe.parquet"),),
        harmful=(str(folder / "harmful.parquet"),),
        safe=(str(folder / "trusted.parquet"),),
        ordinary=(str(folder / "ordinary.parquet"),),
        guard=GuardConfig(path=str(folder / "guard"), unsafe=["theft"]),
        verdicts=str(folder / "verdicts" / layout),
        train=settings,
        seed=5,
        objective=objective,
        parameters=PARAMETERS,
        lora=LoraConfig(r=2, targets=["q_proj", "o_proj", "down_proj"]),
    )


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """Run every objective in this process."""
    for case in LORA + FULL:
        run_task(_task(folder, *case, "one"))
    return folder


def _on_two(cells: Sequence[tuple[str, str, int]], folder: Path, two_workers: TwoWorkers) -> None:
    """Run cells on two workers, at stage 2 with micro-batches as well."""
    tasks = [
        _task(folder, objective, weights, f"zero{stage}", zero_stage=stage, accumulation=2 if stage == 2 else 1)
        for objective, weights, stage in cells
    ]
    two_workers(_run, tasks)


@pytest.fixture(scope="module")
def few(folder: Path, two_workers: TwoWorkers) -> None:
    _on_two(FEW, folder, two_workers)


@pytest.fixture(scope="module")
def others(folder: Path, two_workers: TwoWorkers) -> None:
    _on_two([cell for cell in CELLS if cell not in FEW], folder, two_workers)


def _assert_same(folder: Path, objective: str, weights: str, layout: str) -> None:
    one, other = (_curve(folder, _name(objective, weights, which)) for which in ("one", layout))
    assert len(one) == len(other) == STEPS
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True)) < 1e-5
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "tokens_per_s", "passes"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(
    ("objective", "weights", "stage"), [pytest.param(*cell, marks=() if cell in FEW else pytest.mark.slow) for cell in CELLS]
)
def test_two_workers_at_any_zero_stage_give_the_curve_of_one(
    objective: str, weights: str, stage: int, alone: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("few" if (objective, weights, stage) in FEW else "others")
    _assert_same(alone, objective, weights, f"zero{stage}")


@pytest.mark.parametrize("objective", ["ema", "panacea"])
def test_what_is_done_after_the_last_step_is_the_same_on_two_workers(objective: str, alone: Path, few: None) -> None:
    stage = next(stage for name, weights, stage in FEW if (name, weights) == (objective, "lora"))
    one, other = (
        load_file(alone / _name(objective, "lora", layout) / "adapter" / "adapter_model.safetensors")
        for layout in ("one", f"zero{stage}")
    )
    assert sum(bool(weight.any()) for weight in one.values()) == len(one)
    for name in one:
        assert float((one[name] - other[name]).norm() / one[name].norm()) < 1e-3, name


@pytest.mark.parametrize(("objective", "weights"), LORA)
def test_micro_batches_give_the_curve_of_one_batch(objective: str, weights: str, alone: Path) -> None:
    run_task(_task(alone, objective, weights, "micro", accumulation=4))
    _assert_same(alone, objective, weights, "micro")


def test_the_curves_are_those_of_different_objectives_that_learn(alone: Path) -> None:
    """Or all of the above would hold for a loop that does nothing. EMA's training is SFT's; Lisa's ends on other rows than it began on,
    and of Refusal-Teacher's each step leaves out others."""
    names = [objective for objective, _ in LORA if objective not in ("ema", "lisa", "refusal_teacher")]
    curves = {objective: _curve(alone, _name(objective, "lora", "one")) for objective in names}
    drops = {name: curve[0]["loss"] - curve[-1]["loss"] for name, curve in curves.items()}
    assert min(drops.values()) > 0.05, drops
    ends = sorted(curve[-1]["grad_norm"] for curve in curves.values())
    assert all(b - a > 1e-3 for a, b in pairwise(ends))


def test_every_worker_draws_the_same_layers_from_the_same_norms(folder: Path, batch_of: Any, two_workers: TwoWorkers) -> None:
    drawn = two_workers(_draw, (str(folder / "model"), [batch_of(4, seed=seed) for seed in (1, 2)]))
    found = torch.tensor(drawn)  # (steps, workers, norms and active layers)
    assert found.shape == (8, 2, 3)
    assert torch.equal(found[:, 0], found[:, 1])
    assert found[:, 0, 2].unique().numel() == 2  # over the steps both layers are drawn
