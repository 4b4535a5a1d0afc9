"""Score candidates by a cascade: a proxy has scored all, the large model scores a random sample and what the proxy ranks highest.

    sample/    rows drawn at random, and the large model's scores of them
    cuts.json  for each arm how far down the proxy's ranking rows are passed on; chosen by the sample (see `curation.missed`)
    passed/    the other rows down to there, in any arm's ranking, and the large model's scores of them
    text/      of all rows the scores that need no model
    rows/      all put together, shard by shard: what selections read

Everything but the last lies in ``cascade/`` beside it, and is scored as any folder of candidates is, by `curation.score`: so a shard is
the unit here too, whoever scores it, rows that cannot be scored are found and put aside, and what is there is not done again. The cuts are
written down once, so that all shards go by the same, also where scores come out a little different when they are made anew.

A row that the large model never saw has null in every score that needs a model, so no selection by those can take it, and its text
scores. A quarantined row has null in all. The column `stands_for` tells them apart: 0 is never seen. It also says how many candidates a
seen row stands for, by which ranks among seen rows are ranks among all.

A row that the proxy cannot score is passed on. The driver holds the keys of the sample, 40 bytes a row and arm twice.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pharmacist_ray.config.schema import ProxyConfig, ScoringConfig, SelectorConfig
from pharmacist_ray.config.scoring import CALIBRATED, STANDS_FOR
from pharmacist_ray.curation.calibrate import PlantedScores, calibration_columns
from pharmacist_ray.curation.missed import LEVEL, lost, lowest_taken
from pharmacist_ray.curation.passing import WORST, Passing, Sample, keys_in
from pharmacist_ray.curation.score import ScoreReport, planted_scores
from pharmacist_ray.curation.scored import Ranking, Shard, find_shards, read_scored
from pharmacist_ray.curation.scorers import SCORERS, columns_of
from pharmacist_ray.curation.select import Rule
from pharmacist_ray.curation.topk import Answer, Keys, Query, answer, kth_keys
from pharmacist_ray.data.rows import count_rows, parquet_files
from pharmacist_ray.data.schema import ROW_SCHEMA
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.runtime.tasks import in_tasks
from pharmacist_ray.storage import StoragePath, json_of, matching, read_table, row_count, write_parquet, write_text

MEMBERS = 200
"""Of the large model's top rows, so many are expected in a sample whose size is not given: the loss is then known to about ±0.02 (ours)."""

FOLDER = "cascade"
"""Beside the folder of scores, what they are put together from; of no use when they are."""


@dataclass(frozen=True)
class Cascade:
    """What a cascade works on; see `score_by_cascade`."""

    scoring: ScoringConfig
    selector: SelectorConfig
    candidates: StoragePath
    proxy: StoragePath
    rules: Mapping[str, Rule]
    planted: StoragePath | None
    out: StoragePath

    @property
    def settings(self) -> ProxyConfig:
        """The proxy's section."""
        assert self.scoring.proxy is not None
        return self.scoring.proxy

    @property
    def work(self) -> StoragePath:
        """The folder with what the scores are put together from."""
        return self.out.with_name(FOLDER)

    @property
    def of_text(self) -> list[str]:
        """The scorers that need no model."""
        return [name for name in self.scoring.scorers if name == "random" or not SCORERS[name].needs_model]

    def rankings(self, scores: StoragePath, candidates: StoragePath) -> tuple[list[Shard], dict[str, Ranking]]:
        """Return shards, and how each arm ranks them by some scores."""
        found, shards = dict[str, Ranking](), list[Shard]()
        for arm, rule in self.rules.items():
            planted = None
            if arm == CALIBRATED and self.planted is not None:
                planted = PlantedScores(self.planted, planted_scores(scores), calibration_columns(self.scoring.scorers))
            shards, found[arm] = find_shards(
                scores, candidates, rule.scorer, weights=rule.weights, turns=rule.turns, planted=planted
            )
        return shards, found


