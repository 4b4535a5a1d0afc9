"""Candidates and their scores, joined shard by shard, and how they are ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pharmacist_ray.config.scoring import STANDS_FOR
from pharmacist_ray.curation.calibrate import Calibrated, PlantedScores, calibrate
from pharmacist_ray.curation.combine import SAMPLE, BestRank, RankSum, best_rank, rank_sum
from pharmacist_ray.curation.topk import Keys, fixed_width, keys_of
from pharmacist_ray.data.schema import uniform
from pharmacist_ray.errors import ArtifactError, unknown_name
from pharmacist_ray.storage import StoragePath, matching, parquet_schema, read_table, rows_of_all, write_parquet

Blend = RankSum | BestRank | Calibrated

_SEED = 1_597_334_677


@dataclass(frozen=True)
class Shard:
    """One shard's file of rows and its file of scores."""

    rows: StoragePath
    scores: StoragePath
    left_out: NDArray[np.uint8] | None = None
    """A bit for each scored row, in the order of ids: set where it is left out as a near-duplicate of better rows."""


@dataclass(frozen=True)
class Ranking:
    """What rows are ranked by."""

    scorer: str
    """A score column, or the name of what is made of several."""
    descending: bool
    """Whether a higher score is better."""
    blend: Blend | None = None
    """How several score columns make one; None where a column is the score."""
    partial: bool = False
    """Whether a cascade made the scores: most rows without one were never seen by the model."""
    kept: StoragePath | None = None
    """A folder for what the blend makes of each file, which is then made once for all passes; None: it is made in each."""

    def scores(self, file: StoragePath) -> pa.Table:
        """Return the ids of a score file and the scores as float64: NaN and null are not scored."""
        if self.blend is None:
            table = read_table(file, columns=["id", self.scorer])
            return pa.table({"id": table["id"], "score": table[self.scorer].cast(pa.float64())})
        kept = self.kept / file.name if self.kept is not None else None
        if kept is not None and kept.exists():
            return read_table(kept)
        table = read_table(file, columns=["id", *self.blend.columns])
        made = pa.table({"id": table["id"], "score": pa.array(self.blend.of(table))})
        if kept is not None:
            write_parquet(made, kept)
        return made


@dataclass(frozen=True)
class Scored:
    """The scored rows of one shard, in the order of their ids."""

    ids: pa.Array
    scores: NDArray[np.float64]
    categories: pa.Array
    keys: Keys


def find_shards(
    scores: StoragePath,
    candidates: StoragePath,
    scorer: str,
    *,
    descending: bool = True,
    weights: Mapping[str, float] | None = None,
    planted: PlantedScores | None = None,
    turns: Sequence[str] = (),
) -> tuple[list[Shard], Ranking]:
    """Return the shards in order of their names, and what their rows are ranked by.

    Args:
        scores: Folder with one ``part-*.parquet`` per shard: an id column and a float column per scorer.
        candidates: Folder with one ``rows/part-*.parquet`` per shard.
        scorer: The column that will be read.
        descending: Whether a higher score is better.
        weights: Columns whose ranks are added up instead, with their weights.
        planted: The planted rows by which scores are weighed instead.
        turns: Columns that take turns instead.

    Raises:
        ArtifactError: A folder is empty, or the two have different shards.
        ConfigError: There is no such column.
        DataError: Too few planted rows have a score.
    """
    rows = {path.name: path for path in matching(candidates / "rows", "part-*.parquet")}
    scored = {path.name: path for path in matching(scores, "part-*.parquet")}
    for folder, found in ((candidates / "rows", rows), (scores, scored)):
        if not found:
            raise ArtifactError(f"{folder} has no part-*.parquet files; run the stage that writes it")
    if rows.keys() != scored.keys():
        odd = min(rows.keys() ^ scored.keys())
        raise ArtifactError(f"{scores} and {candidates} do not have the same shards: {odd} is in one only; score again")
    columns = list(planted.columns) if planted else list(weights or turns or (scorer,))
    there = parquet_schema(next(iter(scored.values()))).names
    known = [name for name in there if name not in ("id", STANDS_FOR)]
    for column in columns:
        if column not in known:
            raise unknown_name("scorer", column, known)
    parts, read = list(scored.values()), partial(read_table, columns=["id", *columns])
    if STANDS_FOR in there and (planted or weights or turns):
        read = partial(read_standing, columns=columns, share=min(1.0, SAMPLE / max(1, rows_of_all(parts))))
    blend: Blend | None = None
    if planted:
        blend = calibrate(parts, planted, read)
    elif weights:
        blend = rank_sum(parts, weights, read)
    elif turns:
        blend = best_rank(parts, turns, read)
    shards = [Shard(path, scored[name]) for name, path in rows.items()]
    return shards, Ranking(scorer, descending, blend, STANDS_FOR in there)


def read_standing(file: StoragePath, columns: Sequence[str], share: float) -> pa.Table:
    """Return the ids and scores of a cascade's file, each row about as often as the candidates that it stands for.

    Ranks among these are ranks among all candidates, as well as the sample tells. Rounding is by chance, so that the mean is right, and
    by id, so that it is always the same.

    Args:
        file: The score file.
        columns: The score columns.
        share: Rows wanted of all candidates'; 1 repeats a row as often as `STANDS_FOR` says.
    """
    table = read_table(file, columns=["id", *columns, STANDS_FOR])
    chance = np.array([uniform(id, _SEED) for id in table["id"].to_pylist()], np.float64)
    times = np.floor(np.asarray(table[STANDS_FOR]) * share + chance).astype(np.int64)
    return table.drop_columns(STANDS_FOR).take(pa.array(np.repeat(np.arange(len(table)), times)))


def read_scored(shard: Shard, ranking: Ranking) -> tuple[pa.Array, Scored]:
    """Return the categories of all rows of a shard, and its scored rows that are not left out, in the order of their ids.

    Args:
        shard: The shard.
        ranking: What rows are ranked by.

    Raises:
        ArtifactError: The scores are those of other candidates, or the candidates are not sorted by unique ids.
    """
    rows = read_table(shard.rows, columns=["id", "category"])
    table = ranking.scores(shard.scores)
    ids, category = rows["id"].combine_chunks(), rows["category"].combine_chunks()
    letters = fixed_width(ids, shard.rows)
    if np.any(letters[1:] <= letters[:-1]):
        raise ArtifactError(f"{shard.rows} is not sorted by unique ids; ingest the candidates again")
    score, scored_ids = table["score"].combine_chunks(), table["id"].combine_chunks()
    if not scored_ids.equals(ids):
        place = pc.index_in(ids, value_set=scored_ids)
        if len(scored_ids) != len(ids) or place.null_count:
            lost = pc.sum(pc.is_null(place)).as_py() or 0
            raise ArtifactError(
                f"{shard.scores} has the scores of other candidates: {len(scored_ids)} scores for {len(ids)} rows in "
                f"{shard.rows}, {lost} of them without one; score again"
            )
        score = score.take(place)
    values = score.to_numpy(zero_copy_only=False)
    known = ~np.isnan(values)
    if shard.left_out is not None:
        known[known] = np.unpackbits(shard.left_out, count=int(known.sum())) == 0
    mask = pa.array(known)
    return category, Scored(
        ids.filter(mask), values[known], category.filter(mask), keys_of(values[known], letters[known], ranking.descending)
    )
