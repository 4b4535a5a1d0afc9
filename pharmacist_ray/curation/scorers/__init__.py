"""Scores by which candidates can be ranked: highest is kept first. One file each, and one line here.

A scorer is a function from a shard's `Signals` to one value per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pharmacist_ray.curation.scorers.grad_norm import grad_norm
from pharmacist_ray.curation.scorers.ifd import ifd
from pharmacist_ray.curation.scorers.keyword import keyword
from pharmacist_ray.curation.scorers.less import less
from pharmacist_ray.curation.scorers.loss import high_loss, low_loss
from pharmacist_ray.curation.scorers.loss_gap import loss_gap
from pharmacist_ray.curation.scorers.naive_bayes import naive_bayes
from pharmacist_ray.curation.scorers.oracle import oracle
from pharmacist_ray.curation.scorers.pharmacist import pharmacist
from pharmacist_ray.curation.scorers.signals import Signals


@dataclass(frozen=True)
class Scorer:
    """A score, and what it is given to see besides the row itself, so that comparisons can be fair."""

    score: Callable[[Signals], np.ndarray]
    sees: tuple[str, ...] = ()
    """Any of model, validation, harmful, benign, labels; ``model`` is the model to harden with the selector fitted on it."""

    @property
    def needs_model(self) -> bool:
        """Whether a model is loaded for it, and a selector fitted."""
        return "model" in self.sees


SCORERS: dict[str, Scorer] = {
    "pharmacist": Scorer(pharmacist, ("model", "validation", "harmful")),
    "loss_gap": Scorer(loss_gap, ("model", "validation", "benign")),
    "less": Scorer(less, ("model", "validation")),
    "low_loss": Scorer(low_loss, ("model",)),
    "high_loss": Scorer(high_loss, ("model",)),
    "ifd": Scorer(ifd, ("model",)),
    "grad_norm": Scorer(grad_norm, ("model",)),
    "keyword": Scorer(keyword),
    "naive_bayes": Scorer(naive_bayes, ("validation", "harmful")),
    "oracle": Scorer(oracle, ("labels",)),
}
"""By name. `random` is not here: it sees nothing and writes several columns (see `curation.score`)."""

SCORER_NAMES = [*SCORERS, "random"]


def needs_model(names: list[str]) -> bool:
    """Return whether any of these scorers needs the model, and with it the selector."""
    return any(name in SCORERS and SCORERS[name].needs_model for name in names)
