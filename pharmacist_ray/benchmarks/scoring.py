"""What Ray Data costs a scoring: one scorer in a bare loop, by one actor and by two, on the same shards. A program, not a test.

Two bare loops side by side tell what a second process can gain at all: cores share their caches and their memory, and some are half of one.
They take turns, round by round, and each starts its own processes. The scores have to be the same to the bit. Wall seconds count, so
measure on a machine that does nothing else; ratios are medians over rounds, each of neighbours in time.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pharmacist_ray.benchmarks.peer_methods import SHAPES
from pharmacist_ray.config.schema import LoraConfig, ResourcesConfig, ScoringConfig, SelectorConfig
from pharmacist_ray.curation.ingest import shards_of
from pharmacist_ray.curation.score import RETRIES, ShardScorer
from pharmacist_ray.curation.scorers.signals import ProbeSpec
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.curation.selector import DIRECTIONS, checkpoint_name
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row, row_id, shard_of
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.models.load import add_lora, save_adapter
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.session import connected
from pharmacist_ray.runtime.actors import on_actors
from pharmacist_ray.storage import write_text
from pharmacist_ray.testbed.tiny import word_tokenizer

WAYS = {"bare loop": (1, False), "1 actor": (1, True), "2 bare loops": (2, False), "2 actors": (2, True)}
"""Way → processes, and whether they are Ray Data's actors."""
FLOORS = {"1 actor": ("bare loop", 0.9), "2 bare loops": ("bare loop", None), "2 actors": ("1 actor", 1.8)}
"""Way → the one that it is held against, and the least ratio of rows a second (ours)."""
ROW_BYTES = 500
"""Of which the number of shards follows, as in ingestion."""


@dataclass(frozen=True)
class Load:
    """What is scored."""

    rows: int = 10_000
    shape: str = "1M"
    """A key of `SHAPES`."""
    length: int = 256
    """Tokens of the longest rows; half of a row is answer."""
    rounds: int = 3


@dataclass(frozen=True)
class Pace:
    """What one way took in one round."""

    way: str
    round: int
    seconds: float
    """From nothing to the last score."""
    start_s: float
    """Of these, until a process had loaded the model and begun its first shard."""
    rows_per_s: float
    """After that."""


def measure(load: Load) -> list[Pace]:
    """Score all rows by every way in every round.

    Args:
        load: What to score.

    Raises:
        ArtifactError: A way lost a row or a shard, or its scores are not those of the bare loop.
    """
    found: list[Pace] = []
    with tempfile.TemporaryDirectory() as place, connected(ResourcesConfig(actors=2)):
        arguments, units = prepare(load, Path(place))
        for number in range(load.rounds):
            expected: pa.Table | None = None
            for way, (processes, by_actors) in WAYS.items():
                out = Path(place) / "scores"
                shutil.rmtree(out, ignore_errors=True)
                started = time.time()
                done = list(_scored(arguments, units, processes, by_actors))
                found.append(_pace(way, number, started, done, out))
                scores = pa.concat_tables([pq.read_table(file) for file in sorted(out.glob("*.parquet"))])
                expected = scores if expected is None else expected
                if scores.num_rows != load.rows or len(done) != len(units) or scores != expected:
                    raise ArtifactError(
                        f"{way} gave {scores.num_rows} scores of {len(done)} shards for {load.rows} rows of {len(units)}, or other scores"
                    )
                say(f"  round {number + 1}, {way}: {found[-1].seconds:.1f} s, {found[-1].rows_per_s:,.1f} rows/s")
    return found


def _pace(way: str, number: int, started: float, done: Sequence[dict[str, Any]], out: Path) -> Pace:
    """Tell by the files when scoring began and the last shard ended: Ray Data may hand on a result some shards later."""
    ends = [(out / one["shard"]).stat().st_mtime for one in done]
    begun = min(end - one["seconds"] for end, one in zip(ends, done, strict=True))
    rows = sum(one["rows"] for one in done)
    return Pace(way, number, max(ends) - started, begun - started, rows / (max(ends) - begun))


def _scored(arguments: dict[str, Any], units: list[dict[str, Any]], processes: int, by_actors: bool) -> Iterator[dict[str, Any]]:
    if by_actors:
        resources = ResourcesConfig(actors=processes)
        yield from on_actors(ShardScorer, arguments, units, attempts=RETRIES, resources=resources, what="scoring")
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(processes, initializer=_begin, initargs=(arguments,)) as pool:
        yield from pool.imap_unordered(_next, units)


