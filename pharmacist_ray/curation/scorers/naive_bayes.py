"""Unigram naive Bayes between trusted and harmful answers: the baseline that needs no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.curation.scorers.trusted import TrustedSets

_WORDS = re.compile(r"\w+|[^\w\s]")


def naive_bayes(signals: Signals) -> np.ndarray:
    """Return the mean over an answer's words t of log p(t | validation) − log p(t | harmful), words counted with one added (Laplace).

    A mean, so that long answers are not preferred; answers without a word score 0 (ours).

    Args:
        signals: The shard's signals.
    """
    weights = signals.trusted.fitted(_log_ratios)
    scores = np.zeros(len(signals.rows))
    for place, row in enumerate(signals.rows):
        if found := words(row.response):
            scores[place] = sum(weights.get(word, weights[""]) for word in found) / len(found)
    return scores


def words(text: str) -> list[str]:
    """Return a text's words and single marks, in lower case."""
    return _WORDS.findall(text.lower())


def _log_ratios(trusted: TrustedSets) -> dict[str, float]:
    """Return each word's log ratio; that of a word in neither set stands under the empty word."""
    safe, harmful = (_counted(row.response for row in rows) for rows in (trusted.safe_rows, trusted.rows("harmful")))
    vocabulary = safe.keys() | harmful.keys()
    totals = [counts.total() + len(vocabulary) for counts in (safe, harmful)]
    return {
        word: float(np.log((safe[word] + 1) / totals[0]) - np.log((harmful[word] + 1) / totals[1])) for word in (*vocabulary, "")
    }


def _counted(texts: Iterable[str]) -> Counter[str]:
    return Counter(word for text in texts for word in words(text))
