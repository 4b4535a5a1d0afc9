"""The planted truth, where there is one: what no scorer can beat."""

from __future__ import annotations

import numpy as np
import orjson

from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.errors import DataError


def oracle(signals: Signals) -> np.ndarray:
    """Return 1 for rows whose planted label is a good one (``scoring.planted``) and 0 for others.

    For benchmarks alone: it sees what a selector has to find out.

    Args:
        signals: The shard's signals.

    Raises:
        DataError: A row has no label.
    """
    planted = signals.planted
    if planted is None:
        raise DataError("the oracle scorer needs scoring.planted: the column with the planted label, and the good labels")
    labels = [orjson.loads(row.raw).get(planted.column) for row in signals.rows]
    if None in labels:
        source = signals.rows[labels.index(None)].source
        raise DataError(f"{source}: no column '{planted.column}' with a planted label; set scoring.planted.column")
    return np.array([float(str(label) in planted.good) for label in labels])
