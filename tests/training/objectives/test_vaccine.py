from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.vaccine import VaccineSettings, vaccine_fits


def _layers(model: Any) -> Sequence[Any]:
    return model.get_base_model().model.layers


def _by_hand(model: Any, batch: Batch, rho: float, scope: str, taps: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of the second pass, and ε_l by layer, from hooks of this test's own."""
    places = [layer.self_attn if taps == "attention" else layer for layer in _layers(model)]
    kept: list[Any] = [None] * len(places)
    shifts: list[Any] = [None] * len(places)

    def keep(index: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            kept[index] = output[0] if taps == "attention" else output
            kept[index].retain_grad()

        return hook

    def add(index: int) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            if taps == "attention":
                return (output[0] + shifts[index], output[1])
            return output + shifts[index]

        return hook

    handles = [place.register_forward_hook(keep(index)) for index, place in enumerate(places)]
    per_sample_nll(model, batch).mean().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    gradients = [tensor.grad.double() for tensor in kept]
    if scope == "batch":
        norm = torch.cat([g.flatten() for g in gradients]).norm()
    else:
        norm = torch.stack([torch.cat([g[row].flatten() for g in gradients]).norm() for row in range(len(batch))])[:, None, None]
    shifts[:] = [(rho * g / norm).float() for g in gradients]
    handles = [place.register_forward_hook(add(index)) for index, place in enumerate(places)]
    loss = per_sample_nll(model, batch).mean()
    for handle in handles:
        handle.remove()
    return loss, shifts


@pytest.mark.parametrize("taps", ["attention", "layer"])
@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_is_the_second_of_two_passes_with_the_first_ones_gradients_added(
    taps: Any,
    scope: Any,
    accumulation: int,
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., dict[str, torch.Tensor]],
    apart: Callable[..., tuple[float, float]],
) -> None:
    taken = bench("vaccine", accumulation=accumulation).take(pair[0], None, VaccineSettings(rho=3.0, scope=scope, taps=taps))
    model = adapted()
    loss, _ = _by_hand(model, pair[0], 3.0, scope, taps)
    expected = by_autograd(model, loss)
    assert sum(taken.losses) / accumulation == pytest.approx(float(loss.detach()), rel=1e-5)
    angle, length = apart(taken.gradients, expected)
    assert angle < 1e-8
    assert length < 1e-4
    # The perturbation matters: at another ρ the step is another one.
    other = by_autograd(model, _by_hand(model, pair[0], 1.5, scope, taps)[0])
    assert apart(taken.gradients, other)[0] > 1e-4
    assert taken.step.measured["embedding_perturbation_norm"] == pytest.approx(3.0, rel=1e-5)


class _Watch:
    """What is really added to the attention outputs: hooks before and after the place where it happens."""

    def __init__(self, model: Any) -> None:
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.shifts: list[dict[int, torch.Tensor]] = []
        for index, layer in enumerate(_layers(model)):
            layer.input_layernorm.register_forward_pre_hook(lambda _, args, index=index: self._enter(index, args[0]))
            layer.self_attn.register_forward_hook(lambda _, __, output, index=index: self._leave(index, output[0]))
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args, index=index: self._join(index, args[0]))

    def _enter(self, index: int, tensor: torch.Tensor) -> None:
        if index == 0:
            self.shifts.append({})
        self.inputs[index] = tensor.detach().double()

    def _leave(self, index: int, tensor: torch.Tensor) -> None:
        self.outputs[index] = tensor.detach().double()

    def _join(self, index: int, tensor: torch.Tensor) -> None:
        self.shifts[-1][index] = tensor.detach().double() - self.inputs[index] - self.outputs[index]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_shifts_that_are_added_lie_on_one_ball_over_layers_rows_and_micro_batches(
    accumulation: int, bench: Callable[..., Any], adapted: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    running = bench("vaccine", accumulation=accumulation)
    watch = _Watch(running.engine.module)
    running.take(pair[0], None, VaccineSettings(rho=2.5))
    first, second = watch.shifts[:accumulation], watch.shifts[accumulation:]
    assert len(second) == accumulation
    assert max(float(shift.abs().max()) for one in first for shift in one.values()) < 1e-5  # rounding
    length = torch.stack([shift.square().sum() for one in second for shift in one.values()]).sum().sqrt()
    assert float(length) == pytest.approx(2.5, rel=1e-5)
    if accumulation == 1:
        expected = _by_hand(adapted(), pair[0], 2.5, "batch", "attention")[1]
        for layer, shift in second[0].items():
            torch.testing.assert_close(shift, expected[layer].double(), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_sample_has_a_ball_of_its_own_if_asked_for(
    accumulation: int, bench: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    running = bench("vaccine", accumulation=accumulation)
    watch = _Watch(running.engine.module)
    taken = running.take(pair[0], None, VaccineSettings(rho=2.5, scope="sample"))
    for shifts in watch.shifts[accumulation:]:
        lengths = torch.stack([shift.square().flatten(1).sum(1) for shift in shifts.values()]).sum(0).sqrt()
        torch.testing.assert_close(lengths, torch.full_like(lengths, 2.5), rtol=1e-5, atol=0)
    assert taken.step.measured["embedding_perturbation_norm"] == pytest.approx(2.5, rel=1e-5)


def test_padding_is_not_perturbed_and_prompts_are(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    running = bench("vaccine")
    watch = _Watch(running.engine.module)
    running.take(pair[0], None, VaccineSettings(rho=2.5))
    shift = watch.shifts[-1][0]
    padding = pair[0].attention_mask == 0
    assert padding.any()
    assert float(shift[padding].abs().max()) < 1e-6
    assert float(shift[:, 0].abs().max()) > 1e-4


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_micro_batches_make_no_difference(
    scope: Any, bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
) -> None:
    one, four = (
        bench("vaccine", accumulation=count).take(pair[0], None, VaccineSettings(rho=3.0, scope=scope)) for count in (1, 4)
    )
    assert max(apart(four.gradients, one.gradients)) < 1e-5
    assert sum(four.losses) / 4 == pytest.approx(one.losses[0], rel=1e-5)


def test_a_learning_rate_of_zero_leaves_the_weights_as_they_are(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    running = bench("vaccine", lr=0.0)
    before = running.weights()
    for number in range(3):
        running.take(pair[0], number=number)
    assert all(torch.equal(before[name], weight) for name, weight in running.weights().items())


def test_both_passes_see_the_same_dropout(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    """The attention outputs of the first layer, before the shift, are those of the first pass to the bit."""
    running = bench("vaccine", dropout=0.3, accumulation=4)
    seen: list[torch.Tensor] = []
    _layers(running.engine.module)[0].self_attn.register_forward_hook(lambda _, __, output: seen.append(output[0].detach()))
    tiny_rho = running.take(pair[0], None, VaccineSettings(rho=1e-3), apply=False)
    for first, second in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(first, second)
    # A small perturbation raises the loss by ρ‖g‖, which is less than what other masks would do to it.
    plain = bench("sft", dropout=0.3, accumulation=4).take(pair[0], apply=False).losses
    gaps = [a - b for a, b in zip(tiny_rho.losses, plain, strict=True)]
    assert all(0 < gap < 5e-3 for gap in gaps)


def test_checkpointing_changes_nothing(
    bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
) -> None:
    for taps in ("attention", "layer"):
        plain, recomputed = (
            bench("vaccine", checkpointing=flag, dropout=0.2).take(pair[0], None, VaccineSettings(rho=3.0, taps=taps)).gradients
            for flag in (False, True)
        )
        assert max(apart(recomputed, plain)) < 1e-6


def test_it_takes_two_passes_and_leaves_no_hook(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    running = bench("vaccine", accumulation=4)
    hooks = [len(module._forward_hooks) for module in running.engine.module.modules()]
    assert running.take(pair[0]).step.forwards == 8
    assert [len(module._forward_hooks) for module in running.engine.module.modules()] == hooks


def test_a_model_without_attention_of_a_known_name_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^Linear has no list of its None decoder layers"):
        vaccine_fits(torch.nn.Linear(2, 2), {VaccineSettings: VaccineSettings()})
