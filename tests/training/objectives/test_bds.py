from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.bds import BdsSettings, logits_gradient

ROWS = 20


def test_the_gradient_of_the_logits_is_autograds():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, generator=generator, dtype=torch.float64).requires_grad_(True)
    rows, losses = torch.tensor([3, 7, 7, 0]), torch.rand(4, generator=generator, dtype=torch.float64)
    loss = (ROWS * torch.softmax(logits, 0)[rows] * losses).mean()
    (expected,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(logits_gradient(logits.detach(), rows, losses), expected)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_loss_is_the_safe_one_and_the_weighted_one_of_the_users_rows(
    accumulation: int,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., dict[str, torch.Tensor]],
    apart: Callable[..., tuple[float, float]],
):
    user, safe = pair
    running = bench("bds", accumulation=accumulation)
    logits = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    running.state["bds:logits"] = logits.clone()
    rows = [5, 3, 19, 0, 8, 9, 10, 2]
    taken = running.take(user, None, safe=safe, rows=rows, set_size=ROWS, total=2, apply=False)
    weights = ROWS * torch.softmax(logits, 0)
    assert float(weights.sum()) == pytest.approx(ROWS)
    model = adapted()
    losses = per_sample_nll(model, user)
    loss = per_sample_nll(model, safe).mean() + (weights[rows].float() * losses).mean()
    assert sum(taken.losses) / accumulation == pytest.approx(float(loss.detach()), rel=1e-5)
    assert max(apart(taken.gradients, by_autograd(model, loss))) < 1e-5
    # Adam's first step is lr in the direction of the gradient's sign.
    moved = running.state["bds:logits"] - logits
    gradient = logits_gradient(logits, torch.tensor(rows), losses.detach().double())
    assert torch.allclose(moved, -BdsSettings().lr * gradient / (gradient.abs() + 1e-8), atol=1e-6)


def test_rows_whose_loss_stays_high_lose_weight(bench: Callable[..., Any], batch_of: Callable[..., Batch]):
    user, safe = batch_of(8, seed=10), batch_of(8, seed=11)
    running = bench("bds", lr=0.0)
    losses = per_sample_nll(running.engine.module, user).detach()
    for number in range(40):
        running.take(user, None, BdsSettings(lr=0.3), number=number, safe=safe, rows=range(8), set_size=8, total=40)
    weights = torch.softmax(running.state["bds:logits"], 0)
    assert int(weights.argmax()) == int(losses.argmin())  # the rest is of one size: Adam makes all pushes alike
    assert float(weights[losses.argmax()]) < 0.01