def score_by_cascade(
    score: Callable[..., ScoreReport],
    *,
    scoring: ScoringConfig,
    selector: SelectorConfig,
    candidates: StoragePath,
    proxy: StoragePath,
    rules: Mapping[str, Rule],
    planted: StoragePath | None,
    out: StoragePath,
    progress: Callable[[str], AbstractContextManager[Callable[..., None]]],
) -> tuple[ScoreReport, dict[str, Any]]:
    """Write ``out/part-*.parquet`` as `curation.score.score` does, with the column `STANDS_FOR`; return what was done and what is lost.

    Args:
        score: `curation.score.score` with all of its arguments but those that differ from pass to pass.
        scoring: The scoring section; with a proxy.
        selector: The selector's section.
        candidates: Folder with the candidates' ``rows``.
        proxy: Folder of the proxy's scores of all of them.
        rules: The selections that are to be made by scores which need the model: arm → rule, each a ratio or a count.
        planted: Folder of planted rows, for a calibrated selection.
        out: Folder to fill.
        progress: Gives what is called with (shards done, shards in all) while a pass of that name goes on.

    Raises:
        ArtifactError: The proxy's scores are not those of these candidates, or what was written is not complete.
        PharmacistError: What `curation.score.score` raises.
    """
    started = time.perf_counter()
    one = Cascade(scoring, selector, candidates, proxy, rules, planted, out)
    work, shards, total = one.work, parquet_files(candidates / "rows"), count_rows(candidates / "rows")
    plain = scoring.model_copy(update={"proxy": None})
    wanted = max(_wanted(rule, total) for rule in rules.values())
    rows = one.settings.sample or math.ceil(MEMBERS * total / wanted)
    sample = Sample(one.settings.seed, min(1.0, rows / max(1, total)))

    def scored(part: str, name: str, rows: StoragePath, by: ScoringConfig, **more: Any) -> ScoreReport:
        with progress(f"score: {name} (shards)") as show:
            return score(candidates=rows, scoring=by, out=work / part / "scores", progress=show, **more)

    def write(part: str, make: Callable[[StoragePath], None]) -> None:
        todo = _missing(shards, work / part / "rows")
        for _ in in_tasks(make, todo, count=len(todo)):
            pass

    write("sample", partial(_draw, out=work / "sample" / "rows", sample=sample))
    drawn = scored("sample", "the sample", work / "sample" / "rows", plain, planted=planted)
    of_proxy, rankings = one.rankings(proxy, candidates)
    passing = Passing(proxy, rankings, _cuts(one, of_proxy, rankings, total))
    write("passed", partial(_pass_on, out=work / "passed" / "rows", sample=sample, passing=passing))
    passed = scored("passed", "what is passed on", work / "passed" / "rows", plain)
    if one.of_text:
        text = plain.model_copy(update={"scorers": one.of_text})
        scored("text", "all by text", candidates / "rows", text)
    _, ids, _, of_sample = _read_sample(one, passing, work / "sample" / "scores", work / "sample")
    inside = passing.inside(of_sample)
    rest = ids.filter(pa.array(~inside))
    outside = total - passed.rows - int(inside.sum())
    weight = outside / max(1, len(rest))
    todo = _missing(shards, out)
    for _ in in_tasks(partial(_put_together, one=one, passing=passing, weight=weight), todo, count=len(todo)):
        pass
    for file in matching(planted_scores(work / "sample" / "scores"), "*.parquet"):
        write_parquet(read_table(file), planted_scores(out) / file.name)
    seen = drawn.rows + passed.rows
    reasons = Counter(drawn.reasons) + Counter(passed.reasons)
    _check_complete(one, shards, total, seen, reasons.total())
    facts = {
        "candidates": total,
        "sampled": drawn.rows,
        "passed_on": total - outside,
        "seen": seen,
        "miss": one.settings.miss,
        "level": LEVEL,
        "arms": _losses(one, passing, rest, outside),
    }
    usage = {name: max(report.usage.get(name, 0) for report in (drawn, passed)) for name in drawn.usage | passed.usage}
    columns, seconds = columns_of(scoring, selector), time.perf_counter() - started
    return ScoreReport(total, len(shards), columns, seconds, reasons.total(), dict(reasons), usage), facts


def _wanted(rule: Rule, total: int) -> int:
    return min(total, rule.count or max(1, math.floor((rule.ratio or 0.0) * total + 0.5)))


def _members(wanted: int, drawn: int, total: int) -> int:
    """Return how many rows of a sample are its top rows."""
    return min(drawn, math.ceil(wanted * drawn / max(1, total)))


def _missing(shards: Sequence[StoragePath], out: StoragePath) -> list[StoragePath]:
    out.mkdir(parents=True, exist_ok=True)
    there = {file.name for file in out.glob("*.parquet")}
    return [shard for shard in shards if shard.name not in there]


def _draw(shard: StoragePath, *, out: StoragePath, sample: Sample) -> None:
    """Write the rows of a shard that are drawn."""
    ids = read_table(shard, columns=["id"])["id"].combine_chunks()
    _write_rows(shard, ids.filter(pa.array(sample.has(ids))), out)


def _pass_on(shard: StoragePath, *, out: StoragePath, sample: Sample, passing: Passing) -> None:
    """Write the rows of a shard that are passed on, and not in the sample."""
    ids = read_table(shard, columns=["id"])["id"].combine_chunks()
    _write_rows(shard, ids.filter(pa.array(passing.inside(passing.keys(shard, ids)) & ~sample.has(ids))), out)


