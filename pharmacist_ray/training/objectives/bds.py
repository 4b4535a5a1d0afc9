"""BDS: every row of a fine-tune has a weight, which falls where its loss stays high beside that of safe rows (NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pharmacist_ray.config.section import Positive, Section
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.step import Step

BETAS, TINY = (0.9, 0.95), 1e-8
"""Adam's on the logits (public code)."""


class BdsSettings(Section):
    """Settings of ``bds``."""

    lr: Positive = 5e-3
    """Learning rate of the logits (public code: 5e-3; Adam)."""


def bds(step: Step) -> Iterator[torch.Tensor]:
    """Yield f(θ) + mean_b p_i ℓ_i(θ), p = N·softmax(ω) over the N rows of the fine-tune, and then take a step of Adam on ω.

    f is the loss on as many safe rows; ω minimises mean_b p_i ℓ_i with the losses taken as constants: SEAL's loop (arXiv 2410.07471)
    as the Bayesian Data Scheduler's public code runs it, γ = −1 there, without the noise of its paper's Langevin step, which that code
    does not have. Two passes; 3 numbers a row on every worker.

    Args:
        step: The step; gets ``weight_spread``, the standard deviation of p.
    """
    logits = step.state.setdefault("bds:logits", torch.zeros(step.set_size, dtype=torch.float64))
    weights = (len(logits) * torch.softmax(logits, 0)).to(step.ranks.device, torch.float32)
    found = []
    for index, (batch, safe, rows) in enumerate(zip(step.batches, step.safe, step.rows, strict=True)):
        mine = weights[torch.as_tensor(rows, device=weights.device)]
        with step.same_dropout("align", index):
            step.forwards += 1
            losses = per_sample_nll(step.engine, batch)
        with step.same_dropout("safe", index):
            anchor = step.loss(safe)
        found.append(losses.detach().double())
        yield anchor + (mine * losses).mean()
    everyone = step.ranks.gather(torch.cat(found)).cpu()
    numbers = torch.as_tensor([row for micro in step.rows for row in micro], device=step.ranks.device)
    _update(step, logits_gradient(logits, step.ranks.gather(numbers).cpu(), everyone))
    step.measured["weight_spread"] = float(weights.std())


def logits_gradient(logits: torch.Tensor, rows: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Return ∂/∂ω of mean_b p_i ℓ_i with p = N·softmax(ω): p_i(Σ_{b: i} ℓ_b / B − L/N), L the mean itself.

    Args:
        logits: ω, (N,).
        rows: Row numbers of a batch, (B,).
        losses: Their losses, (B,).
    """
    weights = len(logits) * torch.softmax(logits, 0)
    inside = torch.zeros_like(logits).index_add_(0, rows, losses.to(logits) / len(rows))
    return weights * (inside - (weights[rows] * losses.to(logits)).mean() / len(logits))


def _update(step: Step, gradient: torch.Tensor) -> None:
    """Take a step of Adam on the logits; every worker takes the same."""
    state, count = step.state, step.number + 1
    moments = []
    for name, beta, value in (("first", BETAS[0], gradient), ("second", BETAS[1], gradient.square())):
        before = state.get(f"bds:{name}", torch.zeros_like(gradient))
        state[f"bds:{name}"] = beta * before + (1 - beta) * value
        moments.append(state[f"bds:{name}"] / (1 - beta**count))
    state["bds:logits"] = state["bds:logits"] - step.get(BdsSettings).lr * moments[0] / (moments[1].sqrt() + TINY)
