from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.training.objectives.t_vaccine import TVaccineSettings, draw_layers, group_of, t_vaccine_fits

LAYERS = 4
SETTINGS = TVaccineSettings(layers=2, interval=3, probe_interval=5)


def _layers(model: Any) -> Any:
    return model.get_base_model().model.layers


def _active(state: dict[str, torch.Tensor]) -> list[int]:
    return [int(layer) for layer in state["t_vaccine.active"]]


def _norms_by_hand(model: Any, harmful: Batch, rows: int) -> list[float]:
    """Mean over rows of ‖∂h/∂a_l‖, one row at a time, from a backward pass."""
    total = [0.0] * LAYERS
    for row in range(rows):
        length = int(harmful.attention_mask[row].sum())
        one = Batch(*(t[row : row + 1, :length] for t in (harmful.input_ids, harmful.attention_mask, harmful.labels)))
        kept: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: Any, kept: list[torch.Tensor] = kept) -> None:
            output[0].retain_grad()
            kept.append(output[0])

        handles = [layer.self_attn.register_forward_hook(keep) for layer in _layers(model)]
        per_sample_nll(model, one).sum().backward()
        for handle in handles:
            handle.remove()
        total = [before + float(tensor.grad.norm()) for before, tensor in zip(total, kept, strict=True)]
    return [value / rows for value in total]


