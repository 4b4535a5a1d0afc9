"""Groups of trusted rows, so that a direction can be taken for each.

The mean gradient of the validation rows points where most of them do, and undervalues what only few are about (the idea of a direction
a cluster: arXiv 2602.14696; how groups are found: ours). A row that helps any one group should be found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import ClusterError, kmeans2

from pharmacist_ray.config.selector import CoverageConfig
from pharmacist_ray.curation.selector import TINY, Point
from pharmacist_ray.data.render import Rendered
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError

SKETCH = 64
"""Numbers that stand for a gradient: its products with as many random directions, which keep angles to about 1/√64 (ours)."""

AT_ONCE = 8
"""Random directions held at a time, each as large as the adapter."""

_STARTS = 20  # of k-means, until none of the groups is empty


def group_rows(
    point: Point, rows: Sequence[Row], samples: Sequence[Rendered], coverage: CoverageConfig, seed: int
) -> list[list[int]]:
    """Return the places of each group's rows; every row is in one, no group is empty, and every worker finds the same.

    Args:
        point: The model whose gradients tell.
        rows: The validation rows.
        samples: The same as token ids.
        coverage: How many groups, and by what.
        seed: Of the random directions and of k-means' start.

    Raises:
        DataError: There are not as many different rows or categories.
    """
    if coverage.by == "category":
        of_row = by_category([row.category for row in rows], coverage.groups)
    else:
        of_row = by_angle(sketches(point, samples, seed), coverage.groups, seed)
    return [[place for place, group in enumerate(of_row) if group == number] for number in range(coverage.groups)]


def by_category(categories: Sequence[str], groups: int) -> list[int]:
    """Return each row's group: the largest categories first, each into the group that is smallest so far.

    Args:
        categories: Of each row.
        groups: Their number.

    Raises:
        DataError: There are fewer categories.
    """
    counts = Counter(categories)
    if len(counts) < groups:
        known = ", ".join(f"'{name}'" for name in sorted(counts)[:10])
        raise DataError(
            f"selector.coverage.groups={groups}, but the validation rows have {len(counts)} categories ({known}); lower it, set "
            "data.category_column, or group them by gradients"
        )
    sizes, group_of = [0] * groups, dict[str, int]()
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        group_of[name] = sizes.index(min(sizes))
        sizes[group_of[name]] += count
    return [group_of[name] for name in categories]


def by_angle(vectors: NDArray[np.float64], groups: int, seed: int) -> list[int]:
    """Return each row's group by k-means of the vectors' directions, numbered by the first row of each.

    Args:
        vectors: One of each row, (N, D).
        groups: Their number.
        seed: Of the start.

    Raises:
        DataError: There are not so many groups in them.
    """
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), TINY)
    for start in range(_STARTS if len(np.unique(units, axis=0)) >= groups else 0):
        try:
            found = kmeans2(units, groups, iter=100, minit="++", missing="raise", rng=np.random.default_rng([seed, start]))[1]
        except ClusterError:
            continue
        numbers = {int(group): number for number, group in enumerate(dict.fromkeys(found.tolist()))}
        if len(numbers) == groups:
            return [numbers[group] for group in found.tolist()]
    raise DataError(
        f"selector.coverage.groups={groups}, but the {len(vectors)} validation rows do not fall into so many; lower it"
    )


def sketches(point: Point, samples: Sequence[Rendered], seed: int) -> NDArray[np.float64]:
    """Return the products of each sample's gradient with `SKETCH` random directions, (N, `SKETCH`), on every worker.

    Args:
        point: The model at which gradients are taken.
        samples: All samples, the same list on every worker.
        seed: Of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = len(samples) + -len(samples) % point.ranks.workers  # the same number for every worker
    filled = [samples[place % len(samples)] for place in range(whole)]
    found = []
    for _ in range(0, SKETCH, AT_ONCE):
        random = {
            name: torch.randn(AT_ONCE, *parameter.shape, generator=generator).to(point.ranks.device)
            for name, parameter in point.parameters.items()
        }
        found.append(point.along(filled, random)[: len(samples)].double().cpu())
    return np.asarray(torch.cat(found, dim=1).numpy())
