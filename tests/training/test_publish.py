from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import pharmacist_ray.training.publish as publish
from pharmacist_ray.config.schema import LoraConfig, TrainConfig
from pharmacist_ray.data.render import Batch
from pharmacist_ray.models.load import add_lora, load_adapter, load_model, save_adapter
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.runtime.ranks import current_ranks
from pharmacist_ray.training.engine import build_engine, sharded_loading
from pharmacist_ray.training.publish import publish_weights


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("limit", [4 * 2**30, 2000])
def test_what_is_written_loads_without_us_and_computes_the_same(
    stage: int,
    weights: str,
    limit: int,
    model_folder: Path,
    batch_of: Callable[..., Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publish, "FILE_BYTES", limit)
    train = TrainConfig(batch_size=8, zero_stage=stage, weights=weights, lr=1e-2)
    ranks, batch = current_ranks(), batch_of(8)
    with sharded_loading(train, 1):
        model = load_model(model_folder)
    model = model.requires_grad_(True) if weights == "full" else add_lora(model, LoraConfig(r=4), seed=0)
    engine = build_engine(model, train, ranks)
    for _ in range(2):
        engine.backward(per_sample_nll(engine, batch).mean())
        engine.step()
    with torch.no_grad():
        expected = per_sample_nll(engine, batch)
    publish_weights(engine, tmp_path / "out", weights, ranks)
    engine.destroy()
    if weights == "lora":
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "out")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.config.hidden_size == 24
        if stage == 3 and limit == 2000:
            assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.allclose(per_sample_nll(loaded, batch), expected, atol=1e-6)


def test_tied_weights_are_written_once(
    tiny: Callable[..., LlamaForCausalLM], tmp_path: Path, batch_of: Callable[..., Batch]
) -> None:
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    train = TrainConfig(batch_size=8, zero_stage=3, weights="full")
    with sharded_loading(train, 1):
        model = load_model(tmp_path / "tied").requires_grad_(True)
    engine = build_engine(model, train, current_ranks())
    with torch.no_grad():
        expected = per_sample_nll(engine, batch_of(4))
    publish_weights(engine, tmp_path / "out", "full", current_ranks())
    engine.destroy()
    with torch.no_grad():
        assert torch.allclose(per_sample_nll(load_model(tmp_path / "out"), batch_of(4)), expected, atol=1e-6)


def test_an_adapter_is_merged_into_a_sharded_base(model_folder: Path, batch_of: Callable[..., Batch], tmp_path: Path) -> None:
    model = add_lora(load_model(model_folder), LoraConfig(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        expected = per_sample_nll(model, batch_of(4))
    save_adapter(model, tmp_path / "adapter")
    train = TrainConfig(batch_size=8, zero_stage=3)
    with sharded_loading(train, 1):
        merged = load_adapter(load_model(model_folder), tmp_path / "adapter", merge=True)
    assert all(parameter.numel() == 0 for parameter in merged.parameters())
    assert not any("lora" in name for name, _ in merged.named_parameters())
    engine = build_engine(add_lora(merged, LoraConfig(r=4), seed=1), train, current_ranks())
    with torch.no_grad():
        assert torch.allclose(per_sample_nll(engine, batch_of(4)), expected, atol=1e-5)
    engine.destroy()
