"""A logistic regression between two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import softplus

RIDGE = 0.01
"""Weight of half the squared norm in the loss (ours)."""


@dataclass(frozen=True)
class Linear:
    """A logistic regression on standardised features."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: float

    def probability(self, features: np.ndarray) -> np.ndarray:
        """Return the probability of the first set for each row, (N,)."""
        logits = (features - self.mean) / self.scale @ self.weights + self.bias
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))))

    @property
    def slope(self) -> np.ndarray:
        """How the logit changes with the features as they are, (D,)."""
        return np.asarray(self.weights / self.scale)


def logistic(first: np.ndarray, second: np.ndarray) -> Linear:
    """Return the logistic regression between two sets that weigh the same, whatever their sizes, with `RIDGE`.

    Args:
        first: Features of the rows with label 1, (N, D).
        second: Features of those with label 0, (M, D).
    """
    both = np.concatenate([first, second]).astype(np.float64)
    mean, scale = both.mean(axis=0), both.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    features = torch.from_numpy((both - mean) / scale)
    signs = torch.cat([torch.ones(len(first)), -torch.ones(len(second))]).double()
    shares = torch.cat([torch.full((len(rows),), 0.5 / len(rows)) for rows in (first, second)]).double()
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = (shares * softplus(-signs * (features @ weights + bias))).sum() + RIDGE / 2 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return Linear(mean, scale, weights.detach().numpy(), float(bias.detach()))
