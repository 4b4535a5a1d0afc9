"""The answer's length in words: a baseline."""

from __future__ import annotations

import numpy as np

from pharmacist_ray.curation.scorers import Scorer
from pharmacist_ray.curation.scorers.signals import Signals


def answer_words(signals: Signals) -> np.ndarray:
    """Return the number of words of each answer, (n,); the highest is kept first.

    Args:
        signals: The shard's signals.
    """
    return np.array([float(len(row.response.split())) for row in signals.rows])


long_answer = Scorer(answer_words)  # what it sees besides the rows would come second, for example ("model",)
