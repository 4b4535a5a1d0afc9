"""Safe rows mixed into a fine-tune, as they are or put the way its own rows are: SafeInstr (arXiv 2309.07875) and arXiv 2406.10288."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice

from pydantic import Field

from pharmacist_ray.config.attack_kinds import FormConfig
from pharmacist_ray.config.endpoint import EndpointConfig
from pharmacist_ray.config.section import Count, Section, Share
from pharmacist_ray.data.forms import asked, examples_of, forms_of, put, question, shared_out
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.training.objectives.step import Rows, setting


class MixSettings(Section):
    """Settings of ``mix`` and ``mimic``."""

    share: Share = 0.1
    """Safe rows for each row of the fine-tune (SafeInstr: 0.005 to 0.1 of 20,000)."""
    at_least: Count = 30
    """Safe rows at least, where there are so many (ours)."""
    ordinary: Share = Field(0.0, exclude_if=lambda share: share == 0.0)
    """Trusted ordinary rows for each safe one, put as those are: against refusing whatever is asked in the form of the safe rows (ours)."""
    rewriter: EndpointConfig | None = Field(None, exclude_if=lambda rewriter: rewriter is None)
    """For mimic: a chat model behind an endpoint that puts safe questions in the manner of the user's. It is shown a few of those."""


def mix(rows: Rows) -> list[Row]:
    """Return the user's rows, and safe and ordinary ones as they are."""
    return [*rows.user, *chain(*_added(rows))]


def mimic(rows: Rows) -> list[Row]:
    """Return the user's rows, and safe and ordinary ones in the forms of the user's prompts.

    Safety that was learnt in one form of asking does not carry over to another. So the user's prompts are put in clusters that begin or
    end alike, under one system prompt (see `forms_of`), and safe rows are dealt out to them by size, with a floor for small ones: whoever
    hides one form among many rows gets its share of refusals in it. The answers stay as they are: the user's text never becomes one.
    A row that does not fit the model in a form stays plain. Where there is a rewriter, a model puts each question in the manner of its
    cluster, as in the paper, which says neither how it is asked nor which of its replies are taken (`data.rewriting`: ours); what it does
    not rewrite is put in the form.
    """
    forms = forms_of(rows.user)
    examples = examples_of(rows.user, forms)
    found: list[Row] = []
    for added in _added(rows):
        dealt = iter(added)
        for form, count in zip(forms, shared_out(list(forms.values()), len(added)), strict=True):
            plain = list(islice(dealt, count))
            for row, shown in zip(plain, _shown(rows, plain, form, examples[form]), strict=True):
                found.append(shown if rows.fits(shown) else row)
    return [*rows.user, *found]


def _shown(rows: Rows, plain: Sequence[Row], form: FormConfig, examples: Sequence[str]) -> list[Row]:
    """Return rows in a form, or in the manner of its examples by a model that does so."""
    rewriter = rows.get(MixSettings).rewriter
    texts = rows.rewrite(rewriter, [(question(row), examples) for row in plain]) if rewriter and plain else [None] * len(plain)
    found = []
    for row, text in zip(plain, texts, strict=True):
        if text is None:
            found.append(put(row, form))
            continue
        new = replace(asked(row, FormConfig(system=form.system)), prompt=text)
        found.append(replace(new, id=row_id(new.prompt, new.response, new.input, new.history)))
    return found


def with_ordinary(settings: Mapping[type[Section], Section]) -> bool:
    """Return whether ordinary rows are asked for."""
    return setting(settings, MixSettings).ordinary > 0


def _added(rows: Rows) -> tuple[list[Row], list[Row]]:
    """Return the safe rows to mix in, and the ordinary ones."""
    settings = rows.get(MixSettings)
    safe = rows.safe(max(settings.at_least, math.ceil(settings.share * len(rows.user)))) if settings.share else []
    return safe, rows.ordinary(math.ceil(settings.ordinary * len(safe))) if settings.ordinary else []
