"""Unlearning: after a fine-tune known harm is unlearnt, while the user's task and refusals are held (NPO, arXiv 2404.05868)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from pharmacist_ray.config.section import Count, Positive, Section
from pharmacist_ray.models.influence import influence
from pharmacist_ray.models.losses import token_nll
from pharmacist_ray.models.modes import without_dropout
from pharmacist_ray.training.objectives.step import Step, setting
from pharmacist_ray.training.weights import perturbed_weights, release_gathered, whole_weights

Weight = Annotated[float, Field(ge=0.0)]


class UnlearnSettings(Section):
    """Settings of ``unlearn``."""

    method: Literal["npo", "ascent"] = "npo"
    """Negative preference optimisation, or gradient ascent up to a cap: without one it diverges in tens of steps."""
    beta: Positive = 0.1
    """NPO's β (published: 0.1); the smaller, the longer it goes on like ascent."""
    cap: Positive = 6.0
    """Loss in nats a token at which ascent leaves an answer alone (ours; the logarithm of the vocabulary is chance)."""
    retain: Weight = 1.0
    """Weight of the loss on the user's own rows (published: 1)."""
    safe: Weight = 1.0
    """Weight of the loss on safe rows: forgetting alone leaves no refusal in the place of what is forgotten (ours)."""
    weighted: bool = Field(False, exclude_if=lambda weighted: not weighted)
    """Whether harmful rows count the less, the more forgetting them would cost the user's (GUARD, arXiv 2506.10946)."""
    steps: Count = 30
    """Optimiser steps (ours)."""
    lr: Positive = 1e-4
    """Learning rate (ours, for an adapter)."""


def unlearn(step: Step) -> Iterator[torch.Tensor]:
    """Yield L_forget(harmful) + retain·ℓ(user) + safe·ℓ(safe).

    NPO: L_forget = (2/β)·mean_i log(1 + (π_θ(y_i)/π_ref(y_i))^β), π over whole answers and ref the model when the repair began (arXiv
    2404.05868, equation 3). Its gradient is ascent's on the answers' log-probability times 2r^β/(1 + r^β), r the ratio: 1 at the start,
    towards 0 as an answer is forgotten. Ascent: −mean_i min(ℓ_i, cap), ℓ_i the mean token loss. The user's rows hold the attacker's as
    well; what is forgotten is what the service knows for harmful. Three passes, for NPO one forward more, at the starting weights,
    which every worker keeps in float32; weighted two passes more.

    Args:
        step: The step; gets ``forgotten_loss``, the mean token loss of the harmful answers, and, weighted, the ``least_weight`` of one.
    """
    settings = step.get(UnlearnSettings)
    weights = _weights(step) if settings.weighted else [torch.ones((), device=step.ranks.device)] * len(step.harmful)
    before = _reference(step) if settings.method == "npo" else [torch.zeros(())] * len(step.harmful)
    losses = []
    for index, (batch, harmful, safe) in enumerate(zip(step.batches, step.harmful, step.safe, strict=True)):
        with step.same_dropout("align", index):
            kept = settings.retain * step.loss(batch)
        with step.same_dropout("safe", index):
            kept = kept + settings.safe * step.loss(safe)
        with without_dropout(step.model):
            step.forwards += 1
            nll, mask = token_nll(step.engine, harmful)
        sums, counts = (nll * mask).sum(1), mask.sum(1)
        losses.append((sums / counts).detach().mean())
        if settings.method == "npo":
            gone = 2 / settings.beta * (weights[index] * F.softplus(-settings.beta * (sums - before[index]))).mean()
        else:
            gone = -(weights[index] * torch.clamp(sums / counts, max=settings.cap)).mean()
        yield gone + kept
    step.measured["forgotten_loss"] = float(step.ranks.mean([torch.stack(losses).mean()])[0])


def weights_of(attributions: torch.Tensor) -> torch.Tensor:
    """Return w = n·softmax(−a/τ), τ the standard deviation of a: (n,), with mean 1; all 1 where a does not vary.

    GUARD weighs inversely to how far a row is attributed what is to be retained (arXiv 2506.10946, of which no code was found); this form
    and its τ are ours.

    Args:
        attributions: a_i = ⟨∇ℓ_i, ∇ℓ_r⟩ of n harmful rows with the loss ℓ_r on what is retained, (n,).
    """
    spread = attributions.std(correction=0)
    return len(attributions) * torch.softmax(-attributions / spread, 0) if spread > 0 else torch.ones_like(attributions)


def _weights(step: Step) -> list[torch.Tensor]:
    """Return the weights of the harmful rows among those of all workers, a tensor (B,) a micro-batch."""
    retained, _ = step.mean_gradient(step.batches, "align", partial(step.loss, aside=True))
    directions = {name: gradient[None].float() for name, gradient in retained.items()}
    found = []
    for harmful in step.harmful:
        step.forwards += 1
        found.append(influence(step.model, harmful, directions, method="ghost").dots[:, 0])
        release_gathered(step.engine)
    everyone = weights_of(step.ranks.gather(torch.cat(found)))
    step.measured["least_weight"] = float(everyone.min())
    mine = everyone.view(step.ranks.workers, -1)[step.ranks.rank]
    return list(torch.split(mine, [len(one) for one in found]))


def length(settings: Mapping[type[Section], Section]) -> dict[str, Any]:
    """Return how long the repair trains, and at which rate."""
    mine = setting(settings, UnlearnSettings)
    return {"steps": mine.steps, "epochs": None, "lr": mine.lr}


def _reference(step: Step) -> list[torch.Tensor]:
    """Return −log π_ref(y_i) of the harmful rows, a tensor (B,) a micro-batch."""
    now = {name: weight.float() for name, weight in whole_weights(step.engine)}
    if step.number == 0:
        step.state |= {f"unlearn:{name}": weight.clone() for name, weight in now.items()}
    back = [step.state[f"unlearn:{name}"].to(weight.device) - weight for name, weight in now.items()]
    found = []
    with torch.no_grad(), perturbed_weights(step.engine, back, 1.0), without_dropout(step.model):
        for harmful in step.harmful:
            step.forwards += 1
            nll, mask = token_nll(step.model, harmful)
            found.append((nll * mask).sum(1))
            release_gathered(step.engine)
    return found
