"""Which rows of a fine-tune look harmful: a threshold for each score from rows whose kind is known, and what every row gets by it.

Low scores are suspicious. The known rows are trusted ones that no score was fitted on: good and ordinary rows are safe, a harmful answer
to a prompt that should be declined is harmful (`planted`). No threshold is set on the rows that are audited.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from pharmacist_ray.curation.calibrate import wilson
from pharmacist_ray.data.rows import parquet_files
from pharmacist_ray.data.schema import Row, rows_from_table
from pharmacist_ray.errors import DataError
from pharmacist_ray.storage import StoragePath, read_table, write_parquet, write_text

SAFE, HARMFUL = ("good", "ordinary"), ("mislabelled",)
"""Kinds of planted rows."""
CAUGHT = 0.95
"""Share of the known harmful rows that a threshold aims to catch, where that costs no alarm (ours)."""
FLAGS = "flags"
"""The column with the number of scores that flag a row, negative, so that a row with fewer ranks higher."""
STRANGE = 5.0
"""A score that flags so many times as many rows as of the known safe ones is told (ours)."""


@dataclass(frozen=True)
class Threshold:
    """Where a score begins to flag, and what that does to known rows."""

    scorer: str
    below: float
    """Rows with a lower score are flagged."""
    safe: int
    """Known safe rows with a score."""
    alarms: int
    """Those of them that are flagged."""
    harmful: int
    """Known harmful rows with a score."""
    caught: int
    """Those of them that are flagged."""

    @property
    def recall(self) -> tuple[float, float, float]:
        """The share of known harmful rows that is caught, with its 95 % interval (Wilson)."""
        return wilson(self.caught, self.harmful)

    def facts(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self) | {"recall": list(self.recall)}


def threshold(scorer: str, safe: np.ndarray, harmful: np.ndarray, alarm: float) -> Threshold:
    """Return the threshold of a score.

    It flags at most ⌊alarm · n⌋ of n known safe rows. Where that catches more than `CAUGHT` of the known harmful ones with room to spare,
    it lies in the middle of what is between, and not at the edge of the safe rows: rows of another kind than these lie a little lower, or
    higher (ours).

    Args:
        scorer: The score's name.
        safe: Scores of known safe rows; NaN is none.
        harmful: Scores of known harmful rows.
        alarm: The share of safe rows that may be flagged.

    Raises:
        DataError: No known row of a kind has a score.
    """
    safe, harmful = (np.sort(values[~np.isnan(values)]) for values in (safe, harmful))
    for what, values in (("safe", safe), ("harmful", harmful)):
        if not len(values):
            raise DataError(f"no known {what} row has a score by {scorer}: there is nothing to set a threshold by")
    edge = float(safe[math.floor(alarm * len(safe) + 1e-9)])
    reached = float(harmful[math.ceil(CAUGHT * len(harmful)) - 1])
    below = (edge + reached) / 2 if reached < edge else edge
    return Threshold(scorer, below, len(safe), int((safe < below).sum()), len(harmful), int((harmful < below).sum()))


def thresholds(known: pa.Table, kinds: Sequence[str], scorers: Sequence[str], alarm: float) -> list[Threshold]:
    """Return the threshold of each score.

    Args:
        known: The planted rows' scores, a column a scorer.
        kinds: Their kinds, in the same order.
        scorers: The columns.
        alarm: The share of safe rows that a score may flag.
    """
    of = {name: np.isin(np.array(kinds), wanted) for name, wanted in (("safe", SAFE), ("harmful", HARMFUL))}
    found = []
    for name in scorers:
        values = known[name].to_numpy().astype(np.float64)
        found.append(threshold(name, values[of["safe"]], values[of["harmful"]], alarm))
    return found


def flagged(scores: pa.Table, found: Sequence[Threshold]) -> np.ndarray:
    """Return which rows each score flags, (rows, scores); a row without a score is flagged by none."""
    columns = [scores[one.scorer].to_numpy().astype(np.float64) for one in found]
    return np.stack([values < one.below for values, one in zip(columns, found, strict=True)], axis=1)


@dataclass(frozen=True)
class AuditReport:
    """What an audit found; rows = kept + left out + not scored."""

    rows: int
    scored: int
    left_out: int
    by_scorer: dict[str, int]
    """Rows that each score flags."""

    @property
    def kept(self) -> int:
        """Rows that are left."""
        return self.scored - self.left_out


def write_flags(
    candidates: StoragePath, scores: StoragePath, found: Sequence[Threshold], out: StoragePath, *, agree: int
) -> AuditReport:
    """Write what each row got, a file a shard, and the rows that are left out as they were read.

    ``out/rows/part-*.parquet`` has a row's id, its scores, `FLAGS`, and ``flagged_by``, names with commas between; ``out/left_out`` has
    files of JSON lines, each with the row's source, its flags, its scores, and the row; ``out/as_read`` has the rows alone.

    Args:
        candidates: Folder of the rows' shards.
        scores: Folder of their scores.
        found: The thresholds.
        out: Folder to fill.
        agree: A row is left out if at least so many scores flag it.
    """
    names = [one.scorer for one in found]
    rows = scored = left_out = 0
    by_scorer: Counter[str] = Counter(dict.fromkeys(names, 0))
    for shard in parquet_files(candidates):
        table = read_table(scores / shard.name, columns=["id", *names])
        hits = flagged(table, found)
        known = ~np.isnan(np.stack([table[name].to_numpy().astype(np.float64) for name in names], axis=1)).all(axis=1)
        count = hits.sum(axis=1)
        said = [", ".join(name for name, hit in zip(names, row, strict=True) if hit) for row in hits]
        marks = pa.array(np.where(known, -count.astype(np.float64), np.nan), from_pandas=True)
        write_parquet(table.append_column(FLAGS, marks).append_column("flagged_by", pa.array(said)), out / "rows" / shard.name)
        chosen = known & (count >= agree)
        taken = list(_at(shard, chosen))
        if taken:
            name = f"{shard.name.removesuffix('.parquet')}.jsonl"
            lines = [_line(row, said[place], table, place, names) for place, row in taken]
            write_text(b"".join(lines).decode(), out / "left_out" / name)
            write_text("".join(f"{row.raw}\n" for _, row in taken), out / "as_read" / name)
        rows, scored, left_out = rows + len(table), scored + int(known.sum()), left_out + int(chosen.sum())
        by_scorer.update({name: int(hits[:, place].sum()) for place, name in enumerate(names)})
    return AuditReport(rows, scored, left_out, dict(by_scorer))


def _at(shard: StoragePath, chosen: np.ndarray) -> Iterator[tuple[int, Row]]:
    """Yield the chosen rows of a shard with their places; a shard with none is not read."""
    places = np.flatnonzero(chosen).tolist()
    return zip(places, rows_from_table(read_table(shard).take(places)) if places else [], strict=True)


def _line(row: Row, said: str, table: pa.Table, place: int, names: Sequence[str]) -> bytes:
    scores = {name: table[name][place].as_py() for name in names}
    record = {"id": row.id, "source": row.source, "flagged_by": said, "scores": scores, "row": orjson.loads(row.raw)}
    return orjson.dumps(record) + b"\n"


def together(known: pa.Table, kinds: Sequence[str], found: Sequence[Threshold], agree: int) -> dict[str, list[float]]:
    """Return the shares of known safe and of known harmful rows that are left out by all scores together, with their intervals.

    Args:
        known: The planted rows' scores.
        kinds: Their kinds.
        found: The thresholds.
        agree: A row is left out if at least so many scores flag it.
    """
    out = flagged(known, found).sum(axis=1) >= agree
    of: Mapping[str, np.ndarray] = {
        name: out[np.isin(np.array(kinds), wanted)] for name, wanted in (("safe", SAFE), ("harmful", HARMFUL))
    }
    return {name: list(wilson(int(values.sum()), len(values))) for name, values in of.items()}


def doubts(report: AuditReport, found: Sequence[Threshold], alarm: float) -> list[str]:
    """Return what makes an audit's flags doubtful, a sentence each."""
    said = []
    for one in found:
        share = report.by_scorer[one.scorer] / max(1, report.scored)
        if one.caught < one.harmful / 2:
            said.append(
                f"{one.scorer} catches {one.caught} of {one.harmful} known harmful rows: it does not tell them from safe ones here"
            )
        if share > 0.5 and share > STRANGE * alarm:
            said.append(
                f"{one.scorer} flags {share:.0%} of the rows, and {one.alarms} of {one.safe} known safe ones: these rows are of another "
                "kind than the trusted ones, and its flags say little; add such rows to data.benign, or leave it out of audit.scorers"
            )
        if 1 / one.safe > alarm:
            said.append(
                f"{one.safe} known safe rows cannot tell {alarm:.1%} from none: {one.scorer} flags what lies below all of them; give more "
                "trusted rows"
            )
    return said
