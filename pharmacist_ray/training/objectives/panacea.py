"""Panacea: after a fine-tune the weights take one step away from harm, for which the fine-tune made room (arXiv 2501.18100)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import ConfigDict, Field

from pharmacist_ray.config.section import Positive, Section
from pharmacist_ray.models.perturb import global_norm
from pharmacist_ray.training.objectives.booster import harmful_gradient
from pharmacist_ray.training.objectives.sft import sft
from pharmacist_ray.training.objectives.step import Step
from pharmacist_ray.training.objectives.vaccine import TINY
from pharmacist_ray.training.weights import perturbed_weights, set_weights, whole_weights


class PanaceaSettings(Section):
    """Settings of ``panacea``."""

    model_config = ConfigDict(populate_by_name=True)

    rho: Positive = 1.0
    """Length ρ of the step over all trained weights (published: 1, for an adapter of rank 32; what it does hangs on rank and scale)."""
    lambda_: Annotated[float, Field(alias="lambda", ge=0.0)] = 1e-3
    """Weight λ of the outer term (published: 1e-3); 0 leaves the fine-tune as it is and takes the last step alone."""


def panacea(step: Step) -> Iterator[torch.Tensor]:
    """Yield g(θ) with the gradient ∇g(θ) − λ(∇h(θ + ε) − ∇h(θ)), ε = ρ ∇h(θ) / ‖∇h(θ)‖ (arXiv 2501.18100).

    h is the loss on harmful answers; both its gradients are over the whole harmful batch of all workers. Losses are not clamped: the
    public code's clamp turns the term round where it holds. Three passes, one with λ = 0. See `step_away` for what follows the last
    step.

    Args:
        step: The step; gets ``harmful_loss`` and ``harmful_rise``.
    """
    settings = step.get(PanaceaSettings)
    if not settings.lambda_:
        yield from sft(step)
        return
    here, before = harmful_gradient(step)
    length = float(global_norm(list(here.values())))
    with perturbed_weights(step.engine, list(here.values()), settings.rho / (length + TINY)):
        there, after = harmful_gradient(step)
    step.measured |= {"harmful_loss": before, "harmful_rise": after - before}
    added = {name: here[name] - there[name] for name in here}
    del here, there
    for loss in sft(step):
        with step.added_gradients(added, settings.lambda_):
            yield loss


def step_away(step: Step) -> None:
    """Add ε to the trained weights, from several batches at the last point (the public code's is the last step's, from one batch)."""
    gradient, _ = harmful_gradient(step)
    scale = step.get(PanaceaSettings).rho / (float(global_norm(list(gradient.values()))) + TINY)
    moved = {name: weight.float() + scale * gradient[name].float() for name, weight in whole_weights(step.engine)}
    set_weights(step.engine, moved)