@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize(("frozen", "weights"), [("layer", "lora"), ("attention", "lora"), ("layer", "full")])
def test_inactive_layers_stay_the_same_to_the_bit_and_active_ones_move(
    frozen: Any, weights: str, zero_stage: int, bench: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    """With weight decay, over several steps and several draws, so that Adam has moments of layers that were active before."""
    running = bench("t_vaccine", layers=LAYERS, zero_stage=zero_stage, weights=weights, weight_decay=0.5)
    settings = SETTINGS.model_copy(update={"frozen": frozen, "interval": 2})
    before, seen = running.weights(), set()
    for number in range(8):
        running.take(*pair, settings, number=number)
        after, active = running.weights(), _active(running.state)
        seen.update(active)
        for name in before:
            if not running.engine.module.get_parameter(name).requires_grad:
                continue
            layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None
            kept = layer is not None and layer not in active and (frozen == "layer" or ".self_attn." in name)
            assert torch.equal(before[name], after[name]) == kept, (number, name, active)
        before = after
    assert len(seen) > 2  # the set has changed on the way


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_norms_are_those_of_the_harmful_gradient_row_by_row(
    rows: int, accumulation: int, bench: Callable[..., Any], adapted: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    running = bench("t_vaccine", layers=LAYERS, accumulation=accumulation)
    running.take(*pair, SETTINGS.model_copy(update={"probe_rows": rows}))
    found = running.state["t_vaccine.norms"].double()
    expected = torch.tensor(_norms_by_hand(adapted(layers=LAYERS), pair[1], rows), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert float(found.max() / found.min()) > 1.2  # they differ, or nothing would be shown


def test_as_many_rows_are_probed_as_asked_for_whatever_the_micro_batches(
    bench: Callable[..., Any], adapted: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    expected = torch.tensor(_norms_by_hand(adapted(layers=LAYERS), pair[1], 5))
    for accumulation in (1, 4):
        running = bench("t_vaccine", layers=LAYERS, accumulation=accumulation)
        running.take(*pair, SETTINGS.model_copy(update={"probe_rows": 5}))
        found = running.state["t_vaccine.norms"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_layers_are_measured_and_drawn_when_they_should_be_and_kept_in_between(
    bench: Callable[..., Any], pair: tuple[Batch, Batch]
) -> None:
    running = bench("t_vaccine", layers=LAYERS)
    norms, drawn, forwards = [], [], []
    for number in range(12):
        step = running.take(*pair, SETTINGS, number=number).step
        norms.append(running.state["t_vaccine.norms"].tolist())
        drawn.append(_active(running.state))
        forwards.append(step.forwards)
    changed = [number for number in range(1, 12) if norms[number] != norms[number - 1]]
    assert changed == [5, 10]
    assert forwards == [3 if number % 5 == 0 else 2 for number in range(12)]
    assert all(drawn[number] == drawn[number - 1] for number in range(12) if number % 3)
    assert len({tuple(one) for one in drawn}) > 1


def test_what_a_checkpoint_restores_is_used_between_draws(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    running = bench("t_vaccine", layers=LAYERS)
    running.state = {"t_vaccine.norms": torch.ones(LAYERS), "t_vaccine.active": torch.tensor([1, 2])}
    step = running.take(*pair, SETTINGS, number=4).step
    assert step.forwards == 2
    assert step.frozen == {"0.attention", "0.rest", "3.attention", "3.rest"}
    running.state = {}
    assert running.take(*pair, SETTINGS, number=4).step.forwards == 3  # nothing restored: measured and drawn at once
    assert len(_active(running.state)) == 2


def _inclusion(norms: np.ndarray, size: int) -> np.ndarray:
    """Inclusion probabilities of successive draws without replacement, summed over all orders."""
    found = np.zeros(len(norms))
    for order in itertools.permutations(range(len(norms)), size):
        chance, left = 1.0, norms.sum()
        for layer in order:
            chance *= norms[layer] / left
            left -= norms[layer]
        found[list(order)] += chance
    return found


def test_layers_are_drawn_in_proportion_to_their_norms() -> None:
    norms = np.array([0.5, 3.0, 1.0, 0.1, 2.0], dtype=np.float32)
    draws = [draw_layers(norms, TVaccineSettings(layers=2), seed) for seed in range(2000)]
    assert all(drawn == sorted(set(drawn)) and len(drawn) == 2 for drawn in draws)
    frequencies = np.bincount(np.concatenate(draws), minlength=5) / len(draws)
    assert frequencies.argsort().tolist() == norms.argsort().tolist()
    assert np.abs(frequencies - _inclusion(norms.astype(float), 2)).max() < 0.045  # four standard errors


def test_the_deterministic_and_the_blind_draw() -> None:
    norms = np.array([0.5, 3.0, 1.0, 0.1, 2.0])
    assert {tuple(draw_layers(norms, TVaccineSettings(layers=2, draw="top"), seed)) for seed in range(9)} == {(1, 4)}
    draws = [draw_layers(norms, TVaccineSettings(layers=2, draw="uniform"), seed) for seed in range(2000)]
    frequencies = np.bincount(np.concatenate(draws), minlength=5) / len(draws)
    assert np.abs(frequencies - 0.4).max() < 0.045


def test_more_layers_can_be_drawn_than_have_a_gradient() -> None:
    assert draw_layers(np.array([0.0, 2.0, 0.0, 0.0]), TVaccineSettings(layers=3), 0)[:4].count(1) == 1
    assert len(draw_layers(np.zeros(4), TVaccineSettings(layers=3), 0)) == 3
    assert draw_layers(np.array([1e-30, 2e-30]), TVaccineSettings(layers=2), 0) == [0, 1]
    # What has no gradient comes last.
    assert all(draw_layers(np.array([0.0, 2.0, 1.0]), TVaccineSettings(layers=2), seed) == [1, 2] for seed in range(200))


def test_a_step_is_vaccines_with_the_active_layers_alone(
    bench: Callable[..., Any],
    adapted: Callable[..., Any],
    pair: tuple[Batch, Batch],
    by_autograd: Callable[..., dict[str, torch.Tensor]],
    apart: Callable[..., tuple[float, float]],
) -> None:
    for accumulation in (1, 4):
        running = bench("t_vaccine", layers=LAYERS, accumulation=accumulation)
        running.state = {"t_vaccine.norms": torch.ones(LAYERS), "t_vaccine.active": torch.tensor([1, 2])}
        taken = running.take(*pair, TVaccineSettings(layers=2, rho=3.0), number=1)

        model = adapted(layers=LAYERS)
        active = [_layers(model)[1].self_attn, _layers(model)[2].self_attn]
        kept: dict[Any, torch.Tensor] = {}

        def keep(module: Any, _: Any, output: Any, kept: dict[Any, torch.Tensor] = kept) -> None:
            output[0].retain_grad()
            kept[module] = output[0]

        handles = [module.register_forward_hook(keep) for module in active]
        per_sample_nll(model, pair[0]).mean().backward()
        for handle in handles:
            handle.remove()
        norm = torch.cat([tensor.grad.flatten() for tensor in kept.values()]).norm()
        shifts = {module: 3.0 * tensor.grad / norm for module, tensor in kept.items()}
        for module in active:
            module.register_forward_hook(lambda module, _, output, shifts=shifts: (output[0] + shifts[module], *output[1:]))
        loss = per_sample_nll(model, pair[0]).mean()
        expected = by_autograd(model, loss)
        for name in expected:
            if ".layers.0." in name or ".layers.3." in name:
                expected[name] = torch.zeros_like(expected[name])
        assert sum(taken.losses) / accumulation == pytest.approx(float(loss.detach()), rel=1e-5)
        assert max(apart(taken.gradients, expected)) < 1e-5
        assert taken.step.measured["embedding_perturbation_norm"] == pytest.approx(3.0, rel=1e-5)


def test_more_layers_than_there_are_is_one_clear_line(adapted: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        t_vaccine_fits(adapted(), {TVaccineSettings: TVaccineSettings()})
    assert str(caught.value) == "t_vaccine.layers=8 but the model has 2 layers; lower it"
    t_vaccine_fits(adapted(), {TVaccineSettings: TVaccineSettings(layers=2)})


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("base_model.model.model.layers.12.self_attn.q_proj.lora_A.default.weight", "12.attention"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight", "0.rest"),
        ("model.layers.3.input_layernorm.weight", "3.rest"),
        ("transformer.h.5.attn.c_attn.weight", "5.attention"),
        ("gpt_neox.layers.2.attention.dense.bias", "2.attention"),
        ("model.decoder.layers.7.self_attn.k_proj.weight", "7.attention"),
        ("model.embed_tokens.weight", "outside"),
        ("lm_head.weight", "outside"),
    ],
)
def test_a_parameters_group_is_its_layer_and_whether_it_is_attention(name: str, group: str) -> None:
    assert group_of(name) == group


def test_a_learning_rate_of_zero_leaves_the_weights_as_they_are(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    running = bench("t_vaccine", layers=LAYERS, lr=0.0)
    before = running.weights()
    for number in range(3):
        running.take(*pair, SETTINGS, number=number)
    assert all(torch.equal(before[name], weight) for name, weight in running.weights().items())


def test_both_passes_see_the_same_dropout(bench: Callable[..., Any], pair: tuple[Batch, Batch]) -> None:
    """A small perturbation raises the loss by about ρ‖g‖; other masks change it by some 0.3."""
    settings = SETTINGS.model_copy(update={"rho": 1e-3})
    perturbed = bench("t_vaccine", dropout=0.3, accumulation=4, layers=LAYERS).take(*pair, settings, apply=False).losses
    plain = bench("sft", dropout=0.3, accumulation=4, layers=LAYERS).take(pair[0], apply=False).losses
    assert all(0 < a - b < 5e-3 for a, b in zip(perturbed, plain, strict=True))


def test_only_inactive_layers_recompute_and_nothing_else_changes(
    bench: Callable[..., Any], pair: tuple[Batch, Batch], apart: Callable[..., tuple[float, float]]
) -> None:
    gradients, computed = [], []
    for checkpointing in (False, True):
        running = bench("t_vaccine", layers=LAYERS, checkpointing=checkpointing, dropout=0.2)
        running.state = {"t_vaccine.norms": torch.ones(LAYERS), "t_vaccine.active": torch.tensor([1, 2])}
        counts = [0] * LAYERS
        for index, layer in enumerate(_layers(running.engine.module)):

            def count(*_: Any, index: int = index, counts: list[int] = counts) -> None:
                counts[index] += 1

            layer.self_attn.q_proj.register_forward_hook(count)
        gradients.append(running.take(*pair, SETTINGS, number=1).gradients)
        computed.append(counts)
        flags = [layer.gradient_checkpointing for layer in _layers(running.engine.module)]
        assert flags == [checkpointing] * LAYERS  # as before
    assert max(apart(gradients[1], gradients[0])) < 1e-6
    # The first pass needs no gradient below the first active layer, so layer 0 is recomputed in the second pass only.
    assert computed[0] == [2, 2, 2, 2]
    assert computed[1][1:3] == [2, 2]
    assert computed[1][0] > 2
    assert computed[1][3] == 4
