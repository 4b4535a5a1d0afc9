"""Booster: alignment that leaves little to gain from one harmful step (arXiv 2409.01586)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from pydantic import ConfigDict, Field

from pharmacist_ray.config.section import Positive, Section
from pharmacist_ray.models.perturb import global_norm
from pharmacist_ray.training.objectives.sft import sft
from pharmacist_ray.training.objectives.step import Run, Step
from pharmacist_ray.training.objectives.vaccine import TINY, vaccine
from pharmacist_ray.training.weights import perturbed_weights

T = TypeVar("T")


class BoosterSettings(Section):
    """Settings of ``booster``."""

    model_config = ConfigDict(populate_by_name=True)

    lambda_: Positive = Field(5.0, alias="lambda")
    """Weight λ of the regulariser (public scripts: 5)."""
    alpha: Positive = 0.1
    """Perturbation intensity α, the length of the simulated harmful step (public scripts: 0.1)."""


def booster(step: Step, base: Run = sft) -> Iterator[torch.Tensor]:
    """Yield f(θ) + λ[h(θ) − h(θ − α∇h(θ)/‖∇h(θ)‖)] with the Jacobian of the perturbed point taken as the identity.

    The gradient is ∇f(θ) + λ(∇h(θ) − ∇h(θ')) (arXiv 2409.01586, its first-order update), both harmful gradients over the whole
    harmful batch of all workers, and ‖·‖ one norm over all trained weights. Three passes. Every worker holds two
    copies of the trained weights' gradients and its share of the weights once more, at ZeRO 3 too.

    Args:
        step: The step; gets what `harmful_step` measures.
        base: The alignment loss to add to.
    """
    settings = step.get(BoosterSettings)
    correction, drop, _ = harmful_step(step, settings.alpha, lambda: None)
    for loss in base(step):
        with step.added_gradients(correction, settings.lambda_):
            yield loss + settings.lambda_ * drop


def booster_vaccine(step: Step) -> Iterator[torch.Tensor]:
    """Yield Booster's objective with Vaccine's loss in the place of f (the public code's ``perturb_aware``). Four passes.

    Args:
        step: The step.
    """
    return booster(step, vaccine)


def harmful_step(step: Step, length: float, there: Callable[[], T]) -> tuple[dict[str, torch.Tensor], float, T]:
    """Return ∇h(θ) − ∇h(θ') by parameter, h(θ) − h(θ'), and what ``there`` returns at θ' = θ − length · ∇h/‖∇h‖; θ is put back.

    Args:
        step: The step; gets ``weight_perturbation_norm``, ``harmful_loss`` and ``harmful_drop``.
        length: Of the simulated harmful step.
        there: Called while the weights are θ'.
    """
    here, before = harmful_gradient(step)
    norm = float(global_norm(list(here.values())))
    with perturbed_weights(step.engine, list(here.values()), -length / (norm + TINY)):
        moved, after = harmful_gradient(step)
        found = there()
    step.measured |= {
        "weight_perturbation_norm": length * norm / (norm + TINY),
        "harmful_loss": before,
        "harmful_drop": before - after,
    }
    return {name: here[name] - moved[name] for name in here}, before - after, found


def harmful_gradient(step: Step) -> tuple[dict[str, torch.Tensor], float]:
    """Return ∇h by parameter and h over all workers' harmful micro-batches, with the same dropout at every call in a step."""
    return step.mean_gradient(step.harmful, "harmful", partial(step.loss, aside=True))
