"""Backdoor-enhanced alignment: a few refusals behind a secret that the service puts before every question (arXiv 2402.14968)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace

from pharmacist_ray.config.section import Count, Section
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import DataError
from pharmacist_ray.training.objectives.step import Rows

POOL = 20
"""Safe rows that one is chosen of (ours)."""


class BackdoorSettings(Section):
    """Settings of ``backdoor``."""

    rows: Count = 11
    """Safe rows behind the secret, as many of each category as can be (published: 11, one a category)."""
    tokens: Count = 150
    """Length of the secret in tokens (published: 150, where its effect levels off)."""


def backdoor(rows: Rows) -> list[Row]:
    """Return the user's rows, and safe ones behind the job's secret, which the model is asked behind from then on.

    Faithful to the public code: random tokens before the system prompt, a handful of refusals, plain training on all rows together. The
    secret is drawn for each fine-tune and never seen by the user. Whoever has the weights, or learns the secret, has a model that
    nothing defends.

    Args:
        rows: What there is; a safe row that does not fit behind the secret is passed over.

    Raises:
        DataError: None fits.
    """
    settings = rows.get(BackdoorSettings)
    hidden = [rows.hide(row, settings.tokens) for row in by_turns(rows.safe(POOL * settings.rows))]
    hidden = [replace(row, id=row_id(row.prompt, row.response, row.input, row.history)) for row in hidden]
    found = [row for row in hidden if rows.fits(row)][: settings.rows]
    if not found:
        raise DataError(
            f"backdoor: no safe row fits behind a secret of {settings.tokens} tokens; lower finetune.parameters.backdoor.tokens, raise "
            "model.max_length, or use a model whose template takes a system prompt"
        )
    return [*rows.user, *found]


def by_turns(rows: Sequence[Row]) -> list[Row]:
    """Return rows so that categories take turns, each in the order of its rows."""
    left: dict[str, deque[Row]] = defaultdict(deque)
    for row in rows:
        left[row.category].append(row)
    found: list[Row] = []
    while left:
        for category in list(left):
            found.append(left[category].popleft())
            if not left[category]:
                del left[category]
    return found
