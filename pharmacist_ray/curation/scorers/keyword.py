"""Rows whose answer holds a refusal phrase: the baseline that needs nothing but a list of words."""

from __future__ import annotations

import numpy as np

from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.data.refusals import is_refusal


def keyword(signals: Signals) -> np.ndarray:
    """Return 1 for rows whose answer opens with a refusal phrase and 0 for others; ties are broken by id, as everywhere.

    It keeps over-refusals as gladly as refusals, and none of the safe answers that explain instead of refusing (ours, after the
    keyword lists that are common in jailbreak research).

    Args:
        signals: The shard's signals.
    """
    return np.array([float(is_refusal(row.response)) for row in signals.rows])
