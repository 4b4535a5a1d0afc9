from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaForCausalLM

from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.schema import ModelConfig
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models import load
from pharmacist_ray.models.load import load_model
from pharmacist_ray.models.precision import check_attention, stored_dtype
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import check


@pytest.mark.parametrize(("stored", "wanted"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")])
@pytest.mark.parametrize("named", [True, False])
def test_the_precision_is_known_from_the_configuration_or_from_the_weights_header(
    stored: str, wanted: str, named: bool, tiny: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny().to(getattr(torch, stored)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("dtype") == stored
    if not named:
        (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(load, "load_model", None)  # nothing is loaded for it
    assert stored_dtype(str(tmp_path)) == wanted


def test_a_nested_and_an_old_configuration_name_it_too(tmp_path: Path) -> None:
    for config in ({"torch_dtype": "bfloat16"}, {"text_config": {"dtype": "bfloat16"}}, {"dtype": "torch.bfloat16"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert stored_dtype(str(tmp_path)) == "bfloat16"


@pytest.mark.parametrize("path", ["/none/model", "nobody/no-such-model"])
def test_what_cannot_be_read_is_left_to_whoever_loads_it(path: str) -> None:
    assert stored_dtype(path) == "float32"


def _run(folder: Path, placed_example: dict[str, Any], **model: Any) -> Run:
    return Run(parse_config(placed_example | {"model": {"path": str(folder), **model}}, where="test"))


def test_auto_is_the_checkpoints_own_and_artifacts_know_it(
    tiny: Callable[..., LlamaForCausalLM], tmp_path: Path, placed_example: dict[str, Any]
) -> None:
    for dtype in ("float32", "bfloat16"):
        tiny().to(getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
        auto, given = (_run(tmp_path / dtype, placed_example, dtype=value) for value in ("auto", dtype))
        assert auto.model == given.model
        assert auto.model.dtype == dtype
        assert auto.ingested("candidates").fingerprint == given.ingested("candidates").fingerprint
    assert ModelConfig(path="x").dtype == "auto"


def test_full_weights_of_a_coarse_checkpoint_are_refused_once_it_is_known(
    tiny: Callable[..., LlamaForCausalLM], tmp_path: Path, placed_example: dict[str, Any]
) -> None:
    tiny().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    values = placed_example | {"alignment": {"train": {"weights": "full", "steps": 1}}}
    run = _run(tmp_path / "model", values)
    with pytest.raises(ConfigError, match=r"^alignment\.train: full weights in bfloat16 need zero_stage 1 or higher"):
        check(run)


@pytest.mark.parametrize(("device", "tf32"), [("cpu", False), ("cuda:1", True)])
def test_float32_is_multiplied_in_tf32_on_a_gpu_alone(
    device: str, tf32: bool, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)  # there may be no GPU here
    load_model(model_folder, device=device)
    assert said == (["high"] if tf32 else [])


def test_the_attention_that_is_asked_for_reaches_the_model(model_folder: Path) -> None:
    assert ModelRef(str(model_folder), attn="eager").load().config._attn_implementation == "eager"
    assert ModelRef.of(ModelConfig(path=str(model_folder), dtype="float32")).load().config._attn_implementation == "sdpa"
    with pytest.raises(ValidationError, match="'eager', 'sdpa', 'flash_attention_2' or 'flex_attention'"):
        ModelConfig(path="x", attn="someone/kernel")  # type: ignore[arg-type]  # code from a hub


def test_attention_that_cannot_run_is_told_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pharmacist_ray.models.precision.find_spec"
    with pytest.raises(
        ConfigError, match=r"^model\.attn=flash_attention_2 computes on a GPU alone; set resources\.gpus_per_worker"
    ):
        check_attention("flash_attention_2", 0)
    monkeypatch.setattr(name, lambda package: None)
    with pytest.raises(ConfigError, match=r"^model\.attn=flash_attention_2 needs a package: `pip install flash-attn`"):
        check_attention("flash_attention_2", 1)
    monkeypatch.setattr(name, lambda package: SimpleNamespace())
    check_attention("flash_attention_2", 1)
    check_attention("eager", 0)
    check_attention(None, 0)
