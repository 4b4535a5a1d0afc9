"""How time and memory of curation grow with the number of rows, measured: each stage in a process of its own, watched from outside.

The rows are synthetic and the model is tiny and random, so what is measured is the pipeline. One row in a hundred is written twice
and one in a thousand is broken, so that the counts can be held against what they have to be.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml
from rich.table import Table

from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.storage import json_of, row_count, write_text
from pharmacist_ray.testbed.tiny import tiny_llama, word_tokenizer

STAGES = ("ingest", "fit", "score", "select")
WORDS = 2000
FILE_ROWS = 100_000
RATIO = 0.4

_SAMPLE_S = 0.5
# Ray Data ingests whatever there is, as it does what is large: else the sizes would have gone different ways.
_COMMAND = (
    "from pharmacist_ray.cli.process import private_ray; private_ray(); "
    "from pharmacist_ray.curation import ingest; ingest.SMALL_BYTES = 0; from pharmacist_ray.cli.app import main; main()"
)


@dataclass(frozen=True)
class Usage:
    """What one stage took at one size."""

    rows: int
    stage: str
    seconds: float
    """Wall time with the start of Ray and of the workers."""
    cpu_seconds: float
    """CPU time of the driver and everything below it, which other work on the machine does not change."""
    driver_mib: float
    """Peak private memory of the driver."""
    worker_mib: float
    """Peak private memory of the largest worker."""
    workers_mib: float
    """Peak private memory of all workers together."""


@dataclass
class _Peaks:
    """Highest private memory seen, in bytes: resident pages that no other process shares, so without the object store's."""

    driver: int = 0
    worker: int = 0
    workers: int = 0
    times: dict[int, float] = field(default_factory=dict)
    """Process → its CPU seconds when it was seen last."""
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self, process: psutil.Process) -> None:
        """Look at a process and at the Ray workers below it until told to stop."""
        while not self.over.wait(_SAMPLE_S):
            try:
                self.driver = max(self.driver, _private(process))
                below = process.children(recursive=True)
            except psutil.Error:
                continue
            sizes = []
            for one in (process, *below):
                try:
                    spent = one.cpu_times()
                    self.times[one.pid] = spent.user + spent.system
                    if one.name().startswith("ray::"):
                        sizes.append(_private(one))
                except psutil.Error:  # it has just ended
                    continue
            self.worker = max([self.worker, *sizes])
            self.workers = max(self.workers, sum(sizes))


def growth(
    sizes: Sequence[int],
    out: Path,
    *,
    actors: int = 2,
    stages: Sequence[str] = STAGES,
    row_bytes: int = 0,
    max_length: int = 64,
    store_mib: int = 256,
) -> list[Usage]:
    """Curate as many synthetic rows as each size says, print what each stage took, and write ``growth.json``.

    Args:
        sizes: Numbers of rows.
        out: Folder for data and runs; stages that an earlier measurement finished are taken over.
        actors: Scoring actors.
        stages: Which to measure: the first of `STAGES`, as many as one wants.
        row_bytes: Bytes of a row's prompt and answer together, about; 0 makes rows of 12 to 24 words.
        max_length: The model's, in tokens; where a prompt has fewer bytes, ingestion need not tokenise it.
        store_mib: Ray's object store, the same for all sizes, so that it cannot hide growth.

    Raises:
        ArtifactError: A stage failed, or its counts are wrong.
    """
    out = out.absolute()
    found: list[Usage] = []
    for rows in sizes:
        folder = out / str(rows)
        made = folder / "spent.json"
        spent = json_of(made) if made.exists() else []
        if len(spent) < len(stages):
            say(f"[bold]{rows:,} rows[/]")
            config = _prepare(folder, rows, actors, row_bytes, max_length)
            for stage in stages[len(spent) :]:
                spent.append(asdict(_run(stage, config, rows, store_mib)))
                write_text(json.dumps(spent, indent=1), made)
            _check(folder / "run", rows, stages)
        found += [Usage(**one) for one in spent[: len(stages)]]
    write_text(json.dumps([asdict(one) for one in found], indent=1), out / "growth.json")
    console.print(_table(found))
    say(f"  {psutil.cpu_count()} cores; written to {escaped(out / 'growth.json')}")
    return found


