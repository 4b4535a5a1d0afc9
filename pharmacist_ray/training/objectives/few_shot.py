"""Few-shot repair: after a fine-tune the model is trained on a few refusals (SLDR's repair without its router; one-shot safety)."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from pharmacist_ray.config.section import Count, Positive, Section
from pharmacist_ray.training.objectives.step import setting


class FewShotSettings(Section):
    """Settings of ``few_shot``."""

    rows: Count = 60
    """Safe rows (30 are published to be enough, 100 the default there; a single one did harm on other prompts)."""
    epochs: Positive = 5.0
    """Passes over them (ours; published: 10 and 20)."""
    lr: Positive = 5e-4
    """Learning rate (published for adapters: 5e-4)."""
    batch_size: Count = 10
    """Rows per step (published: 10)."""


def few_shot(settings: Mapping[type[Section], Section]) -> dict[str, Any]:
    """Return what the repair's training has otherwise than the fine-tune."""
    mine = setting(settings, FewShotSettings)
    steps = ceil(mine.epochs * mine.rows / mine.batch_size)
    return {"steps": steps, "epochs": None, "lr": mine.lr, "batch_size": mine.batch_size, "rows": mine.rows}
