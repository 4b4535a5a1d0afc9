from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.panacea import PanaceaSettings, step_away

Tensors = dict[str, torch.Tensor]
SETTINGS = PanaceaSettings(rho=0.3, lambda_=0.7)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradient_is_that_of_the_objective_with_the_jacobian_as_identity(
    accumulation: int,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., Tensors],
    apart: Callable[..., tuple[float, float]],
):
    user, harmful = pair
    taken = bench("panacea", accumulation=accumulation).take(user, harmful, SETTINGS, total=4)
    model = adapted()
    g = by_autograd(model, per_sample_nll(model, user).mean())
    h = by_autograd(model, per_sample_nll(model, harmful).mean())
    length = float(sum((one.double() ** 2).sum() for one in h.values())) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in h:
                parameter += 0.3 * h[name] / length
    there = by_autograd(model, per_sample_nll(model, harmful).mean())
    expected = {name: g[name] - 0.7 * (there[name] - h[name]) for name in g}
    angle, length = apart(taken.gradients, expected)
    assert (angle < 1e-6, length < 1e-3) == (True, True)
    assert apart(expected, g)[0] > 1e-4
    assert taken.step.measured["harmful_rise"] > 0


def test_the_weights_are_the_same_to_the_bit_after_the_probe(bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    running = bench("panacea")
    before = running.weights()
    running.take(*pair, SETTINGS, apply=False, total=4)
    assert all(torch.equal(before[name], weight) for name, weight in running.weights().items())


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_last_step_is_as_long_as_it_should_be_and_raises_the_harmful_loss(
    zero_stage: int, bench: Callable[..., Any], pair: tuple[Batch, Batch]
):
    running = bench("panacea", zero_stage=zero_stage)
    before = running.weights()
    loss = float(per_sample_nll(running.engine.module, pair[1]).mean().detach())
    step_away(running.step(*pair, SETTINGS, number=4, total=4))
    after = running.weights()
    assert float(sum(((after[n] - before[n]).double() ** 2).sum() for n in after)) ** 0.5 == pytest.approx(0.3, rel=1e-4)
    assert float(per_sample_nll(running.engine.module, pair[1]).mean().detach()) > loss + 0.01


def test_without_the_outer_term_it_is_plain_until_the_last_step(bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    ours = bench("panacea").take(*pair, PanaceaSettings.model_validate({"lambda": 0}), total=4)
    theirs = bench("sft").take(*pair, total=4)
    assert all(torch.equal(ours.gradients[name], one) for name, one in theirs.gradients.items())
    assert ours.step.forwards == 1
