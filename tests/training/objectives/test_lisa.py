from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.lisa import LisaSettings

HELD = LisaSettings(rho=3.0, free_share=0.0, round_steps=5, safe_share=0.4)


def test_a_round_begins_with_its_safe_steps_and_goes_on_with_the_users(bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    user, safe = pair
    running = bench("lisa", lr=0.0)
    expected = {"safe": float(per_sample_nll(running.engine.module, safe).mean().detach())}
    expected["user"] = float(per_sample_nll(running.engine.module, user).mean().detach())
    losses = [running.take(user, None, HELD, number=n, safe=safe, total=10).losses[0] for n in range(10)]
    kinds = ["safe", "safe", "user", "user", "user"] * 2
    assert losses == pytest.approx([expected[kind] for kind in kinds], rel=1e-5)


@pytest.mark.parametrize(("total", "length"), [(40, 10), (5000, 1000), (1, 2)])
def test_a_short_fine_tune_goes_through_four_rounds_and_a_long_one_through_the_published(
    total: int, length: int, bench: Callable[..., Any], pair: tuple[Batch, Batch]
):
    user, safe = pair
    running = bench("lisa", lr=0.0)
    safe_loss = float(per_sample_nll(running.engine.module, safe).mean().detach())
    numbers = [0, length // 10 or 1, length - 1, length]
    losses = [running.take(user, None, number=n, safe=safe, total=total).losses[0] for n in numbers]
    assert [abs(loss - safe_loss) < 1e-6 for loss in losses] == [True, False, False, True]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradient_has_rho_times_the_way_since_the_turn_began(
    accumulation: int,
    bench: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., dict[str, torch.Tensor]],
    apart: Callable[..., tuple[float, float]],
):
    user, safe = pair
    running = bench("lisa", accumulation=accumulation)
    start = running.weights()
    first = running.take(user, None, HELD, number=0, safe=safe, total=10)
    model = running.engine.module
    assert first.step.measured["proximal_distance"] == 0
    second = running.take(user, None, HELD, number=1, safe=safe, total=10, apply=False)
    moved = {name: running.weights()[name] - start[name] for name in second.gradients}
    assert second.step.measured["proximal_distance"] == pytest.approx(
        float(sum((one.double() ** 2).sum() for one in moved.values())) ** 0.5, rel=1e-6
    )
    plain = by_autograd(model, per_sample_nll(model, safe).mean())
    angle, length = apart(second.gradients, {name: plain[name] + 3.0 * moved[name] for name in plain})
    assert (angle < 1e-6, length < 1e-4) == (True, True)
    assert apart(second.gradients, plain)[0] > 1e-4  # the term is no small part of it


def test_the_turn_of_the_other_rows_begins_where_this_one_ended(bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    user, safe = pair
    running = bench("lisa")
    distances = []
    for number in range(5):
        distances.append(running.take(user, None, HELD, number=number, safe=safe, total=10).step.measured["proximal_distance"])
    assert [distance == 0 for distance in distances] == [True, False, True, False, False]


@pytest.mark.parametrize("free", [True, False])
def test_nothing_is_held_in_the_free_share_of_the_run(
    free: bool, bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
):
    user, safe = pair
    settings = HELD.model_copy(update={"free_share": 0.5 if free else 0.0})
    gradients = []
    for rho in (3.0, 0.0):
        running = bench("lisa")
        running.take(user, None, HELD, number=0, safe=safe, total=10)
        used = settings.model_copy(update={"rho": rho})
        gradients.append(running.take(user, None, used, number=1, safe=safe, total=10, apply=False).gradients)
    assert (apart(*gradients)[0] < 1e-9) is free
