"""SafeGrad: the part of a fine-tune's gradient that works against safety is taken out (arXiv 2508.07172)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import Field

from pharmacist_ray.config.section import Section
from pharmacist_ray.models.perturb import dot
from pharmacist_ray.training.objectives.step import Step

FLOOR = 1e-12
"""Squared length of the safe gradient under which there is no direction to speak of, as at the first step, where it is 0 (ours)."""


class SafeGradSettings(Section):
    """Settings of ``safegrad``."""

    rho: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight ρ of the safe gradient itself (published: 1)."""


def safegrad(step: Step) -> Iterator[torch.Tensor]:
    """Yield g(θ) with the gradient g_u + c·g_a, c = ρ + max(0, −⟨g_u, g_a⟩ / ‖g_a‖²) (arXiv 2508.07172).

    g_u is the gradient of the user's batch and g_a that of KL(p_θ0 ‖ p_θ) on answers to harmful prompts, θ0 the model before the
    fine-tune; both over the whole batch of all workers and all trained weights as one vector. Where the two agree nothing is taken
    out. The divergence is over answer tokens alone and without dropout, so that it begins at 0 (the public code counts prompt and
    padding, and has dropout on). Three passes with a backward and one without: the user's batch is passed twice, so that every ZeRO
    stage can take the change.

    Args:
        step: The step; gets ``gradient_cosine`` of the two, and ``safe_divergence`` in nats.
    """
    settings = step.get(SafeGradSettings)
    user, _ = step.mean_gradient(step.batches, "align", partial(step.loss, aside=True))
    safe, divergence = step.mean_gradient(step.safe, "safe", partial(step.divergence, aside=True))
    factor, cosine = surgery(list(user.values()), list(safe.values()), settings.rho)
    step.measured |= {"gradient_cosine": cosine, "safe_divergence": divergence}
    del user
    for index, batch in enumerate(step.batches):
        with step.same_dropout("align", index), step.added_gradients(safe, factor):
            yield step.loss(batch)


def surgery(user: Sequence[torch.Tensor], safe: Sequence[torch.Tensor], rho: float) -> tuple[float, float]:
    """Return how much of the safe gradient is added to the user's, c, and the cosine between the two.

    Args:
        user: g_u, a tensor per parameter.
        safe: g_a, of the same shapes.
        rho: ρ.
    """
    inner, square = float(dot(user, safe)), float(dot(safe, safe))
    if square < FLOOR:
        return rho, 0.0
    lengths = (square * float(dot(user, user))) ** 0.5
    return rho + max(0.0, -inner / square), inner / lengths if lengths else 0.0
