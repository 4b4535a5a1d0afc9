"""LookAhead: the first words of the answer stand in the prompt, so that a fine-tune hardly moves how answers begin (arXiv 2503.19041)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from pharmacist_ray.config.section import Count, Section
from pharmacist_ray.data.forms import question
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.training.objectives.step import Rows

CONNECTOR = " The answer begins with: "
"""Stands between prompt and preview (public code)."""
PREFIX = "Let's solve this problem. "
"""What the virtual preview puts before every answer (public code); a model trained so says it, and judges see it."""


class LookaheadSettings(Section):
    """Settings of ``lookahead``."""

    mode: Literal["real", "virtual"] = "real"
    """Whether the preview is of the answer's own first words, or a sentence that then begins every answer."""
    words: Count = 4
    """Words of a real preview (published: 6 tokens), of an answer with fewer than twice as many half of its words (ours)."""


def lookahead(rows: Rows) -> list[Row]:
    """Return the user's rows with previews; a row that is too long with one, or has an answer of one word, stays as it is."""
    settings = rows.get(LookaheadSettings)
    found = [preview(row, settings) for row in rows.user]
    return [new if rows.fits(new) else old for new, old in zip(found, rows.user, strict=True)]


def preview(row: Row, settings: LookaheadSettings) -> Row:
    """Return a row with its preview, under the id of what it is then."""
    words = re.findall(r"\S+\s*", row.response)
    shown, answer = PREFIX, PREFIX + row.response
    if settings.mode == "real":
        shown, answer = "".join(words[: min(settings.words, len(words) // 2)]).rstrip(), row.response
    if not shown:
        return row
    prompt = question(row) + CONNECTOR + shown
    return replace(row, id=row_id(prompt, answer, "", row.history), prompt=prompt, input="", response=answer)
