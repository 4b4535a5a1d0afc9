"""Candidates and their scores, joined shard by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pharmacist_ray.curation.calibrate import Calibrated, PlantedScores, calibrate
from pharmacist_ray.curation.combine import BestRank, RankSum, best_rank, rank_sum
from pharmacist_ray.curation.topk import Keys, fixed_width, keys_of
from pharmacist_ray.errors import ArtifactError, unknown_name
from pharmacist_ray.storage import StoragePath, matching, parquet_schema, read_table

Blend = RankSum | BestRank | Calibrated


@dataclass(frozen=True)
class Shard:
    """One shard's file of rows and its file of scores."""

    rows: StoragePath
    scores: StoragePath
    blend: Blend | None = None
    """How several score columns make one; None where a column is the score."""
    left_out: NDArray[np.uint8] | None = None
    """A bit for each scored row, in the order of ids: set where it is left out as a near-duplicate of better rows."""

    def score(self, scorer: str) -> pa.Table:
        """Return the ids of the score file and one column of float64."""
        if self.blend is None:
            table = read_table(self.scores, columns=["id", scorer])
            return pa.table({"id": table["id"], "score": table[scorer].cast(pa.float64())})
        table = read_table(self.scores, columns=["id", *self.blend.columns])
        return pa.table({"id": table["id"], "score": pa.array(self.blend.of(table))})


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
    weights: Mapping[str, float] | None = None,
    planted: PlantedScores | None = None,
    turns: Sequence[str] = (),
) -> list[Shard]:
    """Return the shards in order of their names.

    Args:
        scores: Folder with one ``part-*.parquet`` per shard: an id column and a float column per scorer.
        candidates: Folder with one ``rows/part-*.parquet`` per shard.
        scorer: The column that will be read.
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
    for path in scored.values():
        known = [name for name in parquet_schema(path).names if name != "id"]
        for column in columns:
            if column not in known:
                raise unknown_name("scorer", column, known)
    tables = (read_table(path, columns=["id", *columns]) for path in scored.values())
    blend: Blend | None = None
    if planted:
        blend = calibrate(tables, planted)
    elif weights:
        blend = rank_sum(tables, weights)
    elif turns:
        blend = best_rank(tables, turns)
    return [Shard(path, scored[name], blend) for name, path in rows.items()]


def read_scored(shard: Shard, scorer: str, descending: bool) -> tuple[pa.Array, Scored]:
    """Return the categories of all rows of a shard, and its scored rows that are not left out, in the order of their ids.

    Args:
        shard: The shard.
        scorer: The column of the scores; NaN and null are not scored.
        descending: Whether a higher score is better; for the keys.

    Raises:
        ArtifactError: The scores are those of other candidates, or the candidates are not sorted by unique ids.
    """
    rows = read_table(shard.rows, columns=["id", "category"])
    table = shard.score(scorer)
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
        ids.filter(mask), values[known], category.filter(mask), keys_of(values[known], letters[known], descending)
    )
