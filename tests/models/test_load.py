from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from pharmacist_ray.errors import ConfigError, ModelError
from pharmacist_ray.models.load import (
    LoraConfig,
    add_lora,
    empty_model,
    load_adapter,
    load_model,
    load_tokenizer,
    merge_adapter,
    save_adapter,
)
from pharmacist_ray.models.taps import decoder_layers
from tests.families import FAMILIES


@pytest.fixture
def folder(tmp_path: Path, tiny: Any, tokenizer: Any) -> Path:
    tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(model: Any, seed: int = 0, **settings: Any) -> Any:
    """An adapter that changes something: B is not zero."""
    model = add_lora(model, LoraConfig(r=4, **settings), seed)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits.float()


def test_a_model_and_its_tokenizer_come_back(folder: Path, tiny: Any, tokenizer: Any) -> None:
    model = load_model(folder)
    assert torch.equal(logits(model), logits(tiny()))
    assert not model.training
    assert load_tokenizer(str(folder))("w1 w40 w7")["input_ids"] == tokenizer("w1 w40 w7")["input_ids"]
    assert {p.dtype for p in load_model(folder, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_merged_logits_equal_the_adapters(folder: Path, tmp_path: Path) -> None:
    model = trained(load_model(folder))
    want = logits(model)
    assert (want - logits(load_model(folder))).abs().max() > 0.05
    save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = load_model(folder, adapter=tmp_path / "adapter")
    assert torch.equal(logits(loaded), want)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, _ in loaded.named_parameters() if "lora_" in name
    }
    merged = load_model(folder, adapter=tmp_path / "adapter", merge=True)
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)

    merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), want, rtol=1e-4, atol=1e-5)
    load_tokenizer(tmp_path / "merged")
    assert not (tmp_path / "merged.partial").exists()
    with pytest.raises(ModelError, match="merged' is there already; give an empty or a new folder"):
        merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")


def test_a_merged_model_keeps_the_precision_of_its_base(tmp_path: Path, tiny: Any, tokenizer: Any) -> None:
    base = tmp_path / "base"
    tiny().to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapted = trained(load_model(base))
    save_adapter(adapted, tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    exact = adapted.merge_and_unload().model.layers[0].mlp.up_proj.weight
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], exact.to(torch.bfloat16))  # rounded once


