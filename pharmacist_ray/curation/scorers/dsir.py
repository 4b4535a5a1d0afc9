"""DSIR (arXiv 2302.03169): importance weights of hashed 1- and 2-grams, trusted validation rows against the pool; without a model."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from pharmacist_ray.curation.scorers.naive_bayes import words
from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.data.schema import Row, uniform

BUCKETS = 10_000
"""Buckets into which n-grams are hashed (the paper's)."""
POOL = 20_000
"""So many candidates, chosen by id, stand for all of them (ours)."""


@dataclass(frozen=True)
class Weights:
    """What is fitted: 80 kB, whatever the number of candidates."""

    log_ratio: np.ndarray
    """log p(b | validation) − log p(b | candidates) by bucket, (BUCKETS,)."""
    length: float
    """Mean number of n-grams of a candidate."""


def dsir(signals: Signals) -> np.ndarray:
    """Return n̄ · mean over a row's n-grams of log p(· | validation) − log p(· | candidates), plus Gumbel noise, so that the top is a draw.

    The paper sums over the n-grams, which prefers by length; here every row counts as if it had the candidates' mean number n̄ of
    them (ours). The noise depends on id and seed alone. It sees prompts and answers, and costs no pass of any model.

    Args:
        signals: The shard's signals.
    """
    weights = signals.trusted.fitted(weigh)
    scores = np.zeros(len(signals.rows))
    for place, row in enumerate(signals.rows):
        found = buckets(row)
        scores[place] = weights.length * weights.log_ratio[found].mean() if found else 0.0
    return scores + [gumbel(row.id, signals.trusted.seed) for row in signals.rows]


def weigh(trusted: TrustedSets) -> Weights:
    """Return the log ratios: counts in the validation rows over those that the pool lets expect of as many n-grams, plus one each.

    With the pseudo-count on either side after both have the same size, an n-gram that neither has seen counts 0. Smoothed before,
    it would count as log(candidates / validation rows), and garbage would come first (ours).

    Args:
        trusted: The validation rows, and the candidates.
    """
    target, _ = _counts(trusted.rows("validation"))
    pool, rows = _counts(trusted.sample("candidates", POOL))
    expected = target.sum() * pool / max(1.0, pool.sum())
    return Weights(np.log(target + 1) - np.log(expected + 1), float(pool.sum()) / max(1, rows))


def buckets(row: Row) -> list[int]:
    """Return the buckets of a row's 1- and 2-grams; prompt and answer share none."""
    parts = [words(text) for text in (row.prompt, row.input, row.response)]
    return [bucket(gram) for part in parts for gram in (*part, *map(" ".join, pairwise(part)))]


@lru_cache(maxsize=1 << 16)
def bucket(gram: str) -> int:
    """Return the bucket of an n-gram: its SHA-256, so that it is the same in every process."""
    return int.from_bytes(hashlib.sha256(gram.encode()).digest(), "big") % BUCKETS


def gumbel(id: str, seed: int) -> float:
    """Return a standard Gumbel number that depends on the id and the seed alone, and not on what `random` draws."""
    return -math.log(-math.log(uniform(f"gumbel:{id}", seed) + 2**-54))


def _counts(rows: list[Row]) -> tuple[np.ndarray, int]:
    counts = np.zeros(BUCKETS)
    for row in rows:
        np.add.at(counts, buckets(row), 1.0)
    return counts, len(rows)
