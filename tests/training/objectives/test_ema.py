from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.training.objectives.ema import EmaSettings, decay, take_mean

STEPS = 5


@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize("kept", [0.0, 0.2, 1.0])
def test_what_is_kept_is_the_running_mean_and_the_start_weighs_as_much_as_it_should(
    kept: float, zero_stage: int, bench: Callable[..., Any], pair: tuple[Batch, Batch]
):
    running, settings = bench("ema", zero_stage=zero_stage), EmaSettings(kept=kept)
    path = [running.weights()]
    for number in range(STEPS):
        running.take(pair[0], None, settings, number=number, total=STEPS)
        path.append(running.weights())
    take_mean(running.step(pair[0], None, settings, number=STEPS, total=STEPS))
    rate = decay(kept, STEPS)
    assert rate**STEPS == pytest.approx(kept)
    found = running.weights()
    for name in found:
        mean = path[0][name].double()
        for weights in path[1:]:
            mean = rate * mean + (1 - rate) * weights[name].double()
        assert torch.allclose(found[name].double(), mean, atol=1e-6), name
    trained = [name for name in found if not torch.equal(path[0][name], path[-1][name])]
    assert trained
    if kept in (0.0, 1.0):
        assert all(torch.allclose(found[name], path[-1 if kept == 0 else 0][name], atol=1e-7) for name in trained)


def test_training_itself_is_plain(bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    ends = []
    for objective in ("ema", "sft"):
        running = bench(objective)
        for number in range(3):
            running.take(pair[0], number=number, total=3)
        ends.append(running.weights())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
