from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.star_dss import StarDssSettings

Tensors = dict[str, torch.Tensor]


def _verdicts(batch: Batch, value: float | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = (batch.labels[:, 1:] != IGNORE).sum(1).tolist()
    return [torch.rand(n, generator=generator) if value is None else torch.full((n,), value) for n in counts]


def _by_hand(model: Any, batch: Batch, verdicts: list[torch.Tensor], weight: float) -> torch.Tensor:
    """Equation 3, one row and one token at a time."""
    with torch.no_grad(), model.disable_adapter():
        before = F.log_softmax(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, -1)
    now = F.log_softmax(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, -1)
    rows = []
    for row in range(len(batch)):
        places = [place for place in range(1, batch.labels.shape[1]) if batch.labels[row, place] != IGNORE]
        total = torch.zeros(())
        for v, place in zip(verdicts[row], places, strict=True):
            mine, ref = (logs[row, place - 1, batch.labels[row, place]] for logs in (now, before))
            total = total - v * mine + (1 - v) * weight * 0.5 * (mine - ref) ** 2
        rows.append(total / len(places))
    return torch.stack(rows).mean()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("weight", [0.5, 40.0])
def test_the_gradient_is_that_of_the_paper(
    accumulation: int,
    weight: float,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., Tensors],
    apart: Callable[..., tuple[float, float]],
):
    user, verdicts = pair[0], _verdicts(pair[0])
    order = [3, 1, 0, 2, 7, 6, 5, 4]  # rows' numbers are not their places
    numbered = [verdicts[order.index(row)] for row in range(8)]
    taken = bench("star_dss", accumulation=accumulation).take(
        user, None, StarDssSettings(lambda_=weight), rows=order, verdicts=numbered
    )
    model = adapted()
    expected = _by_hand(model, user, verdicts, weight)
    assert max(apart(taken.gradients, by_autograd(model, expected))) < 1e-5
    assert sum(taken.losses) / accumulation == pytest.approx(float(expected.detach()), rel=1e-5)
    assert taken.step.measured["mean_verdict"] == pytest.approx(float(torch.stack([v.mean() for v in verdicts]).mean()), rel=1e-5)
    assert taken.step.forwards == 2 * accumulation


def test_where_all_is_safe_it_is_plain_fine_tuning_and_so_it_is_above_the_floor(
    bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
):
    plain = bench("sft", dropout=0.3).take(pair[0], None).gradients
    for value, floor in ((1.0, 1.0), (0.7, 0.6)):
        settings = StarDssSettings(floor=floor)
        taken = bench("star_dss", dropout=0.3).take(pair[0], None, settings, rows=range(8), verdicts=_verdicts(pair[0], value))
        assert max(apart(taken.gradients, plain)) < 1e-6


def test_where_nothing_is_safe_and_nothing_has_moved_nothing_is_learnt(bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    running = bench("star_dss")
    with torch.no_grad():
        for name, parameter in running.engine.module.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    taken = running.take(pair[0], None, rows=range(8), verdicts=_verdicts(pair[0], 0.0), apply=False)
    assert taken.losses == [pytest.approx(0.0, abs=1e-10)]
    assert all(float(one.abs().max()) < 1e-6 for one in taken.gradients.values())


def test_a_loss_without_the_reference_is_that_of_weighted_tokens(
    bench: Callable[..., Any], adapted: Callable[..., Any], pair: tuple[Batch, Batch]
):
    verdicts = _verdicts(pair[0], 0.25)
    taken = bench("star_dss").take(pair[0], None, StarDssSettings(lambda_=0.0), rows=range(8), verdicts=verdicts)
    assert taken.losses[0] == pytest.approx(0.25 * float(per_sample_nll(adapted(), pair[0]).mean().detach()), rel=1e-5)