def _prepare(folder: Path, rows: int, actors: int, row_bytes: int, max_length: int) -> Path:
    """Write model, data and configuration; return the configuration's file."""
    tokenizer = word_tokenizer(f"w{number}" for number in range(WORDS))
    model = tiny_llama(tokenizer, hidden=32, layers=2, heads=2, intermediate=64, max_length=max_length)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for first in range(0, rows, FILE_ROWS):
        lines = (_line(number, row_bytes) for number in range(first, min(rows, first + FILE_ROWS)))
        write_text("".join(lines), folder / "data" / f"{first // FILE_ROWS:05d}.jsonl")
    for seed, name in enumerate(("validation", "harmful")):
        write_text("".join(_line(10 * number + 1 + seed) for number in range(64)), folder / f"{name}.jsonl")
    train = {"steps": 20, "batch_size": 16}
    values = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "template": "plain", "max_length": max_length},
        "data": {
            "candidates": {"path": str(folder / "data")},
            "validation": {"path": str(folder / "validation.jsonl")},
            "harmful": {"path": str(folder / "harmful.jsonl")},
        },
        "resources": {"workers": 1, "actors": actors},
        "selector": {"warmup": train, "checkpoints": [20], "reference": None},
        "scoring": {"scorers": ["pharmacist", "random"], "random_draws": 1},
        "selection": {"ratio": RATIO},
    }
    write_text(yaml.safe_dump(values, sort_keys=False), folder / "config.yaml")
    return folder / "config.yaml"


def _line(number: int, row_bytes: int = 0) -> str:
    """Return a row: every hundredth is the one before it again, every thousandth is not JSON."""
    if number % 1000 == 999:
        return '{"prompt": "w1", \n'
    draw = random.Random(number - 1 if number % 100 == 50 else number)
    count = draw.randrange(12, 25) if not row_bytes else max(12, row_bytes // 6)  # a word and the space after it: 6 bytes, nearly
    words = [f"w{draw.randrange(WORDS)}" for _ in range(count)]
    asked = 8 if not row_bytes else count // 3
    prompt, response = " ".join(words[:asked]), " ".join(words[asked:])
    return json.dumps({"prompt": prompt, "response": response, "category": f"c{draw.randrange(10)}"}) + "\n"


def _run(stage: str, config: Path, rows: int, store_mib: int) -> Usage:
    peaks, started = _Peaks(), time.perf_counter()
    environment = os.environ | {"PHARMACIST_OBJECT_STORE_BYTES": str(store_mib << 20)}
    command = [sys.executable, "-c", _COMMAND, stage, "--config", str(config)]
    with psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        thread = threading.Thread(target=peaks.watch, args=(process,), daemon=True)
        thread.start()
        told, _ = process.communicate()
        seconds = time.perf_counter() - started
        peaks.over.set()
        thread.join()
    if process.returncode:
        raise ArtifactError(f"{stage} of {rows} rows ended with {process.returncode}: {' '.join(told.split())[-500:]}")
    mib = 2**20
    spent = Usage(rows, stage, seconds, sum(peaks.times.values()), peaks.driver / mib, peaks.worker / mib, peaks.workers / mib)
    memory = f"driver {spent.driver_mib:.0f} MiB, largest worker {spent.worker_mib:.0f} MiB"
    say(f"  {stage}: {seconds:.1f} s, {spent.cpu_seconds:.1f} CPU s, {memory}")
    return spent


def _private(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _check(run: Path, rows: int, stages: Sequence[str]) -> None:
    """Hold the counts against what was written."""
    broken = sum(number % 1000 == 999 for number in range(rows))
    twice = sum(number % 100 == 50 for number in range(rows))
    ingested = json_of(run / "ingest" / "candidates" / "manifest.json")["summary"]
    good = rows - broken - twice
    told = {name: ingested[name] for name in ("rows_in", "rows_out", "duplicates", "quarantined")}
    wanted = {"rows_in": rows, "rows_out": good, "duplicates": twice, "quarantined": broken}
    if "score" in stages:
        told["scored"] = sum(row_count(file) for file in (run / "scores" / "rows").glob("*.parquet"))
        wanted["scored"] = good
    if "select" in stages:
        told["kept"] = json_of(run / "selections" / "pharmacist" / "manifest.json")["kept"]
        wanted["kept"] = int(RATIO * good + 0.5)
    if told != wanted:
        raise ArtifactError(f"wrong counts at {rows} rows: {told}; expected {wanted}")


def _table(found: Sequence[Usage]) -> Table:
    """Return the measurements as a table; CPU time a row is what a size took more than the one before, so without the start."""
    table = Table(title="growth", title_justify="left")
    for heading in ("rows", "stage", "s", "CPU s", "CPU µs/row", "rows/s", "driver MiB", "largest worker MiB", "all workers MiB"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    smaller: dict[str, Usage] = {}
    for one in found:
        less = smaller.get(one.stage)
        each = "" if less is None else f"{1e6 * (one.cpu_seconds - less.cpu_seconds) / max(1, one.rows - less.rows):.0f}"
        smaller[one.stage] = one
        memory = (f"{value:.0f}" for value in (one.driver_mib, one.worker_mib, one.workers_mib))
        table.add_row(
            f"{one.rows:,}",
            one.stage,
            f"{one.seconds:.1f}",
            f"{one.cpu_seconds:.1f}",
            each,
            f"{one.rows / one.seconds:,.0f}",
            *memory,
        )
    return table