def _write_rows(shard: StoragePath, ids: pa.Array, out: StoragePath) -> None:
    write_parquet(read_table(shard, schema=ROW_SCHEMA, filters=pc.field("id").isin(ids)), out / shard.name)


def _read_sample(
    one: Cascade, passing: Passing, scores: StoragePath, candidates: StoragePath
) -> tuple[list[Shard], pa.Array, list[Keys], list[Keys]]:
    """Return shards of the large model's scores, the ids of the sample, and each arm's keys of them by the large model and by the proxy.

    Args:
        one: The cascade.
        passing: The proxy's rankings.
        scores: The large model's scores, of the sample or of all.
        candidates: Folder with the ``rows`` that these are of.
    """
    shards, rankings = one.rankings(scores, candidates)
    found = list(in_tasks(partial(_keys_of_sample, one=one, passing=passing, rankings=rankings), shards, count=len(shards)))
    ids = pa.concat_arrays([ids for ids, _, _ in found])
    sides = [[np.concatenate(parts) for parts in zip(*(part[side] for part in found), strict=True)] for side in (1, 2)]
    return shards, ids, sides[0], sides[1]


def _keys_of_sample(
    shard: Shard, *, one: Cascade, passing: Passing, rankings: Mapping[str, Ranking]
) -> tuple[pa.Array, list[Keys], list[Keys]]:
    name = shard.rows.name
    ids = read_table(one.work / "sample" / "rows" / name, columns=["id"])["id"].combine_chunks()
    large = [keys_in(shard, ranking, ids, WORST) for ranking in rankings.values()]
    return ids, large, passing.keys(one.candidates / "rows" / name, ids)


def _cuts(one: Cascade, shards: list[Shard], rankings: Mapping[str, Ranking], total: int) -> dict[str, bytes]:
    """Return for each arm the last key of the proxy's ranking that is passed on; chosen once."""
    file = one.work / "cuts.json"
    if file.exists():
        return {arm: bytes.fromhex(cut) for arm, cut in json_of(file).items()}
    unchosen = Passing(one.proxy, rankings, dict.fromkeys(rankings, WORST))
    _, ids, large, of_proxy = _read_sample(one, unchosen, one.work / "sample" / "scores", one.work / "sample")
    cuts = {}
    for (arm, ranking), by_model, by_proxy in zip(rankings.items(), large, of_proxy, strict=True):
        wanted = _wanted(one.rules[arm], total)
        members = _members(wanted, len(ids), total)
        top = np.sort(by_proxy[np.argsort(by_model)[:members]])
        taken = lowest_taken(wanted, members, one.settings.miss)
        # As many as are kept have to be seen, whatever the sample says.
        cuts[arm] = max(bytes(top[-taken]), _kth(shards, ranking, wanted)) if taken else WORST
    write_text(json.dumps({arm: cut.hex() for arm, cut in cuts.items()}, indent=1), file)
    return cuts


def _kth(shards: list[Shard], ranking: Ranking, wanted: int) -> bytes:
    """Return the key of the k-th best row; behind all where there are fewer."""
    scored = sum(in_tasks(partial(_count, ranking=ranking), shards, count=len(shards)))

    def ask(query: Query) -> Any:
        return in_tasks(partial(_asked, ranking=ranking, query=query), shards, count=len(shards))

    return kth_keys(ask, [(wanted, scored)])[0] if wanted < scored else WORST


def _count(shard: Shard, *, ranking: Ranking) -> int:
    return len(read_scored(shard, ranking)[1].ids)


def _asked(shard: Shard, *, ranking: Ranking, query: Query) -> Answer:
    keys = read_scored(shard, ranking)[1].keys
    return answer(query, np.zeros(len(keys), dtype=np.int64), keys)


def _put_together(shard: StoragePath, *, one: Cascade, passing: Passing, weight: float) -> None:
    """Write a shard's scores, and the rows of it that cannot be scored."""
    ids = read_table(shard, columns=["id"])["id"].combine_chunks()
    drawn, passed = (read_table(one.work / part / "scores" / shard.name) for part in ("sample", "passed"))
    both = pa.concat_tables([drawn, passed])
    place = pc.index_in(ids, value_set=both["id"].combine_chunks())
    seen = pc.is_valid(place)
    text = read_table(one.work / "text" / "scores" / shard.name) if one.of_text else None
    table = {"id": ids}
    for column in columns_of(one.scoring, one.selector):
        values = both[column].combine_chunks().take(place)
        if text is not None and column in text.column_names:
            values = pc.if_else(seen, values, text[column].combine_chunks())
        table[column] = values
    mine = drawn["id"].combine_chunks()
    sampled = mine.filter(pa.array(~passing.inside(passing.keys(shard, mine))))
    stands = np.where(np.asarray(pc.is_in(ids, value_set=sampled)), weight, np.where(np.asarray(seen), 1.0, 0.0))
    aside = [read_table(file) for part in ("sample", "passed") if (file := one.work / part / "quarantine" / shard.name).exists()]
    if aside:
        write_parquet(pa.concat_tables(aside), one.out.with_name("quarantine") / shard.name)
    write_parquet(pa.table({**table, STANDS_FOR: stands}), one.out / shard.name)


