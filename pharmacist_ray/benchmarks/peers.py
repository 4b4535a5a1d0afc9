"""What a score for every row costs: ours, and the methods of other systems, written plainly from their descriptions. A program, not a test.

All score the same rows on the same model against the same direction. Each has a process of its own, where it takes turns, round by round,
with a pass that does nothing but compute losses; the ratio is the median over rounds. So none pays for the memory that another has left. On
a CPU the process's own CPU seconds count, so that whatever else the machine does does not. What a method is worth is not measured here:
agreement is with the exact first-order influence, which is what all but SEAL set out to estimate.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from pharmacist_ray.benchmarks.peer_methods import METHODS, SHAPES, Bench, Load, Scores, make
from pharmacist_ray.errors import ArtifactError, unknown_name
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.runtime.cores import use_cores
from pharmacist_ray.runtime.usage import peak_bytes
from pharmacist_ray.storage import write_text

EXACT = ("hooks", "ghost", "loop", "default scorers")
"""Methods whose scores have to be those of the loop."""
FLOORS = ("forward", "forward, folded")
"""Passes that compute losses, and no score."""
AGREEMENT = 0.999
"""Least correlation of an exact method with the loop (ours)."""


@dataclass(frozen=True)
class Cost:
    """What one method was measured to cost on one load."""

    method: str
    seconds: float
    """Median over rounds of what all rows took; CPU seconds on a CPU."""
    ratio: float
    """Median over rounds of its seconds over those of the forward pass alone."""
    samples_per_s: float
    tokens_per_s: float
    peak_mib: float
    """Peak memory: of the GPU, or of the process with its libraries."""
    bytes_per_row: int
    agreement: float | None
    """Correlation of its scores with the exact ones; None where it gives none."""


def measure(loads: Sequence[Load], methods: Sequence[str] = tuple(METHODS)) -> list[dict[str, Any]]:
    """Measure methods on loads, and return a row for each pair.

    Args:
        loads: Models and rows.
        methods: Names; the forward pass and the loop are always among them, as measures of the others.

    Raises:
        ConfigError: A method or a shape is unknown.
        ArtifactError: A count is wrong, or an exact method does not agree with the loop.
    """
    for name in methods:
        if name not in METHODS:
            raise unknown_name("method", name, list(METHODS))
    names = list(dict.fromkeys(["forward", "loop", *methods]))
    found = []
    spawn = multiprocessing.get_context("spawn")
    for load in loads:
        if load.shape not in SHAPES:
            raise unknown_name("shape", load.shape, list(SHAPES))
        say(f"[bold]{load.shape}[/], {load.weights}, {load.rows} rows of up to {load.length} tokens")
        with spawn.Pool(1, maxtasksperchild=1) as pool:
            taken = {name: pool.apply(_in_turns, (name, load)) for name in names}
        scores = {name: one.scores for name, one in taken.items()}
        _check(load, scores, {name: one.bytes_per_row for name, one in taken.items()})
        for name, one in taken.items():
            seconds, ratio = statistics.median(one.seconds), statistics.median(np.divide(one.seconds, one.floors).tolist())
            agreement = None if name in FLOORS else float(np.corrcoef(scores[name], scores["loop"])[0, 1])
            pace, mib = (load.rows / seconds, one.tokens / seconds), one.peak / 2**20
            found.append(asdict(load) | asdict(Cost(name, seconds, ratio, *pace, mib, one.bytes_per_row, agreement)))
    return found


def _check(load: Load, scores: dict[str, Scores], written: dict[str, int]) -> None:
    """Fail where a method did not score each row once, or an exact one is not exact."""
    for name, values in scores.items():
        if values.shape != (load.rows,) or not np.isfinite(values).all():
            raise ArtifactError(f"{name} gave {values.shape} scores, some of them no numbers, for {load.rows} rows")
        if written[name] <= 0:
            raise ArtifactError(f"{name} says that it writes {written[name]} bytes a row")
        agreement = float(np.corrcoef(values, scores["loop"])[0, 1])
        if name in EXACT and not agreement >= AGREEMENT:
            raise ArtifactError(f"{name} agrees with a backward pass a row to {agreement:.4f} only, less than {AGREEMENT}")


def show(found: Sequence[dict[str, Any]], out: Path | None = None) -> None:
    """Print what was measured, and write it to ``peers.json`` in a folder."""
    for load in dict.fromkeys((row["shape"], row["weights"], row["length"]) for row in found):
        mine = [row for row in found if (row["shape"], row["weights"], row["length"]) == load]
        title = f"{load[0]}, {load[1]}, {mine[0]['rows']} rows of up to {load[2]} tokens, {mine[0]['rounds']} rounds on {mine[0]['device']}"
        table = Table(title=title, title_justify="left")
        table.add_column("method")
        for heading in ("over a forward", "rows/s", "tokens/s", "peak MiB", "bytes a row", "agreement"):
            table.add_column(heading, justify="right")
        for row in sorted(mine, key=lambda row: row["ratio"]):
            agreement = "–" if row["agreement"] is None else f"{row['agreement']:.3f}"
            pace = (f"{row[name]:,.0f}" for name in ("samples_per_s", "tokens_per_s", "peak_mib", "bytes_per_row"))
            table.add_row(escaped(row["method"]), f"{row['ratio']:.2f}", *pace, agreement)
        console.print(table)
    if out is not None:
        write_text(json.dumps({"peers": list(found)}, indent=1), out / "peers.json")
        say(f"  written to {escaped(out / 'peers.json')}")


@dataclass(frozen=True)
class _Taken:
    """What one method took in a process of its own."""

    seconds: list[float]
    """Of each round."""
    floors: list[float]
    """Of the forward pass alone in the same rounds."""
    scores: Scores
    peak: int
    bytes_per_row: int
    tokens: int


def _in_turns(name: str, load: Load) -> _Taken:
    use_cores(1)
    clock = time.perf_counter if load.device == "cuda" else time.process_time
    method, floor = METHODS[name], METHODS["forward"]
    with tempfile.TemporaryDirectory() as folder:
        bench = make(load, Path(folder))

        def timed(run: Callable[[Bench], Scores]) -> float:
            started = clock()
            run(bench)
            if load.device == "cuda":
                torch.cuda.synchronize()
            return clock() - started

        scores, peak = method.run(bench), peak_bytes()  # which warms up
        floor.run(bench)
        floors, seconds = zip(*((timed(floor.run), timed(method.run)) for _ in range(load.rounds)), strict=True)
        bytes_per_row = method.bytes_per_row(bench)
        if (size := sum(file.stat().st_size for file in Path(folder).glob("*.bin"))) not in (0, bytes_per_row * load.rows):
            raise ArtifactError(f"{name} wrote {size} bytes for {load.rows} rows, not {bytes_per_row} each")
        tokens = sum(len(ids) for ids, _ in bench.rows)
        return _Taken([*seconds], [*floors] if name != "forward" else [*seconds], scores, peak, bytes_per_row, tokens)
