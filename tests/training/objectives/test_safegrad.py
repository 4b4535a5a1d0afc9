from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.safegrad import SafeGradSettings, surgery

Tensors = dict[str, torch.Tensor]


def _divergence(model: Any, batch: Batch) -> torch.Tensor:
    """The mean over rows of the mean over answer tokens of Σ p log(p/q), one row and one token at a time."""
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    now = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    rows = []
    for row in range(len(batch)):
        tokens = []
        for place in range(1, batch.labels.shape[1]):
            if batch.labels[row, place] != IGNORE:
                p, q = (F.softmax(logits[row, place - 1].double(), -1) for logits in (before, now))
                tokens.append((p * (p / q).log()).sum())
        rows.append(torch.stack(tokens).mean())
    return torch.stack(rows).mean()


def _by_hand(model: Any, user: Batch, safe: Batch, rho: float, by_autograd: Callable[..., Tensors]) -> tuple[Tensors, float]:
    """v of the paper's two cases, and ⟨g_u, g_a⟩."""
    g = by_autograd(model, per_sample_nll(model, user).mean())
    a = by_autograd(model, _divergence(model, safe))
    flat_g, flat_a = (torch.cat([one.double().flatten() for one in found.values()]) for found in (g, a))
    inner = flat_g @ flat_a
    kept = flat_g - inner / (flat_a @ flat_a) * flat_a if inner < 0 else flat_g
    whole = kept + rho * flat_a
    found, start = {}, 0
    for name, one in g.items():
        found[name] = whole[start : start + one.numel()].view_as(one)
        start += one.numel()
    return found, float(inner)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("rho", [0.0, 50.0])
def test_the_gradient_is_that_of_the_paper(
    accumulation: int,
    rho: float,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., Tensors],
    apart: Callable[..., tuple[float, float]],
):
    user, safe = pair
    taken = bench("safegrad", accumulation=accumulation).take(user, None, SafeGradSettings(rho=rho), safe=safe)
    expected, inner = _by_hand(adapted(), user, safe, rho, by_autograd)
    angle, length = apart(taken.gradients, expected)
    assert (angle < 1e-6, length < 1e-4) == (True, True)
    assert (taken.step.measured["gradient_cosine"] < 0) == (inner < 0)
    assert taken.step.measured["safe_divergence"] == pytest.approx(float(_divergence(adapted(), safe).detach()), rel=1e-4)
    assert taken.step.forwards == accumulation * 4


def test_what_works_against_safety_is_taken_out_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    user, safe = ([torch.randn(shape, generator=generator) for shape in ((3, 4), (5,))] for _ in range(2))
    sign = 1.0 if sum((a * b).sum() for a, b in zip(user, safe, strict=True)) < 0 else -1.0
    against, along = [sign * one for one in user], [-sign * one for one in user]
    factor, cosine = surgery(against, safe, 0.0)
    left = [a + factor * b for a, b in zip(against, safe, strict=True)]
    assert cosine < 0
    assert float(sum((a * b).sum() for a, b in zip(left, safe, strict=True))) == pytest.approx(0.0, abs=1e-5)
    assert surgery(along, safe, 0.0) == (0.0, pytest.approx(-cosine))
    assert surgery(along, safe, 0.3)[0] == 0.3
    assert surgery(along, [torch.zeros_like(one) for one in safe], 0.3) == (0.3, 0.0)


def test_where_nothing_has_moved_yet_it_is_plain_fine_tuning_dropout_or_not(
    bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
):
    user, safe = pair
    gradients = []
    for objective in ("safegrad", "sft"):
        running = bench(objective, dropout=0.3)
        with torch.no_grad():
            for name, parameter in running.engine.module.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        taken = running.take(user, None, safe=safe, apply=False)
        gradients.append(taken.gradients)
        assert taken.step.measured.get("safe_divergence", 0.0) == pytest.approx(0.0, abs=1e-7)
    assert max(apart(*gradients)) < 1e-6
