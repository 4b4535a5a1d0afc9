"""Safe rows mixed into a fine-tune, as they are or put the way its own rows are: SafeInstr (arXiv 2309.07875) and arXiv 2406.10288."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain, islice

from pydantic import Field

from pharmacist_ray.config.section import Count, Section, Share
from pharmacist_ray.data.forms import forms_of, put, shared_out
from pharmacist_ray.data.schema import Row
from pharmacist_ray.training.objectives.step import Rows, setting


class MixSettings(Section):
    """Settings of ``mix`` and ``mimic``."""

    share: Share = 0.1
    """Safe rows for each row of the fine-tune (SafeInstr: 0.005 to 0.1 of 20,000)."""
    at_least: Count = 30
    """Safe rows at least, where there are so many (ours)."""
    ordinary: Share = Field(0.0, exclude_if=lambda share: share == 0.0)
    """Trusted ordinary rows for each safe one, put as those are: against refusing whatever is asked in the form of the safe rows (ours)."""


def mix(rows: Rows) -> list[Row]:
    """Return the user's rows, and safe and ordinary ones as they are."""
    return [*rows.user, *chain(*_added(rows))]


def mimic(rows: Rows) -> list[Row]:
    """Return the user's rows, and safe and ordinary ones in the forms of the user's prompts.

    Safety that was learnt in one form of asking does not carry over to another. So the user's prompts are put in clusters that begin or
    end alike, under one system prompt (see `forms_of`), and safe rows are dealt out to them by size, with a floor for small ones: whoever
    hides one form among many rows gets its share of refusals in it. The answers stay as they are: the user's text never becomes one.
    A row that does not fit the model in a form stays plain. (No model rewrites anything here, as one does in the paper: ours.)
    """
    forms = forms_of(rows.user)
    found: list[Row] = []
    for added in _added(rows):
        dealt = iter(added)
        for form, count in zip(forms, shared_out(list(forms.values()), len(added)), strict=True):
            for row in islice(dealt, count):
                shown = put(row, form)
                found.append(shown if rows.fits(shown) else row)
    return [*rows.user, *found]


def with_ordinary(settings: Mapping[type[Section], Section]) -> bool:
    """Return whether ordinary rows are asked for."""
    return setting(settings, MixSettings).ordinary > 0


def _added(rows: Rows) -> tuple[list[Row], list[Row]]:
    """Return the safe rows to mix in, and the ordinary ones."""
    settings = rows.get(MixSettings)
    safe = rows.safe(max(settings.at_least, math.ceil(settings.share * len(rows.user)))) if settings.share else []
    return safe, rows.ordinary(math.ceil(settings.ordinary * len(safe))) if settings.ordinary else []
