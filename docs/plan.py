"""The plan for 10⁹ rows and a 70B model, reckoned from assumptions by the doctor's arithmetic: `python docs/plan.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from transformers import LlamaConfig

from pharmacist_ray.benchmarks.gpu import SHAPES
from pharmacist_ray.config import load_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.cluster import parse_cluster
from pharmacist_ray.doctor.estimate import Item, total
from pharmacist_ray.doctor.gpus import GPUS
from pharmacist_ray.doctor.hours import Pool, batch_seconds
from pharmacist_ray.doctor.pace import UTILISATION
from pharmacist_ray.doctor.shape import Shape, shape_of
from pharmacist_ray.doctor.workload import INGEST_S, ROW_BYTES, SELECT_S, TOKENS, Work

CLUSTER = Path(__file__).resolve().parent.parent / "cluster"
MODELS = {
    "8B": ("llama-3-8b.yaml", SHAPES["8B"], 1),
    "70B": (
        "llama-3-70b.yaml",
        SHAPES["8B"] | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        4,
    ),
}
"""Name → its file in `cluster`, whose scoring it has, its shape, and the GPUs that hold its weights together while it scores."""


@dataclass(frozen=True)
class Plan:
    """What is assumed."""

    rows: float = 1e9
    shard_bytes: float = 16 * 2**20
    """Bytes of a shard of the candidates, the default of `data.shards`."""
    cluster: str = "64x8xH100"
    checkpoints: int = 1
    """Passes forward and backward over a row: `pharmacist`, at one checkpoint."""
    forwards: int = 2
    """Forward passes besides: `loss_gap`, the other default scorer, at the base and at its reference."""
    cores: int = 1000
    kept: float = 0.05
    """Share that the small model passes on to the large one."""

    @property
    def pool(self) -> Pool:
        """Its GPUs."""
        return Pool(parse_cluster(self.cluster)[0])

    def batch(self, model: str) -> list[Item]:
        """Return the seconds in which a GPU scores a batch, item by item."""
        config, shape = _model(model)
        work = Work(self.rows, ROW_BYTES, TOKENS, (), self.checkpoints, self.forwards, 0, 0, 0, 0)
        return batch_seconds(shape, config, work, self.pool, MODELS[model][2])

    def gpu_hours(self, model: str, rows: float) -> float:
        """Return the GPU hours of the default scores."""
        tokens = _model(model)[0].scoring.tokens_per_batch
        return rows * TOKENS / tokens * total(self.batch(model)) / 3600


@cache
def _model(name: str) -> tuple[Config, Shape]:
    file, settings, _ = MODELS[name]
    with TemporaryDirectory() as folder:
        LlamaConfig(**settings, dtype="bfloat16").save_pretrained(folder)
        config = load_config(CLUSTER / file, [f"model.path={folder}"])
        return config, shape_of(config.model)


def plan(given: Plan | None = None) -> str:
    """Return the plan as a Markdown table."""
    one = given or Plan()
    gpus = one.pool.gpus
    large, small, rest = one.gpu_hours("70B", one.rows), one.gpu_hours("8B", one.rows), one.gpu_hours("70B", one.kept * one.rows)
    ingest, select = (one.rows * each / 3600 for each in (INGEST_S, SELECT_S))
    group = MODELS["70B"][2]
    rows = [
        ("data", f"{one.rows * ROW_BYTES / 1e12:.1f} TB in {one.rows * ROW_BYTES / one.shard_bytes:,.0f} shards", "storage"),
        ("ingest", f"{ingest:,.0f} CPU hours, {ingest / one.cores * 60:.0f} minutes on {one.cores:,} cores", "CPU nodes"),
        ("score by 70B", _scoring(large, gpus), f"groups of {group} GPUs at ZeRO 3"),
        ("score by 8B", _scoring(small, gpus), "one GPU each"),
        (f"8B on all, 70B on the best {one.kept:.0%}", _scoring(small + rest, gpus), "both"),
        ("select", f"{select:.1f} CPU hours, {select / one.cores * 60:.1f} minutes on {one.cores:,} cores", "CPU nodes"),
    ]
    lines = ["| stage | work | on |", "| --- | --- | --- |", *(f"| {' | '.join(cells)} |" for cells in rows)]
    batch = one.batch("70B")
    gathers = sum(item.amount for item in batch if item.what == "gathering weights") / total(batch)
    assumed = (
        f"Assumed: {ROW_BYTES:,.0f} bytes and {TOKENS:,.0f} tokens a row; {one.checkpoints} pass forward and backward and {one.forwards} "
        f"forward, which are the default scorers; GPUs at {UTILISATION:.0%} of {GPUS[one.pool.slowest].bfloat16 / 1e12:.0f} TFLOP/s; "
        f"{1000 * INGEST_S:g} ms of CPU a row in ingestion, {1e6 * SELECT_S:g} µs in selection. Of a batch of the 70B model "
        f"{gathers:.0%} is gathering weights."
    )
    return "\n".join([*lines, "", assumed])


def _scoring(hours: float, gpus: int) -> str:
    return f"{hours:,.0f} GPU hours: {hours / gpus:,.0f} hours on {gpus} GPUs"


if __name__ == "__main__":
    typer.echo(plan())
