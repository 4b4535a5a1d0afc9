"""Vaccine: alignment under the worst perturbation of the hidden embeddings (arXiv 2402.01109)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from pharmacist_ray.config.section import Positive, Section
from pharmacist_ray.models.taps import gradients_at, modules_at, shifted
from pharmacist_ray.training.objectives.step import Step
from pharmacist_ray.training.weights import release_gathered

TINY = 1e-7
"""Added to norms that divide (the public code's value)."""


class VaccineSettings(Section):
    """Settings of ``vaccine``."""

    rho: Positive = 2.0
    """Perturbation intensity ρ, the radius of the joint ball (Vaccine's public code: 2; Booster's runs of it: 5). It does not carry
    over between batch sizes, lengths and depths: per token it shrinks with the root of their product."""
    scope: Literal["batch", "sample"] = "batch"
    """Whether the whole batch, over all workers, shares one ball (published), or every sample has its own (ours)."""
    taps: Literal["attention", "layer"] = "attention"
    """What is perturbed: the self-attention's output (public code), or the decoder layer's (as the paper's text reads)."""


def vaccine(step: Step) -> Iterator[torch.Tensor]:
    """Yield f̃(θ; ε*), the loss with ε_l* = ρ g_l / ‖(g_1, …, g_L)‖ added to the hidden embedding of every layer l.

    g_l = ∂f/∂e_l comes from a first pass; the norm is one over all layers, tokens, samples, micro-batches and workers (arXiv
    2402.01109, the first-order solution of its inner problem). Two passes. The ε of all micro-batches are held at once: L·B·T·H
    numbers per worker.

    Args:
        step: The step.
    """
    settings = step.get(VaccineSettings)
    yield from perturbed_embeddings(step, modules_at(step.model, settings.taps), settings.rho, settings.scope)


def vaccine_fits(model: nn.Module, settings: Mapping[type[Section], Section]) -> None:
    """Raise a ModelError if a model has nothing to perturb."""
    chosen = settings[VaccineSettings]
    assert isinstance(chosen, VaccineSettings)
    modules_at(model, chosen.taps)


def perturbed_embeddings(
    step: Step, modules: Sequence[nn.Module], rho: float, scope: Literal["batch", "sample"] = "batch"
) -> Iterator[torch.Tensor]:
    """Yield the losses under the worst perturbation of some modules' outputs within the joint ball of radius ρ.

    Args:
        step: The step; gets ``embedding_perturbation_norm``.
        modules: What is perturbed.
        rho: The radius.
        scope: Whether the ball is the batch's or each sample's.
    """
    gradients = []
    for index, batch in enumerate(step.batches):
        with step.same_dropout("align", index):
            gradients.append(gradients_at(modules, partial(step.loss, batch, aside=True)))
        release_gathered(step.engine)
    squares = [torch.stack([g.double().square().flatten(1).sum(1) for g in layers]).sum(0) for layers in gradients]  # (B,) each
    total = step.ranks.total(torch.stack(squares).sum())
    reached = 0.0
    for index, (batch, layers, square) in enumerate(zip(step.batches, gradients, squares, strict=True)):
        scale = rho / (square.sqrt() if scope == "sample" else total.sqrt().expand_as(square)).add(TINY)
        shifts = [(g * scale.to(g.dtype)[:, None, None]) for g in layers]
        reached += float((square * scale.square()).sum())
        with step.same_dropout("align", index), shifted(modules, shifts):
            yield step.loss(batch)
    # With a ball per sample, the root of the mean square over samples.
    samples = sum(len(square) for square in squares) * step.ranks.workers if scope == "sample" else 1
    length = step.ranks.total(torch.tensor(reached, device=step.ranks.device)) / samples
    step.measured["embedding_perturbation_norm"] = float(length) ** 0.5