def _begin(arguments: dict[str, Any]) -> None:
    global _scorer
    _scorer = ShardScorer(**arguments)


def _next(unit: dict[str, Any]) -> dict[str, Any]:
    return _scorer(unit)


_scorer: ShardScorer


def prepare(load: Load, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write a model, a selector that was never fitted, and rows as long as texts are; return what a scorer takes, and its shards."""
    size = SHAPES[load.shape]["vocab_size"]
    tokenizer = word_tokenizer(f"w{number}" for number in range(size - 5))
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[load.shape], max_position_embeddings=load.length))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    adapted = add_lora(model, LoraConfig(), seed=0)
    trained = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    for one in trained.values():
        torch.nn.init.normal_(one, std=0.02)
    checkpoint = checkpoint_name(1)
    save_adapter(adapted, folder / "fit" / "warmup" / checkpoint)
    (folder / "fit" / "directions").mkdir()
    directions = {name: torch.randn(len(DIRECTIONS), *one.shape) for name, one in trained.items()}
    save_file(directions, folder / "fit" / "directions" / f"{checkpoint}.safetensors")

    draw = np.random.default_rng(0)
    # Lengths of texts are about log-normal; the longest are cut, with room for what begins and ends a row.
    lengths = np.clip(np.exp(draw.normal(np.log(0.5 * load.length), 0.6, load.rows)), 8, load.length - 3).astype(int)
    shards = shards_of(load.rows, load.rows * ROW_BYTES)
    rows: list[list[Row]] = [[] for _ in range(shards)]
    for length in lengths:
        words = [f"w{number}" for number in draw.integers(0, size - 5, length)]
        prompt, response = " ".join(words[: length // 2]), " ".join(words[length // 2 :])
        id = row_id(prompt, response)
        rows[shard_of(id, shards)].append(Row(id, prompt, response))
    files = [folder / "rows" / f"part-{number:05d}.parquet" for number in range(shards)]
    for file, some in zip(files, rows, strict=True):
        write_rows(some, file)
    scoring, selector = ScoringConfig(scorers=["pharmacist"]), SelectorConfig(checkpoints=[1])
    spec = ProbeSpec(
        model=ModelRef(str(folder / "model"), template="plain", max_length=load.length),
        fit=str(folder / "fit"),
        checkpoints=(checkpoint,),
        directions=DIRECTIONS,
        method=scoring.method,
        tokens_per_batch=scoring.tokens_per_batch,
        cosine=selector.cosine,
    )
    arguments = {
        "spec": spec,
        "scoring": scoring,
        "selector": selector,
        "out": str(folder / "scores"),
        "threads": 1,
        "trusted": TrustedSets({}, limit=0, seed=0),
    }
    return arguments, [{"shard": str(file), "planted": False} for file in files]


def show(found: Sequence[Pace], load: Load, out: Path | None = None) -> None:
    """Print what was measured, and write it to ``scoring.json`` in a folder."""
    table = Table(
        title=f"{load.rows:,} rows of up to {load.length} tokens, {load.shape}, {load.rounds} rounds", title_justify="left"
    )
    table.add_column("way")
    for heading in ("s", "until all is loaded", "rows/s", "over", "ratio", "floor"):
        table.add_column(heading, justify="right")
    summary = []
    for way in WAYS:
        mine = [one for one in found if one.way == way]
        other, floor = FLOORS.get(way, ("", None))
        ratio = None
        if other:
            rates = {one.round: one.rows_per_s for one in found if one.way == other}
            ratio = statistics.median(one.rows_per_s / rates[one.round] for one in mine)
        medians = [statistics.median(getattr(one, name) for one in mine) for name in ("seconds", "start_s", "rows_per_s")]
        summary.append({"way": way, "over": other, "ratio": ratio, "floor": floor})
        shown = ("" if value is None else f"{value:.3g}" for value in (ratio, floor))
        table.add_row(way, f"{medians[0]:.1f}", f"{medians[1]:.1f}", f"{medians[2]:,.1f}", other, *shown)
    console.print(table)
    if out is not None:
        record = {"load": asdict(load), "scoring": summary, "rounds": [asdict(one) for one in found]}
        write_text(json.dumps(record, indent=1), out / "scoring.json")
        say(f"  written to {escaped(out / 'scoring.json')}")
