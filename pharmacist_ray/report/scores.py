"""How the scores are distributed and what was kept: read in two streaming passes, never all at once.

The first pass finds each score's range, the second counts into fixed bins and holds on to the few rows nearest the top, the cut and
the bottom. In memory are one record batch, `SAMPLE` values per score, and the ids kept of one shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pharmacist_ray.config.scoring import STANDS_FOR
from pharmacist_ray.data.rows import parquet_files
from pharmacist_ray.report.run_files import RunFiles, readable
from pharmacist_ray.storage import StoragePath, opened_parquet, parquet_metadata

BINS = 40
SAMPLE = 1 << 16
"""Values per score from which quantiles are estimated: every n-th row, and rows lie in the order of a hash (ours)."""
EXAMPLES = 3
_BATCH = 1 << 17

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Ids = NDArray[np.bytes_]


@dataclass
class Histogram:
    """The distribution of one score."""

    low: float = np.inf
    high: float = -np.inf
    """Smallest and largest finite score."""
    rows: int = 0
    """Rows with a score; NaN is none."""
    unscored: int = 0
    sample: list[Floats] = field(default_factory=list)
    all: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    kept: NDArray[np.int64] | None = None
    """Per bin; None for every score but the one selected by. The end bins also hold what lies beyond them."""

    @cached_property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile, estimated from the sample."""
        low, middle, high = np.quantile(np.concatenate([*self.sample, np.zeros(0 if self.rows else 1)]), [0.25, 0.5, 0.75])
        return float(low), float(middle), float(high)

    @cached_property
    def edges(self) -> Floats:
        """Bin edges, (BINS + 1,): from the 1st to the 99th percentile and half as far again, but no further than the scores go."""
        values = np.concatenate(self.sample) if self.sample else np.zeros(0)
        if not len(values):
            return np.linspace(0.0, 1.0, BINS + 1)
        low, high = np.quantile(values, [0.01, 0.99])
        room = (high - low) / 2
        low, high = max(self.low, low - room), min(self.high, high + room)
        if not high - low > 1e-12 * max(abs(low), abs(high)):
            low, high = low - 0.5, high + 0.5
        return np.linspace(low, high, BINS + 1)

    def count(self, values: Floats) -> NDArray[np.int64]:
        """Return how many values fall into each bin, (BINS,)."""
        edges = self.edges
        return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


@dataclass
class Extremes:
    """The best and worst few of a stream of rows."""

    best: list[tuple[float, str, str]] = field(default_factory=list)
    """(rank, id, shard), best first; a higher rank is better."""
    worst: list[tuple[float, str, str]] = field(default_factory=list)
    """Worst first."""

    def add(self, ranks: Floats, ids: pa.Array, mask: Mask, shard: str) -> None:
        """Take in the rows of a batch for which the mask is true."""
        places = np.flatnonzero(mask)
        if not len(places):
            return
        few = min(EXAMPLES, len(places))
        inside = ranks[places]
        for name, order in (("best", -inside), ("worst", inside)):
            chosen = places[np.argpartition(order, few - 1)[:few]]
            rows = getattr(self, name) + [(float(ranks[place]), str(ids[int(place)].as_py()), shard) for place in chosen]
            setattr(self, name, sorted(rows, key=lambda row: (-row[0] if name == "best" else row[0], row[1]))[:EXAMPLES])


@dataclass
class Scores:
    """What two passes over the scores found."""

    columns: dict[str, Histogram]
    main: str | None
    """The score that the main selection ranks by; None if it is not made, or is of other scores."""
    descending: bool = True
    kept: Extremes = field(default_factory=Extremes)
    dropped: Extremes = field(default_factory=Extremes)


def read_scores(run: RunFiles) -> Scores | None:
    """Return the distributions of all scores, None if there are none.

    Args:
        run: The run.

    Raises:
        ArtifactError: A file is broken or missing.
    """
    manifest = run.manifest("scores")
    if not manifest:
        return None
    files = parquet_files(run.root / "scores" / "rows")
    arm = run.main_arm
    selection = run.manifest("selections", arm) if arm else {}
    rule = selection.get("rule", {})
    fits = bool(selection) and selection.get("inputs", {}).get("scores") == manifest.get("fingerprint")
    rows, names = 0, list[str]()
    for file in files:
        with readable(file):
            metadata = parquet_metadata(file)
            rows += metadata.num_rows
            names = [name for name in metadata.schema.names if name not in ("id", STANDS_FOR)]
    found = Scores({name: Histogram() for name in names}, rule.get("scorer") if fits else None, rule.get("descending", True))
    if found.main not in found.columns:
        found.main = None
    step = max(1, rows // SAMPLE)
    for file in files:
        for batch in _batches(file, names):
            for name, histogram in found.columns.items():
                _measure(histogram, _values(batch, name), step)
    if found.main:
        main = found.columns[found.main]
        main.kept = np.zeros(BINS, np.int64)
    for file in files:
        chosen = _kept_ids(run.root / "selections" / arm / "rows" / file.name) if found.main and arm else None
        for batch in _batches(file, ["id", *names] if chosen is not None else names):
            for name, histogram in found.columns.items():
                values = _values(batch, name)
                known = ~np.isnan(values)
                histogram.all += histogram.count(values[known])
                if name == found.main and chosen is not None and histogram.kept is not None:
                    mask = _among(_bytes(batch["id"], file), chosen) & known
                    histogram.kept += histogram.count(values[mask])
                    ranks = values if found.descending else -values
                    found.kept.add(ranks, batch["id"], mask, file.name)
                    found.dropped.add(ranks, batch["id"], known & ~mask, file.name)
    return found


def _measure(histogram: Histogram, values: Floats, step: int) -> None:
    known = values[~np.isnan(values)]
    finite = known[np.isfinite(known)]
    histogram.rows += len(known)
    histogram.unscored += len(values) - len(known)
    if len(finite):
        histogram.low = min(histogram.low, float(finite.min()))
        histogram.high = max(histogram.high, float(finite.max()))
        histogram.sample.append(finite[::step].copy())


def _batches(file: StoragePath, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with readable(file), opened_parquet(file) as parquet:
        yield from parquet.iter_batches(_BATCH, columns=columns)


def _values(batch: pa.RecordBatch, name: str) -> Floats:
    return np.asarray(batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def _kept_ids(file: StoragePath) -> Ids:
    """Return the ids of a shard's kept rows, sorted."""
    parts = [_bytes(batch["id"], file) for batch in _batches(file, ["id"])]
    return np.sort(np.concatenate([np.zeros(0, "S32"), *parts]))


def _bytes(ids: pa.Array, file: StoragePath) -> Ids:
    with readable(file):  # ids of another length are none of ours
        fixed = ids.cast(pa.binary()).cast(pa.binary(32))
    return np.frombuffer(fixed.buffers()[1], "S32")[fixed.offset : fixed.offset + len(fixed)]


def _among(ids: Ids, chosen: Ids) -> Mask:
    """Return which ids are among the chosen ones, (n,); Arrow's own look-up would index the chosen ones anew for each batch."""
    if not len(chosen):
        return np.zeros(len(ids), np.bool_)
    place = np.minimum(np.searchsorted(chosen, ids), len(chosen) - 1)
    return np.asarray(chosen[place] == ids)
