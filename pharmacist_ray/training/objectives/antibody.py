"""Antibody's alignment half: a flat region of the harmful loss, where harmful gradients are small (arXiv 2603.00498)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import ConfigDict, Field

from pharmacist_ray.config.section import Positive, Section
from pharmacist_ray.models.perturb import dot
from pharmacist_ray.training.objectives.booster import harmful_step
from pharmacist_ray.training.objectives.sft import sft
from pharmacist_ray.training.objectives.step import Step

Weight = Annotated[float, Field(ge=0.0)]

FLOOR = 1e-12
"""Squared length of the sharpness' gradient under which it has no direction to speak of (ours)."""


class AntibodySettings(Section):
    """Settings of ``antibody``; the paper's constants were not to be had, so these are ours but where another is named."""

    model_config = ConfigDict(populate_by_name=True)

    rho: Positive = 0.1
    """Radius ρ of the ball in which the harmful loss is to be flat; Booster's α."""
    xi: Weight = 0.1
    """The share ξ of its own squared length by which the sharpness' gradient goes down at least. With 0 flatness is switched off
    wherever it agrees with the alignment anyway."""
    cap: Positive = 10.0
    """Largest weight λ of the sharpness, which has no bound where its gradient vanishes."""
    lambda_: Positive | None = Field(None, alias="lambda")
    """A constant λ in the place of the one that ξ asks for at each step; with it and ``refusal: 0`` this is Booster."""
    refusal: Weight = 1.0
    """Weight λ_r of the alignment loss after the harmful step."""


def antibody(step: Step) -> Iterator[torch.Tensor]:
    """Yield f(θ) + λ[h(θ) − h(θ')] + λ_r·f(θ'), θ' = θ − ρ∇h/‖∇h‖ and its Jacobian taken as the identity (arXiv 2603.00498).

    The update is δ = ∇f + λ·g_s + λ_r·∇f(θ'), g_s = ∇h(θ) − ∇h(θ') the gradient of the sharpness, with λ = max(0, ξ − ⟨g_s, ∇f⟩/‖g_s‖²),
    the smallest for which ⟨∇f + λ·g_s, g_s⟩ ≥ ξ‖g_s‖². The third term keeps refusals alive once harm has been learnt for a step; its
    rows are the alignment's own (the paper's are refusals of the harmful prompts: variant). Five passes, one less with a constant λ and
    one less without the third term; memory as Booster's and one gradient more.

    Args:
        step: The step; gets what `harmful_step` measures, and ``flatness_weight``, the λ of the step.
    """
    settings = step.get(AntibodySettings)
    loss = partial(step.loss, aside=True)

    def refusals() -> tuple[dict[str, torch.Tensor], float]:
        return step.mean_gradient(step.batches, "align", loss) if settings.refusal else ({}, 0.0)

    sharpness, drop, (held, after) = harmful_step(step, settings.rho, refusals)
    if settings.lambda_ is None:
        own, _ = step.mean_gradient(step.batches, "align", loss)
        weight = flatness_weight(list(own.values()), list(sharpness.values()), settings.xi, settings.cap)
        del own
    else:
        weight = settings.lambda_
    step.measured["flatness_weight"] = weight
    for value in sft(step):
        with step.added_gradients(sharpness, weight), step.added_gradients(held, settings.refusal):
            yield value + weight * drop + settings.refusal * after


def flatness_weight(own: Sequence[torch.Tensor], sharpness: Sequence[torch.Tensor], xi: float, cap: float) -> float:
    """Return λ = max(0, ξ − ⟨g_s, ∇f⟩ / ‖g_s‖²), at most ``cap``; 0 where g_s vanishes.

    Args:
        own: ∇f, a tensor per parameter.
        sharpness: g_s, of the same shapes.
        xi: ξ.
        cap: The largest.
    """
    square = float(dot(sharpness, sharpness))
    return min(cap, max(0.0, xi - float(dot(sharpness, own)) / square)) if square > FLOOR else 0.0
