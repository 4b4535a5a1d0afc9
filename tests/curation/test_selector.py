from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch.nn.functional import cosine_similarity, cross_entropy

from pharmacist_ray.config.schema import LoraConfig, SelectorConfig
from pharmacist_ray.curation.selector import IterativeSelector, Point, attacked_direction, logit_gradient
from pharmacist_ray.data.render import Rendered, Renderer
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ResourceError
from pharmacist_ray.models.load import add_lora, load_model, load_tokenizer
from pharmacist_ray.models.modes import enable_checkpointing
from pharmacist_ray.runtime.ranks import Ranks
from tests.two_workers import TwoWorkers

ALONE = Ranks(0, 1, torch.device("cpu"))
CONFIG = SelectorConfig(mode="iterative", inner_lr=0.05, batch_size=6, intensity=0.2)


@dataclass
class World:
    """A point and three sets of samples."""

    point: Point
    candidates: list[Rendered]
    validation: list[Rendered]
    harmful: list[Rendered]

    def iterate(self, selector: IterativeSelector, times: int = 1) -> None:
        for _ in range(times):
            selector.iterate(self.point, self.candidates.__getitem__, self.validation, self.harmful)


def make_world(model_folder: Path, rows: list[list[Row]], ranks: Ranks = ALONE, tokens: int = 40) -> World:
    model = add_lora(load_model(model_folder, attn="eager"), LoraConfig(r=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    renderer = Renderer(load_tokenizer(model_folder), "plain", 32)
    sets = [[renderer.render(row) for row in part] for part in rows]
    return World(Point.at(model, renderer.collate, tokens, ranks), *sets)


@pytest.fixture(scope="module")
def sets(rows_of: Callable[..., list[Row]]) -> list[list[Row]]:
    return [rows_of(20, seed=1), rows_of(7, seed=2), rows_of(5, seed=3)]


@pytest.fixture(scope="module")
def world(model_folder: Path, sets: list[list[Row]]) -> World:
    return make_world(model_folder, sets)


@pytest.fixture(autouse=True)
def _nothing_moves_the_weights(world: World) -> Iterator[None]:
    before = bits(world.point)
    yield
    assert bits(world.point) == before


def bits(point: Point) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in point.model.state_dict().values()]


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def distance(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    return float((flat(got) - flat(want)).norm() / flat(want).norm())


def plain_loss(world: World, at: Sequence[torch.Tensor], samples: Sequence[Rendered], weights: Sequence[Any]) -> torch.Tensor:
    """Σ_i c_i ℓ_i with the adapter's weights given: one sample at a time, unpadded, the loss written out."""
    named = dict(zip(world.point.parameters, at, strict=True))
    total = torch.zeros(())
    for sample, weight in zip(samples, weights, strict=True):
        ids = torch.tensor([sample.ids])
        logits = torch.func.functional_call(world.point.model, named, (), {"input_ids": ids}).logits[0]
        total = total + weight * cross_entropy(logits[sample.answer_start - 1 : -1], ids[0, sample.answer_start :])
    return total


def plain_gradient(
    world: World, samples: Sequence[Rendered], weights: Sequence[float] | None = None, at: Sequence[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    at = [tensor.detach().requires_grad_() for tensor in at or world.point.parameters.values()]
    return list(torch.autograd.grad(plain_loss(world, at, samples, weights or [1 / len(samples)] * len(samples)), at))


def step(world: World, direction: Sequence[torch.Tensor], scale: float, at: Any = None) -> list[torch.Tensor]:
    return [p.detach() + scale * d for p, d in zip(at or world.point.parameters.values(), direction, strict=True)]


@pytest.mark.parametrize("tokens", [1, 40, 1000])
@pytest.mark.parametrize("weights", [None, [0.5, -1.0, 0.0, 2.0, 0.25, 1.0, 3.0]])
def test_the_gradient_is_that_of_the_weighted_loss_whatever_the_batch_size(
    model_folder: Path, sets: list[list[Row]], tokens: int, weights: list[float] | None
) -> None:
    world = make_world(model_folder, sets, tokens=tokens)
    got = world.point.gradient(world.validation, weights)
    assert distance(got, plain_gradient(world, world.validation, weights)) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_little_memory_or_recomputed_activations_the_gradient_is_the_same(
    model_folder: Path, sets: list[list[Row]], checkpointing: bool
) -> None:
    world = make_world(model_folder, sets, tokens=1000)
    if checkpointing:
        enable_checkpointing(world.point.model)
        world = replace(world, point=Point.at(world.point.model, world.point.collate, 1000, ALONE))
        assert any(module.training for module in world.point.model.modules())
    longest = max(len(sample.ids) for sample in world.candidates)
    room = 2 * longest

    def measure(_: Any, __: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    world.point.model.register_forward_pre_hook(measure, with_kwargs=True)
    v = world.point.gradient(world.validation)
    assert world.point.budget.tokens <= room
    got = v, world.point.gradient(world.candidates), world.point.influences(world.candidates, v)
    room = 1000
    assert distance(got[0], plain_gradient(world, world.validation)) < 1e-5
    assert distance(got[1], plain_gradient(world, world.candidates)) < 1e-5
    own = [flat(plain_gradient(world, [sample])) @ flat(v) for sample in world.candidates]
    torch.testing.assert_close(got[2].double(), torch.stack(own), rtol=1e-4, atol=1e-6)
    room = longest - 1
    with pytest.raises(
        ResourceError, match=rf"^fit: a row cannot be passed .*: its {longest} tokens do not fit in memory, even alone; set"
    ):
        world.point.gradient(world.candidates)


def test_only_the_adapter_is_the_space(world: World) -> None:
    assert world.point.parameters
    assert all("lora_" in name for name in world.point.parameters)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("inner_lr", [0.0, 0.5])
def test_the_attacked_direction_is_the_gradient_after_the_inner_and_the_harmful_step(
    world: World, normalised: bool, inner_lr: float
) -> None:
    inner = plain_gradient(world, world.candidates[:6])
    after_inner = step(world, inner, -inner_lr)
    attack = plain_gradient(world, world.harmful, at=after_inner)
    norm = float(flat(attack).norm()) if normalised else 1.0
    want = plain_gradient(world, world.validation, at=step(world, attack, -0.3 / norm, at=after_inner))
    got = attacked_direction(
        world.point, validation=world.validation, harmful=world.harmful, inner=inner, inner_lr=inner_lr, intensity=0.3,
        normalised=normalised,
    )  # fmt: skip
    assert distance(got, want) < 1e-4
    # The steps are large enough for the test to see each of them.
    assert distance(plain_gradient(world, world.validation, at=after_inner), want) > 1e-2
    if inner_lr:
        assert distance(plain_gradient(world, world.validation), want) > 1e-2


def test_without_attack_and_inner_step_the_direction_is_the_validation_gradient(world: World) -> None:
    want = plain_gradient(world, world.validation)
    for inner in (None, plain_gradient(world, world.candidates)):
        got = attacked_direction(
            world.point, validation=world.validation, harmful=world.harmful, inner=inner, inner_lr=0.0, intensity=0.0
        )
        assert distance(got, want) < 1e-5


def test_weights_are_restored_when_a_gradient_fails_in_the_attacked_model(world: World) -> None:
    with pytest.raises(IndexError):  # the fixture compares the bits
        attacked_direction(
            world.point, validation=[Rendered([1, 99999], 1)], harmful=world.harmful, inner=None, inner_lr=0.0, intensity=1.0
        )


def test_influences_are_the_products_with_each_samples_own_gradient(world: World) -> None:
    v = plain_gradient(world, world.validation)
    own = [flat(plain_gradient(world, [sample])) for sample in world.candidates]
    torch.testing.assert_close(
        world.point.influences(world.candidates, v).double(), torch.stack([g @ flat(v) for g in own]), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        world.point.influences(world.candidates, v, cosine=True).double(),
        torch.stack([g @ flat(v) / g.norm() for g in own]),
        rtol=1e-4,
        atol=1e-6,
    )


# The update of the logits against the hyper-gradient that autograd finds through the whole inner problem.


class Quadratic:
    """Stands for a Point: a sample is a function of θ."""

    def __init__(self, theta: torch.Tensor) -> None:
        self.parameters = {"theta": torch.nn.Parameter(theta.clone())}

    def gradient(self, samples: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> list[torch.Tensor]:
        (theta,) = self.parameters.values()
        return list(torch.autograd.grad(torch.stack([sample(theta) for sample in samples]).mean(), theta))


def bowl(seed: int, dimensions: int = 2) -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    centre = 2 * torch.randn(dimensions, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / dimensions + 0.2 * torch.eye(dimensions, dtype=torch.float64)
    return lambda theta: (theta - centre) @ matrix @ (theta - centre) / 2


@pytest.mark.parametrize("dimensions", [2, 5])
@pytest.mark.parametrize("intensity", [0.0, 0.01])
@pytest.mark.parametrize("inner_lr", [0.01, 0.3])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_update_is_the_hyper_gradient_on_a_quadratic(
    dimensions: int, intensity: float, inner_lr: float, normalised: bool
) -> None:
    f, h = bowl(1, dimensions), bowl(2, dimensions)
    g = [bowl(10 + i, dimensions) for i in range(8)]
    theta = torch.linspace(-1, 2, dimensions, dtype=torch.float64).requires_grad_()
    w = torch.linspace(-1, 1, 8, dtype=torch.float64).requires_grad_()

    gradients = [torch.autograd.grad(g_i(theta), theta)[0] for g_i in g]
    gamma = torch.softmax(w, 0)
    inner = theta.detach() - inner_lr * sum(c * d for c, d in zip(gamma, gradients, strict=True))
    (attack,) = torch.autograd.grad(h(inner), inner, create_graph=True)
    (want,) = torch.autograd.grad(f(inner - intensity * (attack / attack.norm() if normalised else attack)), w)

    weighted = sum(c * d for c, d in zip(gamma.detach(), gradients, strict=True))
    point: Any = Quadratic(theta.detach())
    (v,) = attacked_direction(
        point, validation=[f], harmful=[h], inner=[weighted], inner_lr=inner_lr, intensity=intensity, normalised=normalised
    )  # type: ignore[list-item]
    got = logit_gradient(torch.stack([d @ v for d in gradients]), gamma.detach(), inner_lr)
    assert float(cosine_similarity(got, -want, dim=0)) >= 0.999
    if intensity == 0:
        torch.testing.assert_close(got, -want)
    assert torch.equal(point.parameters["theta"].detach(), theta.detach())


@pytest.mark.parametrize(("intensity", "wanted"), [(0.0, 0.99999), (0.05, 0.98)])
def test_the_update_is_the_hyper_gradient_of_a_language_model(world: World, intensity: float, wanted: float) -> None:
    batch, inner_lr = world.candidates[:6], 0.1
    w = torch.linspace(-0.5, 0.5, 6).requires_grad_()
    theta = [p.detach().requires_grad_() for p in world.point.parameters.values()]
    inner = torch.autograd.grad(plain_loss(world, theta, batch, torch.softmax(w, 0)), theta, create_graph=True)
    after = [p - inner_lr * d for p, d in zip(theta, inner, strict=True)]
    attack = torch.autograd.grad(plain_loss(world, after, world.harmful, [1 / 5] * 5), after, create_graph=True)
    norm = torch.cat([d.flatten() for d in attack]).norm()
    attacked = [p - intensity * d / norm for p, d in zip(after, attack, strict=True)]
    (want,) = torch.autograd.grad(plain_loss(world, attacked, world.validation, [1 / 7] * 7), w)

    gamma = torch.softmax(w.detach(), 0)
    v = attacked_direction(
        world.point, validation=world.validation, harmful=world.harmful, inner=world.point.gradient(batch, gamma.tolist()),
        inner_lr=inner_lr, intensity=intensity,
    )  # fmt: skip
    got = logit_gradient(world.point.influences(batch, v), gamma, inner_lr)
    assert float(cosine_similarity(got, -want, dim=0)) > wanted
    assert float(got.norm() / want.norm()) == pytest.approx(1, rel=0.2 if intensity else 1e-3)


def test_the_update_sums_to_zero_and_is_zero_without_inner_step_or_difference() -> None:
    s, gamma = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.3, 0.2])
    assert logit_gradient(s, gamma, 0.1).tolist() == pytest.approx([-0.045, 0.003, 0.042], rel=1e-4)
    assert float(logit_gradient(s, gamma, 0.1).sum()) == pytest.approx(0, abs=1e-7)
    assert logit_gradient(s, gamma, 0.0).tolist() == [0, 0, 0]
    assert logit_gradient(torch.full((3,), 7.0), gamma, 0.1).abs().max() < 1e-6
    assert logit_gradient(s, gamma, 0.1, baseline=1.0).tolist() == pytest.approx([0, 0.03, 0.06])


# The learnt logits.


def test_an_iteration_by_hand_moves_the_rows_of_the_batch_only(world: World) -> None:
    config = CONFIG.model_copy(update={"batch_size": 8, "inner_lr": 0.5})
    selector = IterativeSelector(20, config, seed=3)
    start = torch.linspace(-1, 1, 20)
    selector.logits.copy_(start)
    seen: list[int] = []

    def candidate(row: int) -> Rendered:
        seen.append(row)
        return world.candidates[row]

    told = selector.iterate(world.point, candidate, world.validation, world.harmful)
    assert len(set(seen)) == 8
    batch = [world.candidates[row] for row in seen]
    gamma = torch.softmax(start[seen].double(), 0)
    # All validation and harmful rows are drawn: there are fewer than a batch.
    theta = step(world, plain_gradient(world, batch, gamma.tolist()), -0.5)
    attack = plain_gradient(world, world.harmful, at=theta)
    v = plain_gradient(world, world.validation, at=step(world, attack, -0.2 / float(flat(attack).norm()), at=theta))
    s = torch.stack([flat(plain_gradient(world, [sample])) @ flat(v) for sample in batch])
    ascent = gamma * (s - gamma @ s)
    want = start.double()
    want[seen] += config.logits_lr * ascent / ascent.square().mean().sqrt()
    torch.testing.assert_close(selector.logits.double() - start, want - start, rtol=1e-3, atol=1e-6)
    assert all(selector.logits[row] == start[row] for row in set(range(20)) - set(seen))
    assert told["iteration"] == 1
    assert told["mean_influence"] == pytest.approx(float(gamma @ s), rel=1e-4)
    assert told["direction_norm"] == pytest.approx(float(flat(v).norm()), rel=1e-4)


def test_every_iteration_starts_from_the_same_weights_and_leaves_other_rows_alone(world: World) -> None:
    selector, before = IterativeSelector(20, CONFIG, seed=0), bits(world.point)
    for _ in range(5):
        old, seen = selector.logits.clone(), set()

        def candidate(row: int, seen: set[int] = seen) -> Rendered:
            seen.add(row)
            return world.candidates[row]

        selector.iterate(world.point, candidate, world.validation, world.harmful)
        assert bits(world.point) == before
        assert set((selector.logits != old).nonzero().flatten().tolist()) == seen


def test_a_resumed_selector_goes_on_bit_by_bit(world: World, tmp_path: Path) -> None:
    whole = IterativeSelector(20, CONFIG, seed=0)
    states = []
    for _ in range(5):
        states.append(whole.state())
        save_file(states[-1], tmp_path / f"{whole.iteration}.safetensors")
        world.iterate(whole)
    for pause in (0, 1, 4):
        resumed = IterativeSelector(20, CONFIG, seed=0)
        resumed.load(load_file(tmp_path / f"{pause}.safetensors"))
        assert resumed.iteration == pause
        world.iterate(resumed, 5 - pause)
        assert torch.equal(resumed.logits, whole.logits)
        assert (resumed.mean_square, resumed.baseline, resumed.iteration) == (whole.mean_square, whole.baseline, 5)
    # A state is a copy: it did not move on with the selector.
    assert all(torch.equal(state["logits"], load_file(tmp_path / f"{n}.safetensors")["logits"]) for n, state in enumerate(states))


def test_the_seed_decides_the_order_and_nothing_else_does(world: World) -> None:
    logits = []
    for seed in (0, 0, 1):
        selector = IterativeSelector(20, CONFIG, seed)
        world.iterate(selector, 2)
        logits.append(selector.logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_no_logit_moves_without_an_inner_step(world: World) -> None:
    selector = IterativeSelector(20, CONFIG.model_copy(update={"inner_lr": 0.0}), seed=0)
    world.iterate(selector, 2)
    assert selector.logits.abs().max() == 0
    assert math.isfinite(selector.mean_square)


def test_cosine_takes_the_size_of_a_samples_gradient_out(world: World) -> None:
    moved = {}
    for cosine in (False, True):
        selector = IterativeSelector(20, CONFIG.model_copy(update={"cosine": cosine, "batch_size": 20}), seed=0)
        world.iterate(selector)
        moved[cosine] = selector.logits
    theta = step(world, plain_gradient(world, world.candidates), -CONFIG.inner_lr)
    attack = plain_gradient(world, world.harmful, at=theta)
    v = flat(plain_gradient(world, world.validation, at=step(world, attack, -0.2 / float(flat(attack).norm()), at=theta)))
    own = [flat(plain_gradient(world, [sample])) for sample in world.candidates]
    s = torch.stack([g @ v / g.norm() for g in own])
    torch.testing.assert_close(
        moved[True].double(), 5e-3 * (s - s.mean()) / (s - s.mean()).square().mean().sqrt(), rtol=1e-3, atol=1e-6
    )
    assert not torch.allclose(moved[False], moved[True], rtol=1e-2)


@pytest.mark.parametrize("batch_size", [5, 10])
def test_one_pass_over_the_rows_already_ranks_them_by_influence(world: World, batch_size: int) -> None:
    """A row met once must move by the size of its influence: with a second moment per logit all would move equally far."""
    trusted = World(world.point, world.candidates, world.validation[:5], world.harmful)  # so few that all are drawn every time
    config = CONFIG.model_copy(update={"batch_size": batch_size, "inner_lr": 1e-4, "baseline_decay": 1.0})
    selector = IterativeSelector(20, config, seed=0)
    trusted.iterate(selector, 20 // batch_size)
    v = attacked_direction(
        world.point, validation=trusted.validation, harmful=trusted.harmful, inner=None, inner_lr=0.0, intensity=CONFIG.intensity
    )
    assert spearmanr(selector.logits, world.point.influences(world.candidates, v)).statistic > 0.97


# Two workers.


def measure(payload: tuple[Path, list[list[Row]]], ranks: Ranks) -> dict[str, Any]:
    world = make_world(*payload, ranks)
    point = world.point
    selector = IterativeSelector(20, CONFIG, seed=0)
    v = attacked_direction(
        point, validation=world.validation, harmful=world.harmful, inner=point.gradient(world.candidates[:1]), inner_lr=0.1,
        intensity=0.3,
    )  # fmt: skip
    before = bits(point)
    world.iterate(selector, 4)
    tensors = {
        "weighted": flat(point.gradient(world.validation, [0.5, -1.0, 0.0, 2.0, 0.25, 1.0, 3.0])),
        "attacked": flat(v),
        "influences": point.influences(world.candidates, v),
        "cosines": point.influences(world.candidates, v, cosine=True),
        "logits": selector.logits,
    }
    numbers: dict[str, Any] = {name: tensor.tolist() for name, tensor in tensors.items()}  # Ray Train returns no tensors
    return {"workers": ranks.workers, "restored": bits(point) == before, **numbers}


def test_two_workers_measure_what_one_does(model_folder: Path, sets: list[list[Row]], two_workers: TwoWorkers) -> None:
    alone = measure((model_folder, sets), ALONE)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    try:
        pair = two_workers(measure, (model_folder, sets))
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert pair["workers"] == 2
    assert pair["restored"]
    for name in ("weighted", "attacked", "influences", "cosines"):
        assert distance([torch.tensor(pair[name])], [torch.tensor(alone[name])]) < 1e-5, name
    assert distance([torch.tensor(pair["logits"])], [torch.tensor(alone["logits"])]) < 1e-3  # divided by a small spread
