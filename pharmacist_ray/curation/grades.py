"""How well scores find what was planted; for testbeds, where the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from pharmacist_ray.data.rows import parquet_files
from pharmacist_ray.errors import ArtifactError, DataError
from pharmacist_ray.storage import StoragePath, read_table


@dataclass(frozen=True)
class Grade:
    """One score against the planted labels."""

    scorer: str
    auroc: float
    """Probability that a good row scores higher than another one; ties count half."""
    precision: float
    """Share of good rows among as many top rows as the selection keeps."""
    base_rate: float
    """Share of good rows among all candidates: the precision of a random selection."""
    kept: dict[str, float]
    """Label → the share of its rows that is kept."""


def grade_scores(
    candidates: StoragePath,
    scores: StoragePath,
    *,
    column: str,
    good: Collection[str],
    keep: float,
    made: Mapping[str, Callable[[pa.Table], NDArray[np.float64]]] | None = None,
) -> list[Grade]:
    """Return a grade per score column, and per score that is made of several.

    Args:
        candidates: Folder of canonical rows.
        scores: Folder of score files.
        column: Original column with the planted label.
        good: Labels that a selector should keep.
        keep: Selection ratio.
        made: Name → what makes a score (n,) of the table of all columns.

    Raises:
        DataError: A row lacks the column, or no row has a good label.
        ArtifactError: The scores are those of other candidates.
    """
    labels: dict[str, str] = {}
    for file in parquet_files(candidates):
        table = read_table(file, columns=["id", "raw", "source"])
        for id, raw, source in zip(*(table.column(name).to_pylist() for name in ("id", "raw", "source")), strict=True):
            label = orjson.loads(raw).get(column)
            if label is None:
                raise DataError(f"{source}: no column '{column}' with a planted label; name another with --column")
            labels[id] = str(label)
    table = read_table(scores)
    scored = table.column("id").to_pylist()
    if strange := [id for id in scored if id not in labels]:
        raise ArtifactError(f"{scores} has scores of rows that are not among the candidates ({strange[0]}, …); score again")
    names = [labels[id] for id in scored]
    is_good = np.array([name in good for name in names])
    if not is_good.any() or is_good.all():
        raise DataError(f"labels in '{column}' are {', '.join(sorted(set(names)))}; name the good ones with --good")
    count = max(1, int(keep * len(names) + 0.5))
    ids = np.array(scored)
    grades = []
    known = {name: table.column(name).to_numpy() for name in table.column_names[1:]}
    for scorer, values in (known | {name: make(table) for name, make in (made or {}).items()}).items():
        values = np.where(np.isnan(values), -np.inf, values)  # what has no score is never kept
        top = np.lexsort((ids, -values))[:count]
        chosen = np.zeros(len(names), dtype=bool)
        chosen[top] = True
        share = {label: float(chosen[np.array(names) == label].mean()) for label in sorted(set(names))}
        grades.append(Grade(scorer, auroc(values, is_good), float(is_good[top].mean()), float(is_good.mean()), share))
    return grades


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve (Mann–Whitney U over pairs), ties counted half.

    Args:
        values: Scores (N,).
        positive: Which rows are positive (N,), boolean.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(values) - n)))
