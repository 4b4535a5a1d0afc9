from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.booster import BoosterSettings
from pharmacist_ray.training.objectives.vaccine import VaccineSettings

SETTINGS = BoosterSettings(lambda_=5.0, alpha=0.3)


def _by_hand(
    model: Any, batch: Batch, harmful: Batch, lambda_: float, alpha: float
) -> tuple[dict[str, torch.Tensor], float, float]:
    """∇f(θ) + λ(∇h(θ) − ∇h(θ')), h(θ) and h(θ'), on whole batches; the model is left at θ'."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradient(data: Batch) -> tuple[list[torch.Tensor], float]:
        loss = per_sample_nll(model, data).mean()
        return list(torch.autograd.grad(loss, list(trained.values()))), float(loss)

    f, _ = gradient(batch)
    h, before = gradient(harmful)
    length = torch.sqrt(sum((g.double() ** 2).sum() for g in h))
    with torch.no_grad():
        for parameter, g in zip(trained.values(), h, strict=True):
            parameter.copy_((parameter.double() - alpha * g.double() / length).float())
    there, after = gradient(harmful)
    return {name: a + lambda_ * (b - c) for name, a, b, c in zip(trained, f, h, there, strict=True)}, before, after


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_the_gradient_is_that_of_the_objective_with_the_jacobian_as_identity(
    accumulation: int,
    weights: str,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    apart: Callable[..., tuple[float, float]],
) -> None:
    taken = bench("booster", accumulation=accumulation, weights=weights).take(*pair, SETTINGS)
    expected, before, after = _by_hand(adapted(weights=weights), *pair, 5.0, 0.3)
    angle, length = apart(taken.gradients, expected)
    assert angle < 1e-7
    assert length < 1e-4
    assert taken.step.measured["harmful_loss"] == pytest.approx(before, rel=1e-5)
    assert taken.step.measured["harmful_drop"] == pytest.approx(before - after, rel=1e-3)
    assert taken.step.measured["weight_perturbation_norm"] == pytest.approx(0.3, rel=1e-5)
    # The regulariser is no small part of it, so the above compares more than ∇f.
    assert apart(expected, _by_hand(adapted(weights=weights), *pair, 1e-9, 0.3)[0])[0] > 0.01


def test_its_value_is_the_alignment_loss_and_the_weighted_drop(
    bench: Callable[..., Any], adapted: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    taken = bench("booster", accumulation=4).take(*pair, SETTINGS)
    _, before, after = _by_hand(adapted(), *pair, 5.0, 0.3)
    f = float(per_sample_nll(adapted(), pair[0]).mean())
    assert sum(taken.losses) / 4 == pytest.approx(f + 5.0 * (before - after), rel=1e-4)


def test_lambda_goes_by_its_name_in_a_configuration() -> None:
    assert BoosterSettings.model_validate({"lambda": 2.0}).lambda_ == 2.0


@pytest.mark.parametrize("objective", ["booster", "booster+vaccine"])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_the_weights_are_the_same_to_the_bit_after_the_perturbation(
    objective: str, weights: str, bench: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    running = bench(objective, weights=weights)
    before = running.weights()
    taken = running.take(*pair, SETTINGS, apply=False)
    after = running.weights()
    assert taken.step.measured["harmful_drop"] != 0
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("objective", ["booster", "booster+vaccine"])
def test_micro_batches_make_no_difference(
    objective: str, bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
) -> None:
    one, four = (bench(objective, accumulation=count).take(*pair, SETTINGS) for count in (1, 4))
    angle, length = apart(four.gradients, one.gradients)
    assert angle < 1e-9
    assert length < 1e-5
    assert sum(four.losses) / 4 == pytest.approx(one.losses[0], rel=1e-5)


@pytest.mark.parametrize("objective", ["booster", "booster+vaccine"])
def test_a_learning_rate_of_zero_leaves_the_weights_as_they_are(
    objective: str, bench: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    running = bench(objective, lr=0.0)
    before = running.weights()
    for number in range(3):
        running.take(*pair, SETTINGS, number=number)
    assert all(torch.equal(before[name], weight) for name, weight in running.weights().items())


def test_both_harmful_passes_see_the_same_dropout(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    """A small step lowers h by α‖∇h‖; other masks would change it by far more."""
    alpha = 1e-3
    running = bench("booster", dropout=0.3, accumulation=4)
    step = running.take(*pair, BoosterSettings(alpha=alpha), apply=False).step
    squares = torch.zeros((), dtype=torch.float64)
    trained = step.trained
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for index, harmful in enumerate(step.harmful):
        with step.same_dropout("harmful", index):
            loss = per_sample_nll(running.engine.module, harmful).mean() / 4
        for name, gradient in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
            total[name] += gradient
    squares = sum((g.double() ** 2).sum() for g in total.values())
    assert step.measured["harmful_drop"] == pytest.approx(alpha * float(squares) ** 0.5, rel=0.05)
    losses = [float(per_sample_nll(running.engine.module, pair[1]).mean()) for _ in range(8)]
    assert max(losses) - min(losses) > 10 * alpha * float(squares) ** 0.5  # what dropout alone does


def test_the_alignment_pass_and_the_harmful_pass_do_not_share_dropout(
    bench: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    step = bench("booster", dropout=0.3).take(*pair, SETTINGS, apply=False).step
    seen = []
    for what in ("align", "harmful", "align"):
        with step.same_dropout(what, 0):
            seen.append(torch.rand(4))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_with_vaccine_the_alignment_loss_is_perturbed(
    bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
) -> None:
    """Booster with Vaccine, less Booster, is Vaccine less SFT: the terms add."""
    rho = VaccineSettings(rho=3.0)
    gradients = {
        name: bench(name).take(*pair, SETTINGS, rho, apply=False).gradients
        for name in ("booster+vaccine", "booster", "vaccine", "sft")
    }
    expected = {
        name: gradients["booster"][name] + gradients["vaccine"][name] - gradients["sft"][name] for name in gradients["sft"]
    }
    angle, length = apart(gradients["booster+vaccine"], expected)
    assert angle < 1e-9
    assert length < 1e-5
    assert apart(gradients["booster+vaccine"], gradients["booster"])[0] > 1e-4


def test_checkpointing_changes_nothing(
    bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
) -> None:
    plain, recomputed = (
        bench("booster+vaccine", checkpointing=flag, dropout=0.2).take(*pair, SETTINGS).gradients for flag in (False, True)
    )
    assert max(apart(recomputed, plain)) < 1e-6


def test_it_takes_three_passes_and_with_vaccine_four(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    assert bench("booster", accumulation=4).take(*pair, SETTINGS).step.forwards == 12
    assert bench("booster+vaccine", accumulation=4).take(*pair, SETTINGS).step.forwards == 16
