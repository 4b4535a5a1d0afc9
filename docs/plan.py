"""The plan for 10⁹ rows and a 70B model, reckoned from its assumptions: `python docs/plan.py`. Only the pace of a GPU is measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import typer


@dataclass(frozen=True)
class Plan:
    """What is assumed."""

    rows: float = 1e9
    row_bytes: float = 1000
    tokens: float = 256
    shard_bytes: float = 16 * 2**20
    """Bytes of a shard of the candidates, the default of `data.shards`."""
    gpus: int = 512
    peak: float = 989e12
    """FLOP/s of one H100 in bfloat16."""
    forwards: float = 2.2
    """Forward passes a row and checkpoint, with loss and influence."""
    pace: float = field(default_factory=lambda: _measured("8B", "hooks"))
    """Tokens a second that one GPU scores with a model of 8B."""
    ingest_s: float = 2e-3
    """CPU seconds a row takes to ingest."""
    cores: int = 1000
    select_s: float = 7e-6
    """CPU seconds a row takes in selection by one score, near-duplicates not counted."""
    kept: float = 0.05
    """Share that the small model passes on to the large one."""

    @property
    def share(self) -> float:
        """Share of the peak that is reached at that pace; the GPU that was measured, an H200, has the same peak."""
        return self.pace * self.forwards * 2 * 8e9 / self.peak

    def gpu_hours(self, parameters: float, rows: float) -> float:
        """Return the GPU hours of one checkpoint's scores."""
        flop = self.forwards * 2 * parameters * self.tokens * rows
        return flop / (self.peak * self.share) / 3600


def _measured(shape: str, work: str) -> float:
    """Return the tokens a second of a kind of work in ``docs/results/gpu.json``."""
    file = Path(__file__).parent / "results" / "gpu.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return next(float(row["tokens_per_second"]) for row in rows if (row["shape"], row["work"]) == (shape, work))


def plan(given: Plan | None = None) -> str:
    """Return the plan as a Markdown table."""
    one = given or Plan()
    large, small = one.gpu_hours(70e9, one.rows), one.gpu_hours(8e9, one.rows)
    rest = one.gpu_hours(70e9, one.kept * one.rows)
    ingest, select = (one.rows * each / 3600 for each in (one.ingest_s, one.select_s))
    rows = [
        (
            "data",
            f"{one.rows * one.row_bytes / 1e12:.1f} TB in {one.rows * one.row_bytes / one.shard_bytes:,.0f} shards",
            "storage",
        ),
        ("ingest", f"{ingest:,.0f} CPU hours, {ingest / one.cores * 60:.0f} minutes on {one.cores:,} cores", "CPU nodes"),
        ("score by 70B", _scoring(large, one.gpus), "GPUs that hold 141 GB of weights and more"),
        ("score by 8B", _scoring(small, one.gpus), "80 GB GPUs"),
        (f"8B on all, 70B on the best {one.kept:.0%}", _scoring(small + rest, one.gpus), "both"),
        ("select", f"{select:.1f} CPU hours, {select / one.cores * 60:.1f} minutes on {one.cores:,} cores", "CPU nodes"),
    ]
    lines = ["| stage | work | on |", "| --- | --- | --- |", *(f"| {' | '.join(cells)} |" for cells in rows)]
    assumed = (
        f"Assumed: {one.row_bytes:,.0f} bytes and {one.tokens:,.0f} tokens a row; {one.forwards} forwards a row; "
        f"GPUs at {one.share:.0%} of {one.peak / 1e12:.0f} TFLOP/s; "
        f"{1000 * one.ingest_s:g} ms of CPU a row in ingestion, {1e6 * one.select_s:g} µs in selection."
    )
    return "\n".join([*lines, "", assumed])


def _scoring(hours: float, gpus: int) -> str:
    return f"{hours:,.0f} GPU hours a checkpoint: {hours / gpus:,.0f} hours on {gpus} GPUs"


if __name__ == "__main__":
    typer.echo(plan())
