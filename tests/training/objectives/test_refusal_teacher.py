from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.refusal_teacher import RefusalTeacherSettings

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def rows(batch_of: Callable[..., Batch], pair: tuple[Batch, Batch]) -> dict[str, Batch]:
    return {"user": pair[0], "safe": batch_of(8, seed=12), "ordinary": batch_of(8, seed=13)}


def _states(model: Any, batch: Batch, layer: int) -> torch.Tensor:
    """The teacher's state after a layer at each prompt's last token, one row at a time, without its answer and padding."""
    found = []  # not from `hidden_states`, whose last is after the norm
    handle = (
        model.get_base_model()
        .model.layers[layer]
        .register_forward_hook(
            lambda module, inputs, output: found.append((output if isinstance(output, torch.Tensor) else output[0])[0, -1])
        )
    )
    with torch.no_grad(), model.disable_adapter():
        for row in range(len(batch)):
            start = int((batch.labels[row] != IGNORE).int().argmax())
            model(input_ids=batch.input_ids[row : row + 1, :start])
    handle.remove()
    return torch.stack(found)


def _kept(model: Any, rows: dict[str, Batch], threshold: float, layer: int) -> torch.Tensor:
    harmful, ordinary = (_states(model, rows[name], layer).mean(0) for name in ("safe", "ordinary"))
    centred = _states(model, rows["user"], layer) - (harmful + ordinary) / 2
    return (F.cosine_similarity(centred, (harmful - ordinary)[None]) <= threshold).float()


def _divergence(model: Any, batch: Batch, temperature: float) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits / temperature
    now = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits / temperature
    rows = []
    for row in range(len(batch)):
        tokens = []
        for place in range(1, batch.labels.shape[1]):
            if batch.labels[row, place] != IGNORE:
                p, q = (F.softmax(logits[row, place - 1].double(), -1) for logits in (before, now))
                tokens.append((p * (p / q).log()).sum())
        rows.append(torch.stack(tokens).mean())
    return temperature**2 * torch.stack(rows).mean()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("beta", "temperature", "threshold", "depth"), [(2.0, 1.0, 0.0, 0.5), (0.5, 3.0, 0.1, 0.0)])
def test_the_gradient_is_that_of_kept_rows_and_of_the_divergence(
    accumulation: int,
    beta: float,
    temperature: float,
    threshold: float,
    depth: float,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    rows: dict[str, Batch],
    by_autograd: Callable[..., Tensors],
    apart: Callable[..., tuple[float, float]],
):
    settings = RefusalTeacherSettings(beta=beta, temperature=temperature, threshold=threshold, depth=depth)
    running = bench("refusal_teacher", accumulation=accumulation)
    taken = running.take(rows["user"], None, settings, safe=rows["safe"], ordinary=rows["ordinary"])
    model = adapted()
    kept = _kept(model, rows, threshold, int(2 * depth))
    assert 0 < int(kept.sum()) < 8
    expected = (kept * per_sample_nll(model, rows["user"])).mean() + beta * _divergence(model, rows["safe"], temperature)
    assert max(apart(taken.gradients, by_autograd(model, expected))) < 1e-4
    assert sum(taken.losses) / accumulation == pytest.approx(float(expected.detach()), rel=1e-4)
    assert taken.step.measured["left_out_share"] == pytest.approx(1 - float(kept.mean()))
    assert taken.step.forwards == 6 * accumulation  # two with a backward; the feature of three sets, and the teacher


def test_the_feature_is_the_mean_of_as_many_steps_as_the_anchors_take_and_then_stays(
    bench: Callable[..., Any], adapted: Callable[..., Any], rows: dict[str, Batch], batch_of: Callable[..., Batch]
):
    settings = RefusalTeacherSettings(anchors=16)
    running = bench("refusal_teacher")
    others = [batch_of(8, seed=seed) for seed in (20, 21, 22)]
    for number, safe in enumerate(others):
        taken = running.take(rows["user"], None, settings, number=number, safe=safe, ordinary=rows["ordinary"])
        assert taken.step.forwards == (6 if number < 2 else 4)
    expected = torch.cat([_states(adapted(), safe, 1) for safe in others[:2]]).double().sum(0)
    assert torch.allclose(running.state["refusal_teacher:harmful"], expected, rtol=1e-4, atol=1e-4)
    assert int(running.state["refusal_teacher:seen"]) == 16


def test_without_a_threshold_every_row_is_kept_and_without_a_weight_it_is_plain_fine_tuning(
    bench: Callable[..., Any], rows: dict[str, Batch], apart: Callable[..., tuple[float, float]]
):
    settings = RefusalTeacherSettings(threshold=None, beta=0.0)
    beside = {"safe": rows["safe"], "ordinary": rows["ordinary"]}
    taken = bench("refusal_teacher", dropout=0.3).take(rows["user"], None, settings, **beside)
    plain = bench("sft", dropout=0.3).take(rows["user"], None)
    assert max(apart(taken.gradients, plain.gradients)) < 1e-6
    assert taken.step.measured["left_out_share"] == 0.0


def test_prompts_on_the_far_side_of_the_harmful_ones_are_kept_and_those_beyond_them_left_out(
    bench: Callable[..., Any], rows: dict[str, Batch]
):
    beside = {"safe": rows["safe"], "ordinary": rows["ordinary"]}
    shares = {
        name: bench("refusal_teacher")
        .take(rows[name], None, RefusalTeacherSettings(), **beside, apply=False)
        .step.measured["left_out_share"]
        for name in ("safe", "ordinary")
    }
    assert shares["safe"] > 0.7
    assert shares["ordinary"] < 0.3
