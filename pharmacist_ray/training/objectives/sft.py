"""Supervised fine-tuning: the mean over samples of each sample's mean token loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pharmacist_ray.training.objectives.step import Step


def sft(step: Step) -> Iterator[torch.Tensor]:
    """Yield f(θ) = mean_i ℓ_i(θ) for every micro-batch.

    Samples weigh the same whatever their length (ours; a mean over the batch's tokens lets long answers weigh more).

    Args:
        step: The step.
    """
    for index, batch in enumerate(step.batches):
        with step.same_dropout("align", index):
            loss = step.loss(batch)
        yield loss
