from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.antibody import AntibodySettings, flatness_weight
from pharmacist_ray.training.objectives.booster import BoosterSettings

Tensors = dict[str, torch.Tensor]


def _flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([one.double().flatten() for one in tensors.values()])


def _by_hand(
    model: Any, batch: Batch, harmful: Batch, settings: AntibodySettings, by_autograd: Callable[..., Tensors]
) -> tuple[Tensors, float, Tensors, Tensors]:
    """δ of the paper on whole batches, λ, g_s and ∇f; the model is left at θ'."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    own = by_autograd(model, per_sample_nll(model, batch).mean())
    here = by_autograd(model, per_sample_nll(model, harmful).mean())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter -= settings.rho * here[name] / _flat(here).norm()
    there = by_autograd(model, per_sample_nll(model, harmful).mean())
    refusal = by_autograd(model, per_sample_nll(model, batch).mean())
    sharpness = {name: here[name] - there[name] for name in names}
    square, inner = _flat(sharpness) @ _flat(sharpness), _flat(sharpness) @ _flat(own)
    weight = settings.lambda_ or min(settings.cap, max(0.0, float((settings.xi * square - inner) / square)))
    delta = {name: own[name] + weight * sharpness[name] + settings.refusal * refusal[name] for name in names}
    return delta, weight, sharpness, own


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (AntibodySettings(xi=0.5), 5),
        (AntibodySettings(lambda_=3.0, refusal=0.4), 4),
        (AntibodySettings(xi=0.0, refusal=0.0), 4),
    ],
)
def test_the_gradient_is_that_of_the_paper(
    accumulation: int,
    weights: str,
    settings: AntibodySettings,
    passes: int,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., Tensors],
    apart: Callable[..., tuple[float, float]],
):
    running = bench("antibody", accumulation=accumulation, weights=weights)
    before = running.weights()
    taken = running.take(*pair, settings, apply=False)
    expected, weight, _, _ = _by_hand(adapted(weights=weights), *pair, settings, by_autograd)
    angle, length = apart(taken.gradients, expected)
    assert (angle < 1e-6, length < 1e-3) == (True, True)
    assert taken.step.measured["flatness_weight"] == pytest.approx(weight, rel=1e-2, abs=1e-4)
    assert taken.step.forwards == accumulation * passes
    assert all(torch.equal(before[name], one) for name, one in running.weights().items())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_with_a_constant_weight_and_no_third_term_it_is_booster_to_the_bit(
    accumulation: int, bench: Callable[..., Any], pair: tuple[Batch, Batch]
):
    one = bench("antibody", accumulation=accumulation, dropout=0.3).take(
        *pair, AntibodySettings(lambda_=5.0, rho=0.3, refusal=0.0)
    )
    other = bench("booster", accumulation=accumulation, dropout=0.3).take(*pair, BoosterSettings(lambda_=5.0, alpha=0.3))
    assert one.losses == other.losses
    assert all(torch.equal(one.gradients[name], other.gradients[name]) for name in other.gradients)
    assert one.step.forwards == other.step.forwards


def test_sharpness_goes_down_by_its_share_or_by_as_much_as_the_alignment_lowers_it_anyway(
    adapted: Callable[..., Any], pair: tuple[Batch, Batch], by_autograd: Callable[..., Tensors]
):
    settings = AntibodySettings(xi=0.2, cap=1e9, refusal=0.0)
    delta, _, sharpness, own = _by_hand(adapted(), *pair, settings, by_autograd)
    square = float(_flat(sharpness) @ _flat(sharpness))
    inner = float(_flat(own) @ _flat(sharpness))
    assert float(_flat(delta) @ _flat(sharpness)) == pytest.approx(max(inner, 0.2 * square), rel=1e-4)


@pytest.mark.parametrize(
    ("own", "weight"),
    [([0.0, 1.0], 0.1), ([-3.0, 0.0], 1.6), ([3.0, 0.0], 0.0), ([-1e6, 0.0], 10.0)],
)
def test_the_weight_of_the_sharpness(own: list[float], weight: float):
    sharpness = torch.tensor([2.0, 0.0])
    assert flatness_weight([torch.tensor(own)], [sharpness], 0.1, 10.0) == pytest.approx(weight)
    assert flatness_weight([torch.tensor(own)], [torch.zeros(2)], 0.1, 10.0) == 0.0


def test_lambda_goes_by_its_name_in_a_configuration():
    assert AntibodySettings.model_validate({"lambda": 2.0}).lambda_ == 2.0
    assert AntibodySettings().lambda_ is None
