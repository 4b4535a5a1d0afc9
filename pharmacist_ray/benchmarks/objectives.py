"""What each objective costs on this machine: seconds per step over SFT's, and peak memory. A program, not a test.

Objectives take turns, round by round, within one process; the ratio is the median over rounds of each round's ratio. On a CPU the
process's own CPU seconds count, so that whatever else the machine does does not. Peak memory comes from a process of its own for each.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pharmacist_ray.config.schema import LoraConfig, ModelConfig, TrainConfig
from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.load import add_lora
from pharmacist_ray.models.modes import enable_checkpointing
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.console import console, say
from pharmacist_ray.runtime.cores import use_cores
from pharmacist_ray.runtime.ranks import current_ranks
from pharmacist_ray.storage import write_text
from pharmacist_ray.testbed.tiny import tiny_llama, word_tokenizer
from pharmacist_ray.training.engine import build_engine
from pharmacist_ray.training.objectives import OBJECTIVES, Step, settings_of

PASSES = {"sft": 1, "vaccine": 2, "t_vaccine": 2, "booster": 3, "booster+vaccine": 4}
"""Forward and backward passes of a step, of which an objective should cost no more than 1.15 times as many steps of SFT. RepNoise's
lens has no such count."""


@dataclass(frozen=True)
class Load:
    """What is measured."""

    model: str | None = None
    """Folder or hub id; default: a random Llama of 21 M parameters."""
    dtype: str = "float32"
    rows: int = 16
    """Rows of a micro-batch."""
    length: int = 128
    """Tokens of a row, half of them answer."""
    rounds: int = 5
    device: str = "cpu"
    checkpointing: bool = False
    rank: int = 16


@dataclass(frozen=True)
class Cost:
    """What one objective was measured to cost."""

    objective: str
    seconds: float
    """Median seconds of a step; CPU seconds on a CPU."""
    ratio: float
    """Median over rounds of its seconds over SFT's in the same round."""
    forwards: float
    """Forward passes a step."""
    peak_mib: float
    """Peak memory: of the GPU, or of the process with its libraries."""


def benchmark(
    objectives: Sequence[str], load: Load, out: Path | None = None, parameters: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Cost]:
    """Measure objectives, print a table, and write ``benchmark.json`` if asked to.

    Args:
        objectives: Names; SFT is always measured, as the measure of the others.
        load: Model and batch.
        out: Folder for ``benchmark.json``.
        parameters: Settings of objectives, as in ``alignment.parameters``.

    Raises:
        ConfigError: An objective is unknown.
    """
    costs = measure(objectives, load, parameters)
    show(costs, load, out)
    return costs


def measure(objectives: Sequence[str], load: Load, parameters: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cost]:
    """Measure objectives in the process's own place, without a word; see `benchmark`."""
    for name in objectives:
        OBJECTIVES.plugin(name)
    names = list(dict.fromkeys(["sft", *objectives]))
    parameters = {"t_vaccine": {"layers": 4}} | dict(parameters or {})
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        times, forwards = pool.apply(_take_turns, (names, load, parameters))
        peaks = {name: pool.apply(_peak, (name, load, parameters)) for name in names}
    return [
        Cost(
            name,
            statistics.median(times[name]),
            statistics.median(mine / sft for mine, sft in zip(times[name], times["sft"], strict=True)),
            forwards[name],
            peaks[name],
        )
        for name in names
    ]


def show(costs: Sequence[Cost], load: Load, out: Path | None = None) -> None:
    """Print what was measured, and write it to ``benchmark.json`` in a folder."""
    table = Table(
        title=f"{load.rows} rows of {load.length} tokens, {load.rounds} rounds on {load.device}",
        title_justify="left",
    )
    table.add_column("objective")
    for heading in ("s a step", "over SFT", "passes", "over passes", "forwards", "peak MiB"):
        table.add_column(heading, justify="right")
    for cost in costs:
        passes = PASSES.get(cost.objective)
        table.add_row(
            cost.objective,
            f"{cost.seconds:.3f}",
            f"{cost.ratio:.2f}",
            str(passes or "–"),
            f"{cost.ratio / passes:.2f}" if passes else "–",
            f"{cost.forwards:g}",
            f"{cost.peak_mib:.0f}",
        )
    console.print(table)
    if out is not None:
        write_text(
            json.dumps({"load": asdict(load), "costs": [asdict(cost) for cost in costs]}, indent=1), out / "benchmark.json"
        )
        say(f"  written to {out / 'benchmark.json'}")


def _take_turns(names: list[str], load: Load, parameters: Mapping[str, Any]) -> tuple[dict[str, list[float]], dict[str, float]]:
    use_cores(1)
    clock = time.perf_counter if load.device == "cuda" else time.process_time
    engine, batches, harmful = _setup(load)
    times: dict[str, list[float]] = {name: [] for name in names}
    forwards: dict[str, float] = {}
    state: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for number in range(load.rounds + 1):  # the first round warms up, and measures T-Vaccine's layers
        for name in names:
            started = clock()
            step = _step(name, number, engine, batches, harmful, parameters, state[name])
            if load.device == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(clock() - started)
                forwards[name] = step.forwards
    return times, forwards


def _peak(name: str, load: Load, parameters: Mapping[str, Any]) -> float:
    use_cores(1)
    engine, batches, harmful = _setup(load)
    state: dict[str, torch.Tensor] = {}
    for number in range(2):
        _step(name, number, engine, batches, harmful, parameters, state)
    if load.device == "cuda":
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / (1024 if sys.platform == "linux" else 2**20)


def _setup(load: Load) -> tuple[Any, list[Batch], list[Batch]]:
    if load.model is None:
        tokenizer = word_tokenizer(f"w{number}" for number in range(8192))
        model: Any = tiny_llama(tokenizer, hidden=384, layers=8, heads=6, intermediate=1024, max_length=max(256, load.length))
    else:
        model = ModelRef(ModelConfig(path=load.model).path, (), load.dtype).load(load.device)
    model = add_lora(model, LoraConfig(r=load.rank), seed=0)
    if load.checkpointing:
        enable_checkpointing(model)
    engine = build_engine(model, TrainConfig(batch_size=load.rows, lr=1e-5), current_ranks(), dtype=load.dtype)
    engine.train()
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        ids = torch.randint(5, model.config.vocab_size, (load.rows, load.length), generator=generator)
        labels = ids.clone()
        labels[:, : load.length // 2] = -100
        made.append(Batch(ids, torch.ones_like(ids), labels).to(load.device))
    return engine, made[:1], made[1:]


def _step(
    name: str,
    number: int,
    engine: Any,
    batches: list[Batch],
    harmful: list[Batch],
    parameters: Mapping[str, Any],
    state: dict[str, torch.Tensor],
) -> Step:
    step = Step(
        number=number,
        engine=engine,
        ranks=current_ranks(),
        batches=batches,
        positions=[list(range(len(batches[0])))],
        seed=0,
        settings=settings_of(name, parameters),
        harmful=harmful,
        state=state,
    )
    for loss in OBJECTIVES[name].run(step):
        engine.backward(loss)
    engine.step()
    return step
