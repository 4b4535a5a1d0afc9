"""Tiny models of the families that users bring, from the families' own configuration classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pharmacist_ray.config.schema import LoraConfig, ModelConfig
from pharmacist_ray.data.render import Batch
from pharmacist_ray.doctor.shape import shape_of
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.generate import generate
from pharmacist_ray.models.influence import influence
from pharmacist_ray.models.load import add_lora, load_model
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.taps import decoder_layers, modules_at

TEXT: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
SEES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip
GPT2 = {
    "vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
DENSE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}

FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "Llama 2, 3, SmolLM2": ("LlamaConfig", TEXT, DENSE),
    "Qwen2.5": ("Qwen2Config", TEXT, DENSE),
    "Qwen3": ("Qwen3Config", TEXT | {"head_dim": 8}, DENSE),
    "Qwen3-MoE": (
        "Qwen3MoeConfig", TEXT | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, ATTENTION,
    ),
    "Mistral": ("MistralConfig", TEXT, DENSE),
    "Mixtral": ("MixtralConfig", TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "Gemma 2": ("Gemma2Config", TEXT | {"head_dim": 8}, DENSE),
    "Gemma 3": ("Gemma3TextConfig", TEXT | {"head_dim": 8}, DENSE),
    "Gemma 3 that sees": (
        "Gemma3Config", {"text_config": TEXT | {"head_dim": 8}, "vision_config": SEES, "mm_tokens_per_image": 4}, DENSE,
    ),
    "Phi-3, 4": ("Phi3Config", TEXT, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "gpt-oss": ("GptOssConfig", TEXT | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "GPT-2": ("GPT2Config", GPT2, {"c_attn", "c_proj", "c_fc"}),
}  # fmt: skip
"""Family → the name of its configuration class, what a tiny one has, and the modules that `all-linear` adapts."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a maker of folders with a family's tiny model."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            kind, settings, _ = FAMILIES[family]
            folders[family] = tmp_path_factory.mktemp("family")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = getattr(transformers, kind)(**settings)
                transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        return folders[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_scored_by_hooks_as_by_a_plain_loop(
    family: str, made: Callable[[str], Path], batch_of: Callable[..., Batch]
) -> None:
    model = add_lora(load_model(made(family)), LoraConfig(r=2), seed=0)
    adapted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapted} == FAMILIES[family][2]
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
def test_a_family_has_the_places_that_objectives_tap_and_is_counted_right(family: str, made: Callable[[str], Path]) -> None:
    model = load_model(made(family))
    assert len(decoder_layers(model)) == 2
    assert [len(modules_at(model, place)) for place in ("layer", "attention", "mlp", "norm")] == [2, 2, 2, 1]
    shape = shape_of(ModelConfig(path=str(made(family)), lora=LoraConfig(r=2)))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.layers, shape.hidden, shape.vocabulary) == (2, 32, 48)
    with_lora = add_lora(model, LoraConfig(r=2), seed=0)
    assert shape.adapter == sum(parameter.numel() for parameter in with_lora.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_alike_in_any_batch(family: str, made: Callable[[str], Path], tokenizer: Any) -> None:
    model, prompts = load_model(made(family)), [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    alone = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
    assert generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=3) == alone


def test_targets_by_name_are_those_of_the_text_decoder(made: Callable[[str], Path]) -> None:
    model = add_lora(load_model(made("Gemma 3 that sees")), LoraConfig(r=2, targets=["q_proj"]), seed=0)
    adapted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(adapted) == 4  # A and B of two layers
    assert not any("vision" in name for name in adapted)
    with pytest.raises(
        ModelError, match=r"^no linear module for LoRA targets \['fc1'\]; this model has down_proj, gate_proj, .*all-linear"
    ):
        add_lora(load_model(made("Gemma 3 that sees")), LoraConfig(targets=["fc1"]), seed=0)
