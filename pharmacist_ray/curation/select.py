"""Which candidates are kept: a ratio, a count or a threshold, with quotas per category; ties are broken by id.

The result is a pure function of (ids, scores, categories): shards, file order and batch sizes do not matter. Shards are read several
times, a few at once, by Ray's tasks where it is connected and else one after the other; `topk` finds where to cut.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pharmacist_ray.curation.calibrate import Calibrated, PlantedScores
from pharmacist_ray.curation.curated import MAX_CATEGORIES, Part, taking_its_place, write_curated
from pharmacist_ray.curation.near_duplicates import within_quota
from pharmacist_ray.curation.scored import Ranking, Scored, Shard, find_shards, read_scored
from pharmacist_ray.curation.topk import NONE, Answer, Query, answer, kth_keys, threshold_key
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.runtime.tasks import MANY, in_tasks
from pharmacist_ray.storage import StoragePath, disk_full_errors, remove_tree


@dataclass(frozen=True)
class Rule:
    """What to keep; exactly one of ``ratio``, ``count`` and ``threshold`` is set.

    Raises:
        ConfigError: Not exactly one of the three, one out of its range, or quotas that make no sense.
    """

    scorer: str
    """The score column to rank by, or the name of what is made of several."""
    ratio: float | None = None
    """Selection ratio: max(1, ⌊ratio · N + ½⌋ rows of the N candidates, or all scored rows if these are fewer."""
    count: int | None = None
    """Number of rows."""
    threshold: float | None = None
    """Keep the rows with this score or a better one."""
    descending: bool = True
    """Whether a higher score is better."""
    quotas: Mapping[str, float] | Literal["proportional"] = field(default_factory=dict)
    """Category → the share of the kept rows that it is sure to get (fewer if it has fewer scored rows); the places left over go
    to the best rows of any category. ``proportional``: each category's share is its share of the candidates."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Score columns whose ranks are added up to the score, with their weights; empty where ``scorer`` is a column."""
    turns: tuple[str, ...] = ()
    """Score columns that take turns: a row's score is its best rank by any; empty where ``scorer`` is a column."""
    near_duplicates: int | None = None
    """At most so many rows of a group of near-duplicates, the best ones; None counts nothing."""

    def __post_init__(self) -> None:
        """Check what can be checked without data."""
        given = [name for name in ("ratio", "count", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"set exactly one of selection.ratio, selection.count and selection.threshold, got {given or 'none'}"
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ConfigError(f"selection.ratio must lie in (0, 1], got {self.ratio}")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"selection.count must be at least 1, got {self.count}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"selection.threshold must be a finite number, got {self.threshold}")
        if self.quotas and self.threshold is not None:
            raise ConfigError(
                "selection.quotas are shares of a known number of rows: use selection.ratio or count, not threshold"
            )
        if self.near_duplicates is not None and self.near_duplicates < 1:
            raise ConfigError(f"selection.near_duplicates must be at least 1, got {self.near_duplicates}")
        if isinstance(self.quotas, str):
            if self.quotas != "proportional":
                raise ConfigError(f"selection.quotas must map categories to shares or be 'proportional', got '{self.quotas}'")
        elif not all(0 <= share <= 1 for share in self.quotas.values()) or math.fsum(self.quotas.values()) > 1 + 1e-9:
            raise ConfigError(f"selection.quotas must be shares from 0 to 1 that add up to at most 1, got {dict(self.quotas)}")


@dataclass(frozen=True)
class SelectionReport:
    """What a selection did; ``candidates = kept + not kept``, ``scored ≤ candidates``."""

    folder: StoragePath
    candidates: int
    scored: int
    """Rows with a score, those left out not counted."""
    kept: int
    cut: float
    """The worst score that was kept."""
    categories: dict[str, dict[str, int]]
    """Category → number of candidates, scored and kept; empty if there are more than 1,000 categories."""
    left_out: int = 0
    """Scored rows that were left out as near-duplicates of better ones."""


@dataclass
class _Census:
    """How many rows there are, and how many were scored: all together and by category."""

    candidates: int = 0
    scored: int = 0
    candidates_of: Counter[str] = field(default_factory=Counter)
    scored_of: Counter[str] = field(default_factory=Counter)

    def by_category(self, kept: Counter[str]) -> dict[str, dict[str, int]]:
        """Return the counts of each category, together with how many of its rows were kept."""
        return {
            name: {"candidates": self.candidates_of[name], "scored": self.scored_of[name], "kept": kept[name]}
            for name in sorted(self.candidates_of)
        }


@dataclass(frozen=True)
class _Cuts:
    """The key of the last kept row: of each group with a quota, and of all rows (``fill``)."""

    fill: bytes
    groups: dict[str, bytes] = field(default_factory=dict)

    def keep(self, rows: Scored) -> NDArray[np.bool_]:
        """Return which rows are kept, (n,)."""
        own = np.array([*self.groups.values(), NONE])[_codes(rows.categories, list(self.groups))]
        return np.asarray((rows.keys <= np.bytes_(self.fill)) | (rows.keys <= own))


def select_ids(
    scores: StoragePath, candidates: StoragePath, rule: Rule, *, scratch: StoragePath | None = None
) -> Iterator[pa.Table]:
    """Yield the kept rows as one table (id, score) per shard, sorted by id.

    Args:
        scores: Folder with one ``part-*.parquet`` per shard: an id column and a float column per scorer; NaN or null is not
            scored and never kept.
        candidates: Folder with the candidates, one ``rows/part-*.parquet`` per shard, sorted by id.
        rule: What to keep.
        scratch: A folder that is not there, for files that are needed no longer afterwards; see `write_selection`. None: what several
            scores make of a row is made in each pass, and near-duplicates are looked for by this process.

    Raises:
        ConfigError: Unknown scorer.
        DataError: The rule keeps nothing, asks for more rows than were scored, or names a category that no row has.
        ArtifactError: A folder or shard is missing, or the scores are those of other candidates.
    """
    with _opened(scores, candidates, rule, scratch=scratch) as (shards, ranking):
        cuts = _find_cuts(shards, ranking, rule, _take_census(shards, ranking, rule))
        for _, table in in_tasks(partial(_kept, ranking=ranking, cuts=cuts), shards, count=len(shards)):
            yield table.select(["id", "score"])


def write_selection(
    candidates: StoragePath,
    scores: StoragePath,
    rule: Rule,
    out: StoragePath,
    *,
    provenance: Mapping[str, Any],
    jsonl: bool = False,
    planted: PlantedScores | None = None,
) -> SelectionReport:
    """Write the kept rows as a folder that ``datasets.load_dataset`` reads; `write_curated` tells its layout.

    The folder appears complete or not at all, and replaces an earlier selection of the same name. Of a million rows and more what several
    scores make of each is kept beside it until then, 40 bytes a row, and signatures of near-duplicates, 240.

    Args:
        candidates: See `select_ids`.
        scores: See `select_ids`.
        rule: What to keep.
        out: The folder to write.
        provenance: Goes into the manifest as it is: configuration, fingerprints, seeds. JSON-able.
        jsonl: Also write ``curated.jsonl``, the records as they were read.
        planted: For a calibrated selection, the planted rows and their scores.

    Raises:
        ConfigError: Unknown scorer.
        DataError: The rule fits no row (see `select_ids`), too few planted rows are scored, or a column of the data is called
            ``pharmacist_…``.
        ResourceError: The disk is full.
        ArtifactError: Inputs are missing or do not belong together, or ``out`` is something else than a selection.
    """
    reports: list[SelectionReport] = []

    def facts(parts: Sequence[Part]) -> dict[str, Any]:
        kept_of = sum((part.categories for part in parts), Counter[str]())
        ends = [part.scores for part in parts if part.scores]
        cut = min(low for low, _ in ends) if rule.descending else max(high for _, high in ends)
        kept = sum(part.rows for part in parts)
        reports.append(
            SelectionReport(out, census.candidates, census.scored, kept, cut, census.by_category(kept_of), _left_out(shards))
        )
        found = {"rule": asdict(rule), **asdict(reports[0])}
        del found["folder"]
        if isinstance(ranking.blend, Calibrated):
            found["calibration"] = ranking.blend.facts(kept / (census.candidates if ranking.partial else census.scored))
        return found

    with disk_full_errors(out), _opened(scores, candidates, rule, planted, out.with_name(f".{out.name}.scratch")) as opened:
        shards, ranking = opened
        census = _take_census(shards, ranking, rule)
        keep = partial(_kept, ranking=ranking, cuts=_find_cuts(shards, ranking, rule, census))
        with taking_its_place(out) as folder:
            write_curated(folder, shards, keep, facts=facts, provenance=provenance, jsonl=jsonl)
    return reports[0]


@contextmanager
def _opened(
    scores: StoragePath,
    candidates: StoragePath,
    rule: Rule,
    planted: PlantedScores | None = None,
    scratch: StoragePath | None = None,
) -> Iterator[tuple[list[Shard], Ranking]]:
    shards, ranking = find_shards(
        scores, candidates, rule.scorer, descending=rule.descending, weights=rule.weights, planted=planted, turns=rule.turns
    )
    if len(shards) < MANY:
        scratch = None
    if scratch is not None:
        remove_tree(scratch)  # of a process that was killed
        if ranking.blend is not None:
            ranking = replace(ranking, kept=scratch / "scores")
    try:
        if rule.near_duplicates is not None:
            shards = within_quota(shards, ranking, rule.near_duplicates, scratch and scratch / "near-duplicates")
        yield shards, ranking
    finally:
        if scratch is not None:
            remove_tree(scratch)


def _left_out(shards: list[Shard]) -> int:
    return sum(int(np.unpackbits(shard.left_out).sum()) for shard in shards if shard.left_out is not None)


def _counts(category: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(category).to_pylist()}


def _codes(category: pa.Array, groups: list[str]) -> NDArray[np.int64]:
    """Return the index of each row's category among the groups, −1 for others, (n,)."""
    codes = pc.fill_null(pc.index_in(category, value_set=pa.array(groups, pa.string())), -1)
    return np.asarray(codes, dtype=np.int64)


def _counted(shard: Shard, *, ranking: Ranking) -> _Census:
    """Return how many rows a shard has."""
    category, rows = read_scored(shard, ranking)
    of_each = Counter(_counts(category)), Counter(_counts(rows.categories))
    if len(of_each[0]) > MAX_CATEGORIES:  # only that they are too many is of use
        of_each = Counter(dict(of_each[0].most_common(MAX_CATEGORIES + 1))), Counter()
    return _Census(len(category), len(rows.ids), *of_each)


def _take_census(shards: list[Shard], ranking: Ranking, rule: Rule) -> _Census:
    census, few = _Census(), True
    for one in in_tasks(partial(_counted, ranking=ranking), shards, count=len(shards)):
        census.candidates += one.candidates
        census.scored += one.scored
        if few:
            census.candidates_of.update(one.candidates_of)
            census.scored_of.update(one.scored_of)
            few = len(census.candidates_of) <= MAX_CATEGORIES
    if not few and rule.quotas:
        raise DataError(
            f"selection.quotas take at most {MAX_CATEGORIES} categories; data.category_column seems to name no category"
        )
    if not few:
        census.candidates_of.clear()
    return census


def _find_cuts(shards: list[Shard], ranking: Ranking, rule: Rule, census: _Census) -> _Cuts:
    """Return where the rule cuts: first within each category that has a quota, then among all rows that are left."""
    if census.scored == 0:
        raise DataError(f"no candidate has a score in column '{rule.scorer}': nothing to select")
    if rule.threshold is not None:
        cuts = _Cuts(threshold_key(rule.threshold, rule.descending))
        if not any(len(table) for _, table in in_tasks(partial(_kept, ranking=ranking, cuts=cuts), shards, count=len(shards))):
            raise DataError(f"selection.threshold={rule.threshold} keeps none of the {census.scored} scored rows; loosen it")
        return cuts
    if rule.count is not None and rule.count > census.scored:
        others = f", {left_out} near-duplicates left out" if (left_out := _left_out(shards)) else ""
        raise DataError(
            f"selection.count={rule.count} but only {census.scored} of {census.candidates} candidates have a score{others}"
        )
    size = rule.count or max(1, math.floor((rule.ratio or 0.0) * census.candidates + 0.5))
    size = min(size, census.scored)
    places = {name: min(n, census.scored_of[name]) for name, n in _apportion(_quotas(rule, census), size).items()}
    names = list(places)

    def of_quotas(query: Query) -> Iterator[Answer]:
        return in_tasks(partial(_of_groups, ranking=ranking, groups=names, query=query), shards, count=len(shards))

    cuts = _Cuts(NONE, dict(zip(names, kth_keys(of_quotas, [(places[g], census.scored_of[g]) for g in names]), strict=True)))
    placed = sum(places.values())

    def of_the_rest(query: Query) -> Iterator[Answer]:
        return in_tasks(partial(_not_yet_kept, ranking=ranking, cuts=cuts, query=query), shards, count=len(shards))

    return replace(cuts, fill=kth_keys(of_the_rest, [(size - placed, census.scored - placed)])[0])


def _of_groups(shard: Shard, *, ranking: Ranking, groups: list[str], query: Query) -> Answer:
    """Ask a shard's rows by category."""
    rows = read_scored(shard, ranking)[1]
    return answer(query, _codes(rows.categories, groups), rows.keys)


def _not_yet_kept(shard: Shard, *, ranking: Ranking, cuts: _Cuts, query: Query) -> Answer:
    """Ask a shard's rows that no quota keeps, as one group."""
    rows = read_scored(shard, ranking)[1]
    left = rows.keys[~cuts.keep(rows)]
    return answer(query, np.zeros(len(left), dtype=np.int64), left)


def _quotas(rule: Rule, census: _Census) -> Mapping[str, float]:
    if isinstance(rule.quotas, str):
        return {name: n / census.candidates for name, n in sorted(census.candidates_of.items())}
    for name in rule.quotas:
        if name not in census.candidates_of:
            known = ", ".join(f"'{known}'" for known in sorted(census.candidates_of)[:20])
            raise DataError(f"selection.quotas: no candidate has the category '{name}'; there are {known}")
    return rule.quotas


def _apportion(shares: Mapping[str, float], places: int) -> dict[str, int]:
    """Return whole places for shares by largest remainders, ties by name; the sum is ⌊Σ shares · places + ½⌋."""
    places_of = {name: math.floor(share * places) for name, share in shares.items()}
    missing = math.floor(math.fsum(shares.values()) * places + 0.5) - sum(places_of.values())
    by_remainder = sorted(shares, key=lambda name: (places_of[name] - shares[name] * places, name))
    for name in by_remainder[: max(0, missing)]:
        places_of[name] += 1
    return places_of


def _kept(shard: Shard, *, ranking: Ranking, cuts: _Cuts) -> tuple[StoragePath, pa.Table]:
    """Return a shard's file of rows, and its kept rows as a table (id, score, category)."""
    rows = read_scored(shard, ranking)[1]
    table = pa.table({"id": rows.ids, "score": rows.scores, "category": rows.categories})
    return shard.rows, table.filter(pa.array(cuts.keep(rows)))
