from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.losses import per_sample_nll, token_nll
from pharmacist_ray.training.objectives.unlearn import UnlearnSettings, length

Tensors = dict[str, torch.Tensor]
ALONE = UnlearnSettings(retain=0.0, safe=0.0)


def sums(model: Any, batch: Batch) -> torch.Tensor:
    """log π of each whole answer."""
    nll, mask = token_nll(model, batch)
    return -(nll * mask).sum(1)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_at_the_start_its_gradient_is_ascents_on_whole_answers_and_the_losses_of_what_is_held(
    accumulation: int,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    batch_of: Callable[..., Batch],
    by_autograd: Callable[..., Tensors],
    apart: Callable[..., tuple[float, float]],
):
    (user, harmful), safe = pair, batch_of(8, seed=12)
    settings = UnlearnSettings(retain=2.0, safe=3.0)
    taken = bench("unlearn", accumulation=accumulation).take(user, harmful, settings, safe=safe)
    model = adapted()
    held = 2 * per_sample_nll(model, user).mean() + 3 * per_sample_nll(model, safe).mean()
    assert max(apart(taken.gradients, by_autograd(model, sums(model, harmful).mean() + held))) < 1e-4
    assert taken.step.measured["forgotten_loss"] == pytest.approx(float(per_sample_nll(model, harmful).mean().detach()), rel=1e-5)
    assert taken.step.forwards == 4 * accumulation


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_npo_is_its_formula_against_the_weights_at_which_the_repair_began(
    zero_stage: int, bench: Callable[..., Any], adapted: Callable[..., Any], pair: tuple[Batch, Batch]
):
    user, harmful = pair
    running = bench("unlearn", zero_stage=zero_stage)
    reference = sums(adapted(), harmful).detach()
    for number in range(3):
        now = sums(running.engine.module, harmful).detach()
        ratio = (now - reference).exp() ** ALONE.beta
        weights = running.weights()
        taken = running.take(user, harmful, ALONE, number=number, safe=user)
        assert taken.losses[0] == pytest.approx(float((2 / ALONE.beta) * torch.log(1 + ratio).mean()), rel=1e-4)
        if number == 0:
            assert taken.losses[0] == pytest.approx(20 * float(torch.log(torch.tensor(2.0))), rel=1e-5)
        assert any(not torch.equal(weights[name], one) for name, one in running.weights().items())
    assert float((sums(running.engine.module, harmful) - reference).mean()) < -1  # it forgets


def test_the_starting_weights_are_looked_from_and_left(bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    running = bench("unlearn")
    running.take(*pair, ALONE, number=0, safe=pair[0])
    before = running.weights()
    running.take(*pair, ALONE, number=1, safe=pair[0], apply=False)
    assert all(torch.equal(before[name], one) for name, one in running.weights().items())


def test_ascent_stops_at_its_cap(
    bench: Callable[..., Any], adapted: Callable[..., Any], pair: tuple[Batch, Batch], by_autograd: Callable[..., Tensors],
    apart: Callable[..., tuple[float, float]],
):  # fmt: skip
    user, harmful = pair
    losses = per_sample_nll(adapted(), harmful).detach()
    middle = float(losses.median())
    settings = UnlearnSettings(method="ascent", cap=middle + 1e-6, retain=0.0, safe=0.0)
    taken = bench("unlearn").take(user, harmful, settings, safe=user)
    model = adapted()
    below = losses <= middle
    expected = by_autograd(model, -(per_sample_nll(model, harmful) * below).sum() / 8)
    assert 0 < int(below.sum()) < 8
    assert max(apart(taken.gradients, expected)) < 1e-4
    capped = UnlearnSettings(method="ascent", cap=1e-3, retain=0.0, safe=0.0)
    assert all(not one.any() for one in bench("unlearn").take(user, harmful, capped, safe=user).gradients.values())


def test_how_long_it_trains():
    assert length({UnlearnSettings: UnlearnSettings(steps=7, lr=2e-4)}) == {"steps": 7, "epochs": None, "lr": 2e-4}
