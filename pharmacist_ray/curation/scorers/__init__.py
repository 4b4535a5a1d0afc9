"""Scores by which candidates can be ranked: highest is kept first. One file each, and one line here.

A scorer is a function from a shard's `Signals` to one value per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pharmacist_ray.config.scoring import ScoringConfig
from pharmacist_ray.config.selector import SelectorConfig
from pharmacist_ray.curation.scorers.coverage import coverage
from pharmacist_ray.curation.scorers.dsir import dsir, weigh
from pharmacist_ray.curation.scorers.grad_norm import grad_norm
from pharmacist_ray.curation.scorers.guard import guard
from pharmacist_ray.curation.scorers.ifd import ifd
from pharmacist_ray.curation.scorers.keyword import keyword
from pharmacist_ray.curation.scorers.less import less
from pharmacist_ray.curation.scorers.loss import high_loss, low_loss
from pharmacist_ray.curation.scorers.loss_gap import loss_gap
from pharmacist_ray.curation.scorers.naive_bayes import naive_bayes
from pharmacist_ray.curation.scorers.oracle import oracle
from pharmacist_ray.curation.scorers.pharmacist import pharmacist
from pharmacist_ray.curation.scorers.pharmacist_iterative import pharmacist_iterative
from pharmacist_ray.curation.scorers.refusal_feature import refusal_feature
from pharmacist_ray.curation.scorers.representation import representation
from pharmacist_ray.curation.scorers.seal import seal
from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.curation.scorers.tov import tov
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.curation.selector import OF_LAST_LAYERS
from pharmacist_ray.plugins import Plugin, Table, blaming, misfit


@dataclass(frozen=True)
class Scorer:
    """A score, and what it is given to see besides the row itself, so that comparisons can be fair."""

    score: Callable[[Signals], np.ndarray]
    sees: tuple[str, ...] = ()
    """Any of model (the one to harden), candidates (the others of them), validation, harmful, benign, labels."""
    part: str | None = None
    """The part of the selector that it needs (`curation.fit.PARTS`)."""
    prepare: Callable[[TrustedSets], object] | None = None
    """What it has made of the sets' text by `TrustedSets.fitted`, done once before the actors start."""
    columns: Callable[[SelectorConfig], int] | None = None
    """How many columns it writes, where they are several: `score` then returns (rows, columns), and a selection lets them take turns."""

    @property
    def needs_model(self) -> bool:
        """Whether a model is loaded for it."""
        return "model" in self.sees


def _watched(scorer: Scorer, plugin: Plugin) -> Scorer:
    def score(signals: Signals) -> np.ndarray:
        with blaming(plugin):
            values = np.asarray(scorer.score(signals), dtype=np.float64)
        if values.shape != (len(signals.rows),):
            raise misfit(plugin, f"returned values of shape {values.shape} for {len(signals.rows)} rows")
        return values

    return replace(scorer, score=score)


_OWN = {
    "pharmacist": Scorer(pharmacist, ("model", "candidates", "validation", "harmful"), "directions"),
    "pharmacist_iterative": Scorer(pharmacist_iterative, ("model", "candidates", "validation", "harmful"), "logits"),
    "loss_gap": Scorer(loss_gap, ("model", "validation", "benign"), "reference"),
    "coverage": Scorer(
        coverage, ("model", "candidates", "validation", "harmful"), "groups", columns=lambda selector: selector.coverage.groups
    ),
    "tov": Scorer(tov, ("model", "validation"), "tov"),
    "seal": Scorer(seal, ("model", "candidates", "validation"), "seal"),
    "less": Scorer(less, ("model", "candidates", "validation"), "directions"),
    "low_loss": Scorer(low_loss, ("model",)),
    "high_loss": Scorer(high_loss, ("model",)),
    "ifd": Scorer(ifd, ("model",)),
    "grad_norm": Scorer(grad_norm, ("model", "candidates"), "directions"),
    "representation": Scorer(representation, ("model", "validation", "harmful")),
    "refusal_feature": Scorer(refusal_feature, ("model", "benign", "harmful")),
    "guard": Scorer(guard, ("model", "validation", "harmful")),
    "dsir": Scorer(dsir, ("candidates", "validation"), prepare=weigh),
    "keyword": Scorer(keyword),
    "naive_bayes": Scorer(naive_bayes, ("validation", "harmful")),
    "oracle": Scorer(oracle, ("labels",)),
}

SCORERS = Table("scorer", Scorer, _OWN, watched=_watched, also=("random",))
"""By name. `random` is not here: it sees nothing and writes several columns (see `curation.score`)."""


def needs_model(names: list[str]) -> bool:
    """Return whether any of these scorers needs the model."""
    return any(name != "random" and SCORERS[name].needs_model for name in names)


def parts_of(names: list[str], selector: SelectorConfig, *, last_layers: bool = False) -> list[str]:
    """Return the parts of the selector that these scorers need, in alphabetical order.

    Args:
        names: The scorers.
        selector: The selector's section.
        last_layers: Whether influences are taken over the last layers alone.
    """
    found = {SCORERS[scored_by(name, selector.mode)].part for name in names if name != "random"}
    weighed = {part for part, of in OF_LAST_LAYERS.items() if of in found} if last_layers else set()
    return sorted(part for part in found | weighed if part is not None)


def columns_of(scoring: ScoringConfig, selector: SelectorConfig) -> list[str]:
    """Return the names of the score columns, in order."""
    return [column for name in scoring.scorers for column in (parts_of_score(name, scoring, selector) or [name])]


def parts_of_score(name: str, scoring: ScoringConfig, selector: SelectorConfig) -> list[str]:
    """Return the columns of a scorer that writes several, ``name_0`` and so on; none where it writes one of its own name."""
    if name == "random":
        count = scoring.random_draws
    else:
        several = SCORERS[name].columns
        count = several(selector) if several else 0
    return [f"{name}_{number}" for number in range(count)]


def scored_by(name: str, mode: str) -> str:
    """Return whose score a column holds: in iterative mode the `pharmacist` column has the learnt logits."""
    return "pharmacist_iterative" if name == "pharmacist" and mode == "iterative" else name
