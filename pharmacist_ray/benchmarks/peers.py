"""What a score for every row costs: ours, and the methods of other systems, written plainly from their descriptions. A program, not a test.

All score the same rows on the same model against the same direction. They take turns, round by round, within one process, and each is held
against a pass that does nothing but compute losses; the ratio is the median over rounds. On a CPU the process's own CPU seconds count, so
that whatever else the machine does does not. Peak memory comes from a process of its own for each. What a method is worth is not measured
here: agreement is with the exact first-order influence, which is what all but SEAL set out to estimate.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from pharmacist_ray.benchmarks.peer_methods import METHODS, SHAPES, Load, Scores, make
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
            times, scores, written, tokens = pool.apply(_take_turns, (names, load))
            peaks = {name: pool.apply(_peak, (name, load)) for name in names}
        _check(load, scores, written)
        for name in names:
            seconds = statistics.median(times[name])
            ratio = statistics.median(mine / floor for mine, floor in zip(times[name], times["forward"], strict=True))
            agreement = None if name in FLOORS else float(np.corrcoef(scores[name], scores["loop"])[0, 1])
            cost = Cost(
                name, seconds, ratio, load.rows / seconds, tokens / seconds, peaks[name] / 2**20, written[name], agreement
            )
            found.append(asdict(load) | asdict(cost))
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


def _take_turns(names: list[str], load: Load) -> tuple[dict[str, list[float]], dict[str, Scores], dict[str, int], int]:
    use_cores(1)
    clock = time.perf_counter if load.device == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in names}
    scores: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = make(load, Path(folder))
        # Before each turn a batch that is not timed, the same for all: else one pays for the memory that another's turn has left.
        first = replace(bench, rows=[bench.rows[place] for place in next(bench.batches())[0]], kept={})
        for number in range(load.rounds + 1):  # the first round warms up
            for name in names:
                METHODS["hooks"].run(first)
                started = clock()
                scores[name] = METHODS[name].run(bench)
                if load.device == "cuda":
                    torch.cuda.synchronize()
                if number:
                    times[name].append(clock() - started)
        written = {name: METHODS[name].bytes_per_row(bench) for name in names}
        for name, file in (("LESS", "less.bin"), ("LESS, sketched", "sketched.bin"), ("bergson", "collected.bin")):
            if name in names and (size := (Path(folder) / file).stat().st_size) != written[name] * load.rows:
                raise ArtifactError(f"{name} wrote {size} bytes for {load.rows} rows, not {written[name]} each")
        return times, scores, written, sum(len(ids) for ids, _ in bench.rows)


def _peak(name: str, load: Load) -> int:
    use_cores(1)
    with tempfile.TemporaryDirectory() as folder:
        METHODS[name].run(make(load, Path(folder)))
    return peak_bytes()
