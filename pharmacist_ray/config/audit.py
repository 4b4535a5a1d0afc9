"""How the rows of a fine-tune are audited."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pharmacist_ray.config.data import SourceConfig
from pharmacist_ray.config.section import Count, Section, Share


class AuditConfig(Section):
    """The audit of rows that somebody wants a model fine-tuned on, which `pharmacist audit` makes."""

    data: SourceConfig | None = None
    """The rows; a path on the command line goes before it."""
    scorers: Annotated[list[str], Field(min_length=1)] = ["refusal_feature", "representation", "guard", "naive_bayes"]
    """The scores that flag rows: of the prompt's state, of the answer's states, a classifier, and of words. Add `loss_gap` (a model tuned
    on trusted rows against the base) or `pharmacist` (what a row does to safety), which need a fit. (The choice is ours.)"""
    alarm: Annotated[Share, Field(gt=0.0)] = 0.01
    """Share of known safe rows that a score may flag (ours)."""
    agree: Count = 1
    """A row is left out if at least so many scores flag it."""
