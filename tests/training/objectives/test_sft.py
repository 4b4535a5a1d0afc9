from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import IGNORE, Batch


def _by_hand(model: Any, batch: Batch) -> torch.Tensor:
    """The mean over samples of the mean over answer tokens, token by token."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double().log_softmax(-1)
    samples = []
    for row in range(len(batch)):
        places = [place for place in range(1, batch.labels.shape[1]) if batch.labels[row, place] != IGNORE]
        samples.append(-torch.stack([logits[row, place - 1, batch.labels[row, place]] for place in places]).mean())
    return torch.stack(samples).mean()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_loss_and_gradient_are_those_of_the_mean_over_samples(
    accumulation: int,
    weights: str,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., dict[str, torch.Tensor]],
    apart: Callable[..., tuple[float, float]],
) -> None:
    model = adapted(weights=weights)
    loss = _by_hand(model, pair[0])
    taken = bench("sft", accumulation=accumulation, weights=weights).take(pair[0])
    angle, length = apart(taken.gradients, by_autograd(model, loss))
    assert angle < 1e-9
    assert length < 1e-5
    assert sum(taken.losses) / accumulation == pytest.approx(float(loss), rel=1e-5)
    assert taken.step.forwards == accumulation


def test_a_learning_rate_of_zero_leaves_the_weights_as_they_are(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    running = bench("sft", lr=0.0)
    before = running.weights()
    for number in range(3):
        running.take(pair[0], number=number)
    assert all(torch.equal(before[name], weight) for name, weight in running.weights().items())


def test_dropout_is_a_function_of_seed_step_and_micro_batch_and_moves_no_generator(
    bench: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    running = bench("sft", dropout=0.3)
    state = torch.get_rng_state()
    first = running.take(pair[0], apply=False).losses
    torch.rand(5)  # whatever else has drawn
    again = running.take(pair[0], apply=False).losses
    other = running.take(pair[0], number=1, apply=False).losses
    torch.set_rng_state(state)
    running.take(pair[0], apply=False)
    assert torch.equal(state, torch.get_rng_state())
    assert first == again
    assert first != other
    running.seed += 1
    assert running.take(pair[0], apply=False).losses != first


def test_micro_batches_and_workers_draw_their_own_dropout(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    step = bench("sft", dropout=0.3, accumulation=4).take(pair[0]).step
    drawn = []
    for index in range(4):
        with step.same_dropout("align", index):
            drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == 4
    step.ranks = replace(step.ranks, rank=1)
    with step.same_dropout("align", 0):
        assert float(torch.rand(())) not in drawn


def test_checkpointing_changes_nothing(
    bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
) -> None:
    plain, recomputed = (bench("sft", checkpointing=flag, dropout=0.2).take(pair[0]).gradients for flag in (False, True))
    assert max(apart(recomputed, plain)) < 1e-6
