"""Lisa: a fine-tune that goes back to safe rows in turns, and is held near where each turn began (arXiv 2405.18641)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field

from pharmacist_ray.config.section import Count, Positive, Section, Share
from pharmacist_ray.training.objectives.step import Step
from pharmacist_ray.training.weights import whole_weights

ROUND, ROUNDS = 1000, 4
"""Steps of a round (published: 100 safe ones and 900 of the user's); a shorter fine-tune goes through so many rounds (ours)."""


class LisaSettings(Section):
    """Settings of ``lisa``."""

    rho: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight ρ of the proximal term (published: 1; 0 is the paper's bi-state baseline)."""
    safe_share: Positive = 0.1
    """Share of a round's steps that is on safe rows (published: 0.1)."""
    round_steps: Count | None = None
    """Steps of a round, the safe ones first; default: 1000 as published, and a quarter of a fine-tune that is shorter than 4000."""
    free_share: Share = 0.1
    """Share of the run at whose beginning nothing is held (public code: 0.1; paper: 0)."""


def lisa(step: Step) -> Iterator[torch.Tensor]:
    """Yield f(θ) in safe steps and g(θ) in the user's, each with the gradient ρ(θ − θ') added (arXiv 2405.18641, Algorithm 1).

    θ' are the weights at which the present turn began, which is where the other one ended. The term acts on A and B of an adapter each
    for itself, and goes through Adam as in the public code. The user's rows of a safe step are passed over, as there; every epoch has
    another order. One pass, and the trained weights once more, in float32, on every worker.

    Args:
        step: The step; gets ``proximal_distance``, ‖θ − θ'‖.
    """
    settings = step.get(LisaSettings)
    length = settings.round_steps or min(ROUND, max(2, step.total // ROUNDS))
    safe_steps = min(length - 1, max(1, round(settings.safe_share * length))) if length > 1 else 0
    place = step.number % length
    weights = {name: weight.float() for name, weight in whole_weights(step.engine)}
    if place in (0, safe_steps):
        step.state |= {f"lisa:{name}": weight.clone() for name, weight in weights.items()}
    away = {name: weight - step.state[f"lisa:{name}"].to(weight.device) for name, weight in weights.items()}
    step.measured["proximal_distance"] = float(torch.stack([one.double().square().sum() for one in away.values()]).sum()) ** 0.5
    held = settings.rho > 0 and step.number >= settings.free_share * step.total
    for index, batch in enumerate(step.safe if place < safe_steps else step.batches):
        with step.same_dropout("align", index), step.added_gradients(away if held else {}, settings.rho):
            yield step.loss(batch)