def test_the_seed_fixes_an_adapter_and_the_callers_generator_stands_still(tiny: Any) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = add_lora(tiny(), LoraConfig(r=4), seed)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = weights(3)
    torch.rand(5)
    again, other = weights(3), weights(4)
    torch.set_rng_state(state)
    weights(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert all(p.abs().max() == 0 for name, p in first.items() if "lora_B" in name)


def test_adapters_are_float32_on_any_base_and_the_base_is_frozen(tiny: Any) -> None:
    model = add_lora(tiny().to(torch.bfloat16), LoraConfig(r=2), seed=0)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", 14),
        (("all-linear",), 14),
        (("q_proj", "v_proj"), 4),
        ("mlp.up_proj", 2),
        (("layers.1.self_attn.k_proj",), 1),
    ],
)
def test_targets_choose_the_layers(tiny: Any, targets: Any, layers: int) -> None:
    model = add_lora(tiny(), LoraConfig(r=2, targets=targets), seed=0)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == layers
    assert not any("lm_head" in name and "lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("targets", [("q_proj", "c_attn"), "c_attn", (), ("j_proj",)])
def test_unknown_targets_are_refused_with_the_known_ones(tiny: Any, targets: Any) -> None:
    text = r"no linear module for LoRA targets .*; this model has down_proj, gate_proj, k_proj, lm_head, .*; or use 'all-linear'"
    with pytest.raises(ModelError, match=text):
        add_lora(tiny(), LoraConfig(targets=targets), seed=0)


def test_a_second_adapter_is_refused(tiny: Any) -> None:
    with pytest.raises(ModelError, match="already has an adapter; merge it first"):
        add_lora(add_lora(tiny(), LoraConfig(), seed=0), LoraConfig(), seed=0)


def test_errors_name_the_path_and_the_remedy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"/gone' is not a folder, and a hub id has the form 'owner/name'; check the path"):
        load_model(tmp_path / "gone")
    with pytest.raises(ModelError, match="'gone' is not a folder"):
        load_tokenizer("gone")
    with pytest.raises(ModelError, match="'nobody/nothing' is no folder here and cannot be had from the hub: "):
        load_model("nobody/nothing")
    with pytest.raises(ConfigError, match=r"unknown model dtype 'bfloat' \(did you mean 'bfloat16'\?\)"):
        load_model(folder, dtype="bfloat")

    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no tokenizer in '.*/empty'; save the model's own there"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"no weights in '.*/empty'; needed is model.safetensors"):
        load_model(tmp_path / "empty")


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "exploded",))

    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    load_model(folder)  # beside safetensors it is not looked at
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"only pickled weights, which can run code when loaded in '.*base'; needed is model.safetens"
    ):
        load_model(folder)
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize("damage", ["missing", "shape", "junk", "config"])
def test_damaged_models_are_refused(folder: Path, damage: str) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    if damage == "missing":
        del weights["model.norm.weight"]
        text = r"base' lacks 1 of the model's weights \('model.norm.weight', …\); download or export it again"
    elif damage == "shape":
        weights["model.norm.weight"] = torch.ones(5)
        text = r"cannot load '.*base': .*mismatched.* \(RuntimeError\)"
    save_file(weights, file, metadata={"format": "pt"})
    if damage == "junk":
        file.write_bytes(b"junk")
        text = r"cannot load '.*base': .*header.* \(SafetensorError\)"
    elif damage == "config":
        (folder / "config.json").write_text(json.dumps({"a": 1}))
        text = r"cannot load '.*base': .*model_type.* \(ValueError\)"
    with pytest.raises(ModelError, match=text) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_wrong_adapters_are_refused(folder: Path, tmp_path: Path, tiny: Any) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(ModelError, match=r"no weights in '.*adapter'; needed is adapter_model.safetensors"):
        load_model(folder, adapter=adapter)
    save_adapter(trained(tiny(num_hidden_layers=3)), adapter)
    with pytest.raises(ModelError, match=r"adapter '.*adapter' does not fit this model \('.*layers.2.*', …\); use the base"):
        load_model(folder, adapter=adapter)
    save_adapter(trained(tiny(hidden_size=32)), adapter)
    with pytest.raises(ModelError, match=r"cannot load '.*adapter': .*size mismatch"):
        load_model(folder, adapter=adapter)
    save_adapter(trained(tiny()), adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ModelError, match=r"is of type .*IA3.*; only LoRA adapters are supported"):
        load_adapter(load_model(folder), adapter)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_first_layers_of_a_model_are_the_model_with_the_others_cut_off(
    family_folder: Any, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = family_folder(family)
    cut = load_model(folder)
    layers = next(one for one in cut.modules() if isinstance(one, nn.ModuleList) and list(one) == decoder_layers(cut))
    assert len(layers) == 2
    del layers[1]
    cut.config.get_text_config().num_hidden_layers = 1
    capfd.readouterr()
    first = load_model(folder, layers=1)
    assert len(decoder_layers(first)) == 1
    torch.testing.assert_close(logits(first), logits(cut))
    assert (logits(first) - logits(load_model(folder))).abs().max() > 1e-3
    assert "UNEXPECTED" not in capfd.readouterr().err  # transformers' list of what was left out
    assert len(decoder_layers(empty_model(folder, layers=1))) == 1


def test_a_model_has_no_more_layers_than_it_has(folder: Path) -> None:
    with pytest.raises(ModelError) as raised:
        empty_model(folder, layers=3)
    assert str(raised.value) == "the model has 2 layers, and its first 3 are asked for; lower scoring.proxy.layers"


def test_the_first_layers_take_an_adapter_of_their_own(folder: Path, tmp_path: Path) -> None:
    model = trained(load_model(folder, layers=1))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_model(folder, layers=1), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ModelError, match=r"does not fit this model"):
        load_adapter(load_model(folder), tmp_path / "adapter")
