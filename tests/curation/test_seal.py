from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pharmacist_ray.config.schema import SealConfig
from pharmacist_ray.curation.seal import BilevelSelector
from pharmacist_ray.curation.selector import Point
from pharmacist_ray.data.batches import BatchOrder
from pharmacist_ray.data.render import Rendered
from pharmacist_ray.data.schema import Row
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.runtime.ranks import Ranks
from tests.curation.test_selector import ALONE, make_world
from tests.two_workers import TwoWorkers

CONFIG = SealConfig(steps=8, batch_size=6, lr=1e-2, logits_lr=0.1, safe_weight=0.7)


class World:
    """A point with a fresh selector, and its two sets of samples."""

    def __init__(self, model_folder: Path, rows: list[list[Row]], config: SealConfig = CONFIG, ranks: Ranks = ALONE) -> None:
        made = make_world(model_folder, [*rows, []], ranks)
        self.point, self.candidates, self.validation = made.point, made.candidates, made.validation
        self.selector = BilevelSelector(self.point, len(self.candidates), config, seed=5)

    def iterate(self, times: int = 1) -> list[dict[str, float]]:
        return [self.selector.iterate(self.point, self.candidates.__getitem__, self.validation) for _ in range(times)]


@pytest.fixture(scope="module")
def sets(rows_of: Callable[..., list[Row]]) -> list[list[Row]]:
    return [rows_of(20, seed=1), rows_of(4, seed=2)]  # fewer trusted rows than a batch: each is in every step


@pytest.fixture
def world(model_folder: Path, sets: list[list[Row]]) -> World:
    return World(model_folder, sets)


def losses(point: Point, samples: list[Rendered]) -> torch.Tensor:
    """One pass a sample."""
    return torch.stack([per_sample_nll(point.model, point.collate([one]))[0] for one in samples])


