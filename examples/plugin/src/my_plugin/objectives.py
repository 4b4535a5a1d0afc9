"""Supervised fine-tuning with its loss scaled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pharmacist_ray.config.section import Positive, Section
from pharmacist_ray.training.objectives import Objective, Step


class ScaledSettings(Section):
    """Settings of ``scaled``."""

    scale: Positive = 1.0
    """Factor of the loss."""


def losses(step: Step) -> Iterator[torch.Tensor]:
    """Yield the SFT loss of every micro-batch times a factor.

    Args:
        step: The step.
    """
    settings = step.get(ScaledSettings)
    for index, batch in enumerate(step.batches):
        with step.same_dropout("align", index):
            loss = settings.scale * step.loss(batch)
        yield loss


scaled = Objective(losses, {"scaled": ScaledSettings})
