"""EMA: what is kept of a fine-tune is the running mean of its weights, from where it began (arXiv 2508.12531)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pharmacist_ray.config.section import Section, Share
from pharmacist_ray.training.objectives.sft import sft
from pharmacist_ray.training.objectives.step import Step
from pharmacist_ray.training.weights import set_weights, whole_weights


class EmaSettings(Section):
    """Settings of ``ema``."""

    kept: Share = 0.1
    """Weight that the starting point still has at the end, η^T for T steps (ours: the paper's η says nothing without T; .995 over 500
    steps is .08)."""


def ema(step: Step) -> Iterator[torch.Tensor]:
    """Yield SFT's loss; beside it θ̃_t = η θ̃_(t−1) + (1 − η) θ_t is kept, θ̃_0 where the fine-tune began (arXiv 2508.12531).

    Training goes on from θ_t: the mean is a shadow. It is of A and B of an adapter each for itself, which is not the mean of their
    products. One pass, and the trained weights once more, in float32, on every worker.

    Args:
        step: The step.
    """
    _take_in(step)
    yield from sft(step)


def take_mean(step: Step) -> None:
    """Take the last weights in, and put the mean in their place."""
    _take_in(step)
    set_weights(step.engine, {name: step.state[f"ema:{name}"] for name, _ in whole_weights(step.engine)})


def decay(kept: float, steps: int) -> float:
    """Return η, of which η^steps is ``kept``."""
    return float(kept ** (1 / steps))


def _take_in(step: Step) -> None:
    """Take in the weights that the steps so far have led to; before the first one they are the mean."""
    rate = 1 - decay(step.get(EmaSettings).kept, step.total)
    for name, weight in whole_weights(step.engine):
        mean = step.state.get(f"ema:{name}")
        now = weight.float()
        step.state[f"ema:{name}"] = now.clone() if mean is None else torch.lerp(mean.to(now.device), now, rate)