def _check_complete(one: Cascade, shards: Sequence[StoragePath], total: int, seen: int, quarantined: int) -> None:
    """Hold that every candidate has one score row, that it is empty where it should be, and that as many were seen as are said to be."""
    found = list(in_tasks(partial(_filled, one=one), shards, count=len(shards)))
    counts = tuple(sum(column) for column in zip(*found, strict=True)) or (0, 0, 0)
    if counts != (total, seen, quarantined):
        raise ArtifactError(
            f"{one.out} has {counts[0]} scores for {total} candidates, {counts[1]} of them of rows that the model saw in the place of "
            f"{seen}, and {counts[2]} empty ones for {quarantined} quarantined rows; remove the folder {one.out.parent} and score again"
        )


def _filled(shard: StoragePath, *, one: Cascade) -> tuple[int, int, int]:
    """Return how many rows a shard's file of scores has, how many of them were seen, and how many are empty.

    Raises:
        ArtifactError: It has not the same rows, or lacks scores of some.
    """
    file = one.out / shard.name
    table = read_table(file)
    unseen = int(np.sum(np.asarray(table[STANDS_FOR]) == 0))
    aside = one.out.with_name("quarantine") / shard.name
    empty = row_count(aside) if aside.exists() else 0
    text = {column for column in table.column_names if column.partition("_")[0] == "random" or column in one.of_text}
    wrong = [
        name
        for name in columns_of(one.scoring, one.selector)
        if table[name].null_count != empty + (0 if name in text else unseen)
    ]
    if wrong or len(table) != row_count(shard):
        raise ArtifactError(
            f"{file} lacks scores ({', '.join(wrong) or 'of some rows'}) besides those of {unseen} rows that the model never saw and of "
            f"{empty} quarantined ones; remove it and score again"
        )
    return len(table), len(table) - unseen, empty


def _losses(one: Cascade, passing: Passing, rest: pa.Array, outside: int) -> dict[str, dict[str, Any]]:
    """Return for each arm what is lost of the rows that the large model would keep, as `curation.missed` states it.

    Args:
        one: The cascade, all of its scores written.
        passing: The proxy's rankings with their cuts.
        rest: Ids of the sample's rows that are not passed on.
        outside: Candidates that are not passed on, with those of the sample.
    """
    shards, ids, large, of_proxy = _read_sample(one, passing, one.out, one.candidates)
    missed = ~passing.inside(of_proxy)
    _, rankings = one.rankings(one.out, one.candidates)
    points = [np.sort(keys) for keys in large]
    better = [np.zeros(len(ids), np.int64) for _ in points]
    count = partial(_better, rankings=list(rankings.values()), points=points, rest=rest)
    for found in in_tasks(count, shards, count=len(shards)):
        better = [all + more for all, more in zip(better, found, strict=True)]
    total, facts = count_rows(one.candidates / "rows"), {}
    for arm, keys, passed in zip(one.rules, large, better, strict=True):
        wanted, order = _wanted(one.rules[arm], total), np.argsort(keys)
        # A row's place in the large model's ranking of all: rows that are passed on are known, the others by the sample's.
        others = np.cumsum(missed[order]) * (outside + 1) / (len(rest) + 1)
        top = order[passed + others <= wanted]
        seen, lacking = min(len(top), wanted), int(missed[top].sum())
        stated = lost(wanted, seen, lacking, outside - len(rest))
        enough = lowest_taken(wanted, _members(wanted, len(ids), total), one.settings.miss) > 0
        facts[arm] = {"wanted": wanted, "members": seen, "missed": lacking, **asdict(stated), "enough": enough}
    return facts


def _better(shard: Shard, *, rankings: Sequence[Ranking], points: Sequence[Keys], rest: pa.Array) -> list[NDArray[np.int64]]:
    """Return for each arm how many of a shard's rows that were passed on are as good as each key or better."""
    found = []
    for ranking, keys in zip(rankings, points, strict=True):
        scored = read_scored(shard, ranking)[1]
        mine = np.sort(scored.keys[~np.asarray(pc.is_in(scored.ids, value_set=rest))])
        found.append(np.searchsorted(mine, keys, side="right").astype(np.int64))
    return found
