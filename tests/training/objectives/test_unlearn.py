from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.losses import per_sample_nll, token_nll
from pharmacist_ray.training.objectives.unlearn import UnlearnSettings, length, weights_of

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


def attributions(model: Any, user: Batch, harmful: Batch, by_autograd: Callable[..., Tensors]) -> torch.Tensor:
    """⟨∇ℓ_i, ∇ℓ_r⟩ of each harmful row, one backward pass each."""
    retained = by_autograd(model, per_sample_nll(model, user).mean())
    found = []
    for row in range(len(harmful)):
        one = Batch(*(tensor[row : row + 1] for tensor in (harmful.input_ids, harmful.attention_mask, harmful.labels)))
        own = by_autograd(model, per_sample_nll(model, one).mean())
        found.append(sum(float((own[name].double() * retained[name].double()).sum()) for name in own))
    return torch.tensor(found)


@pytest.mark.parametrize("method", ["npo", "ascent"])
@pytest.mark.parametrize(("accumulation", "weights"), [(1, "lora"), (4, "lora"), (1, "full")])
def test_weighted_rows_count_the_less_the_more_forgetting_them_costs(
    method: Any,
    accumulation: int,
    weights: str,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., Tensors],
    apart: Callable[..., tuple[float, float]],
):
    user, harmful = pair
    settings = UnlearnSettings(retain=0.0, safe=0.0, weighted=True, method=method, cap=100.0)
    taken = bench("unlearn", accumulation=accumulation, weights=weights).take(user, harmful, settings, safe=user)
    model = adapted(weights=weights)
    a = attributions(model, user, harmful, by_autograd)
    w = torch.exp(-a / a.std(correction=0))
    w = 8 * w / w.sum()
    assert 0.2 < float(w.min()) / float(w.max()) < 0.9 or float(w.max() - w.min()) > 0.5
    losses = sums(model, harmful) if method == "npo" else -per_sample_nll(model, harmful)
    assert max(apart(taken.gradients, by_autograd(model, (w * losses).mean()))) < 1e-4
    assert taken.step.measured["least_weight"] == pytest.approx(float(w.min()), rel=1e-3)
    assert taken.step.forwards == accumulation * (6 if method == "npo" else 5)


def test_weights_have_mean_one_and_are_all_one_where_attributions_do_not_vary():
    a = torch.tensor([0.3, -2.0, 5.0, 0.0])
    assert float(weights_of(a).mean()) == pytest.approx(1.0)
    assert weights_of(a).argsort().tolist() == a.argsort(descending=True).tolist()
    assert torch.equal(weights_of(1000 * a), weights_of(a))  # no unit of the attributions matters
    assert torch.equal(weights_of(torch.full((3,), 7.0)), torch.ones(3))
    assert "weighted" not in UnlearnSettings().model_dump()


def test_how_long_it_trains():
    assert length({UnlearnSettings: UnlearnSettings(steps=7, lr=2e-4)}) == {"steps": 7, "epochs": None, "lr": 2e-4}
