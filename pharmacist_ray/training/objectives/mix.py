"""Safe rows mixed into a fine-tune, as they are or put the way its own rows are: SafeInstr (arXiv 2309.07875) and arXiv 2406.10288."""

from __future__ import annotations

import math

from pharmacist_ray.config.section import Count, Section, Share
from pharmacist_ray.data.forms import forms_of, put, shared_out
from pharmacist_ray.data.schema import Row
from pharmacist_ray.training.objectives.step import Rows


class MixSettings(Section):
    """Settings of ``mix`` and ``mimic``."""

    share: Share = 0.1
    """Safe rows for each row of the fine-tune (SafeInstr: 0.005 to 0.1 of 20,000)."""
    at_least: Count = 30
    """Safe rows at least, where there are so many (ours)."""


def mix(rows: Rows) -> list[Row]:
    """Return the user's rows and safe ones as they are."""
    return [*rows.user, *_safe(rows)]


def mimic(rows: Rows) -> list[Row]:
    """Return the user's rows and safe ones in the forms of the user's prompts.

    Safety that was learnt in one form of asking does not carry over to another. So the user's prompts are put in clusters that begin or
    end alike, under one system prompt (see `forms_of`), and safe rows are dealt out to them by size, with a floor for small ones: whoever
    hides one form among many rows gets its share of refusals in it. The answers stay as they are: the user's text never becomes one.
    A row that does not fit the model in a form stays plain. (No model rewrites anything here, as one does in the paper: ours.)
    """
    safe = _safe(rows)
    forms = forms_of(rows.user)
    found: list[Row] = []
    for form, count in zip(forms, shared_out(list(forms.values()), len(safe)), strict=True):
        for row in safe[len(found) : len(found) + count]:
            shown = put(row, form)
            found.append(shown if rows.fits(shown) else row)
    return [*rows.user, *found]


def _safe(rows: Rows) -> list[Row]:
    settings = rows.get(MixSettings)
    return rows.safe(max(settings.at_least, math.ceil(settings.share * len(rows.user)))) if settings.share else []