@pytest.mark.parametrize("faithful_to", ["paper", "code"])
def test_two_iterations_are_those_of_the_formulas(model_folder: Path, sets: list[list[Row]], faithful_to: str) -> None:
    """Against plain autograd and Adam written out, on a second model."""
    config = CONFIG.model_copy(update={"faithful_to": faithful_to})
    world, other = World(model_folder, sets, config), World(model_folder, sets, config)
    reports = world.iterate(2)

    point = other.point
    parameters = list(point.parameters.values())
    theta = [parameter.detach().clone() for parameter in parameters]
    values = {"safe": theta, "user": [one.clone() for one in theta]}
    moments = {level: [(torch.zeros_like(one), torch.zeros_like(one)) for one in theta] for level in values}
    omega, squares = torch.zeros(20, dtype=torch.float64), 0.0
    s = config.safe_weight

    def at(level: str, loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.no_grad():
            for parameter, value in zip(parameters, values[level], strict=True):
                parameter.copy_(value)
        found = loss()
        return found.detach(), list(torch.autograd.grad(found, parameters))

    for number in (1, 2):
        rows = BatchOrder(20, 6, 5).batch(number - 1)
        batch = [other.candidates[row] for row in rows]
        sigma = torch.softmax(omega[rows].float(), dim=0)
        mixed, safe_step = at(
            "safe",
            lambda sigma=sigma, batch=batch: s * losses(point, other.validation).mean() + (1 - s) * sigma @ losses(point, batch),
        )
        with torch.no_grad():
            at_safe = losses(point, batch)
            trusted = losses(point, other.validation).mean()
        _, user_step = at("user", lambda sigma=sigma, batch=batch: sigma @ losses(point, batch))
        with torch.no_grad():
            at_user = losses(point, batch)
        assert reports[number - 1]["safe_loss"] == pytest.approx(float(trusted), rel=1e-5)
        assert s * reports[number - 1]["safe_loss"] + (1 - s) * reports[number - 1]["user_loss"] == pytest.approx(
            float(mixed), rel=1e-5
        )
        d = (at_safe - at_user if faithful_to == "paper" else at_safe).double()
        step = sigma * (d - (sigma * d).sum()) * 6
        squares = 0.999 * squares + 0.001 * float((step**2).mean())
        if number == 1 and faithful_to == "paper":
            assert float(d.abs().max()) == 0  # the two levels begin at the same place, and no logit moves
        else:
            omega[rows] -= 0.1 * step / math.sqrt(squares / (1 - 0.999**number))
        for level, gradients in (("safe", safe_step), ("user", user_step)):
            for place, gradient in enumerate(gradients):
                m, v = moments[level][place]
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                moments[level][place] = m, v
                values[level][place] = values[level][place] - 1e-2 * (m / (1 - 0.9**number)) / (
                    (v / (1 - 0.999**number)).sqrt() + 1e-8
                )
    assert torch.allclose(world.selector.logits.double(), omega, atol=2e-4)
    assert float(omega.abs().max()) > 0.01
    for mine, theirs in zip(world.point.parameters.values(), values["safe"], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    if faithful_to == "paper":
        for mine, theirs in zip(world.selector.user, values["user"], strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


def test_rows_of_equal_loss_difference_keep_their_logits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Point.losses_and_gradient

    def flat(self: Point, samples: Any, weights: Any = None) -> Any:
        found, gradient = real(self, samples, weights)
        return torch.full_like(found, 3.0), gradient

    monkeypatch.setattr(Point, "losses_and_gradient", flat)
    world.iterate(4)
    assert float(world.selector.logits.abs().max()) == 0


def test_logits_of_a_batch_move_by_steps_that_sum_to_zero_under_its_weights(world: World) -> None:
    world.iterate(3)
    before = world.selector.logits.clone()
    world.iterate()
    moved = world.selector.logits - before
    rows = BatchOrder(20, 6, 5).batch(3)
    assert set(torch.nonzero(moved).flatten().tolist()) <= set(rows)
    assert float(moved.abs().max()) > 0
    assert float(moved.sum()) == pytest.approx(0, abs=0.2 * float(moved.abs().max()))  # nearly even weights so early


def test_a_resumed_selector_goes_on_bit_by_bit(model_folder: Path, sets: list[list[Row]], tmp_path: Path) -> None:
    whole, first, second = (World(model_folder, sets) for _ in range(3))
    whole.iterate(7)
    first.iterate(4)
    save_file({name: tensor.contiguous() for name, tensor in first.selector.state().items()}, tmp_path / "state.safetensors")
    second.selector.load(load_file(tmp_path / "state.safetensors"))
    second.iterate(3)
    assert second.selector.iteration == 7
    assert torch.equal(second.selector.logits, whole.selector.logits)
    for mine, theirs in zip(second.selector.safe + second.selector.user, whole.selector.safe + whole.selector.user, strict=True):
        assert torch.equal(mine, theirs)


def test_candidates_that_contradict_the_trusted_rows_end_below_the_others(
    model_folder: Path, rows_of: Callable[..., list[Row]]
) -> None:
    """Trusted rows answer w1 w2 to everything; of the candidates half do so as well, the others answer w40 w41."""
    prompts = [row.prompt for row in rows_of(32, seed=9)]
    answers = ["w1 w2" if number % 2 else "w40 w41" for number in range(24)] + ["w1 w2"] * 8
    made = [
        Row(f"{number:032x}", prompt, answer, source="made")
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    world = World(model_folder, [made[:24], made[24:]], CONFIG.model_copy(update={"batch_size": 8, "lr": 2e-2}))
    world.iterate(24)
    logits = world.selector.logits.numpy()
    right = np.arange(24) % 2 == 1
    assert logits[right].mean() > logits[~right].mean()
    pairs = [(a > b) for a in logits[right] for b in logits[~right]]
    assert np.mean(pairs) > 0.9


def _on_each(payload: tuple[Path, list[list[Row]]], ranks: Ranks) -> list[float]:
    world = World(*payload, ranks=ranks)
    world.iterate(4)
    return list(world.selector.logits.tolist())


def test_two_workers_learn_what_one_does(
    model_folder: Path, sets: list[list[Row]], two_workers: TwoWorkers, world: World
) -> None:
    world.iterate(4)
    assert two_workers(_on_each, (model_folder, sets)) == pytest.approx(world.selector.logits.tolist(), abs=2e-4)
