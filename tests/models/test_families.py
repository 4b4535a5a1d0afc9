"""Tiny models of the families that users bring, from the families' own configuration classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pharmacist_ray.config.schema import LoraConfig, ModelConfig
from pharmacist_ray.data.render import Batch
from pharmacist_ray.doctor.shape import shape_of
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.generate import generate
from pharmacist_ray.models.influence import influence
from pharmacist_ray.models.load import add_lora, load_model
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.taps import decoder_layers, modules_at
from tests.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_scored_by_hooks_as_by_a_plain_loop(
    family: str, family_folder: Callable[[str], Path], batch_of: Callable[..., Batch]
) -> None:
    model = add_lora(load_model(family_folder(family)), LoraConfig(r=2), seed=0)
    adapted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapted} == FAMILIES[family].adapted
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.items():  # a B of zero would hide what happens to A
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    directions = {name: torch.randn(1, *parameter.shape, generator=generator) for name, parameter in adapted.items()}
    batch = batch_of(3)
    expected = []
    for row in range(len(batch)):
        alone = Batch(*(part[row : row + 1] for part in (batch.input_ids, batch.attention_mask, batch.labels)))
        gradients = torch.autograd.grad(per_sample_nll(model, alone).sum(), list(adapted.values()))
        expected.append(sum(float((g * directions[name][0]).sum()) for name, g in zip(adapted, gradients, strict=True)))
    found = influence(model, batch, directions, method="hooks").dots[:, 0]
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_places_that_objectives_tap_and_is_counted_right(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    model = load_model(family_folder(family))
    assert len(decoder_layers(model)) == 2
    assert [len(modules_at(model, place)) for place in ("layer", "attention", "mlp", "norm")] == [2, 2, 2, 1]
    shape = shape_of(ModelConfig(path=str(family_folder(family)), lora=LoraConfig(r=2)))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.layers, shape.hidden, shape.vocabulary) == (2, 32, 64)
    with_lora = add_lora(model, LoraConfig(r=2), seed=0)
    assert shape.adapter == sum(parameter.numel() for parameter in with_lora.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_alike_in_any_batch(family: str, family_folder: Callable[[str], Path], tokenizer: Any) -> None:
    model, prompts = load_model(family_folder(family)), [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    alone = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
    assert generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=3) == alone


def test_targets_by_name_are_those_of_the_text_decoder(family_folder: Callable[[str], Path]) -> None:
    model = add_lora(load_model(family_folder("Gemma 3, with images")), LoraConfig(r=2, targets=["q_proj"]), seed=0)
    adapted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(adapted) == 4  # A and B of two layers
    assert not any("vision" in name for name in adapted)
    with pytest.raises(
        ModelError, match=r"^no linear module for LoRA targets \['fc1'\]; this model has down_proj, gate_proj, .*all-linear"
    ):
        add_lora(load_model(family_folder("Gemma 3, with images")), LoraConfig(targets=["fc1"]), seed=0)
