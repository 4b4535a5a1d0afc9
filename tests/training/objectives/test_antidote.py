from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pharmacist_ray.data.render import Batch
from pharmacist_ray.training.objectives.antidote import AntidoteSettings, antidote, input_norms, largest


def test_the_mask_has_exactly_its_share_of_every_row():
    scores = torch.rand(7, 20, generator=torch.Generator().manual_seed(0))
    mask = largest(scores, 0.3)
    assert mask.sum(1).tolist() == [6] * 7
    assert all(scores[row][mask[row]].min() > scores[row][~mask[row]].max() for row in range(7))
    assert largest(torch.ones(2, 10), 0.25).tolist() == [[True, True] + [False] * 8] * 2  # ties fall to the first
    assert not largest(scores, 0.01).any()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_inputs_are_measured_over_real_tokens_however_the_batch_is_cut(
    accumulation: int, bench: Callable[..., Any], pair: tuple[Batch, Batch]
):
    running = bench("antidote", accumulation=accumulation)
    step = running.step(*pair)
    modules = {
        name: one for name, one in step.model.named_modules() if name.endswith("lora_A.default") and isinstance(one, nn.Linear)
    }
    found = input_norms(step, modules, step.harmful)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    handles = [
        one.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0][0]))
        for name, one in modules.items()
    ]
    for row in range(8):
        length = int(pair[1].attention_mask[row].sum())
        with torch.no_grad():
            step.model(input_ids=pair[1].input_ids[row : row + 1, :length])
    for handle in handles:
        handle.remove()
    assert modules
    for name in modules:
        assert torch.allclose(found[name], torch.cat(seen[name]).norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["plain", "contrast", "random"])
def test_what_matters_most_is_set_to_zero_and_nothing_else(mode: Any, bench: Callable[..., Any], pair: tuple[Batch, Batch]):
    running = bench("antidote")
    before = running.weights()
    step = running.step(*pair, AntidoteSettings(share=0.25, mode=mode))
    adapters = {name: one for name, one in step.model.named_modules() if ".lora_" in name and isinstance(one, nn.Linear)}
    norms = {what: input_norms(step, adapters, rows) for what, rows in (("harmful", step.harmful), ("user", step.batches))}
    antidote(step)
    after = running.weights()
    counts = {}
    for name in adapters:
        key = f"{name}.weight"
        zeroed = (after[key] == 0) & (before[key] != 0)
        assert torch.equal(after[key][~zeroed], before[key][~zeroed])
        top = {what: largest(before[key].abs() * found[name], 0.25) for what, found in norms.items()}
        if mode == "plain":
            assert torch.equal(zeroed, top["harmful"])
        if mode == "contrast":
            assert torch.equal(zeroed, top["harmful"] & ~top["user"])
        counts[name] = int(zeroed.sum())
    total = sum(before[f"{name}.weight"].numel() for name in adapters)
    assert step.measured["pruned_share"] == pytest.approx(sum(counts.values()) / total)
    if mode == "random":
        assert all(counts[name] == int(0.25 * one.in_features) * one.out_features for name, one in adapters.items())
    unchanged = {name for name in before if "lora_" not in name}
    assert all(torch.equal(before[name], after[name]) for name in unchanged)
