"""How a model will compute, known before it is loaded: the precision of its weights as stored, and the attention that is asked for."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pharmacist_ray.config.schema import Config
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.storage import StoragePath, json_of, storage_path

BEST = {"bfloat16": "bfloat16", "BF16": "bfloat16", "float16": "bfloat16", "F16": "bfloat16"}
"""Precision as config.json or safetensors names it → the one to load in; float32 for all others. Of float16, whose range is too small
for gradients, bfloat16 keeps the range and the size."""


def with_dtype(config: Config) -> Config:
    """Return the configuration with the precision that ``auto`` stands for, which is what artifacts depend on.

    Args:
        config: Its model at one commit, if it is on a hub.
    """
    if config.model.dtype != "auto":
        return config
    model = config.model.model_copy(update={"dtype": stored_dtype(config.model.path)})
    return config.model_copy(update={"model": model})


def stored_dtype(path: str) -> str:
    """Return the precision in which a model's weights are stored, as `load_model` takes it.

    What config.json says counts, as for transformers; where it says nothing, that of most weights in the first file. Where neither can
    be read, ``float32``: whoever loads the model will say what is wrong.

    Args:
        path: Folder, hub id or URI.
    """
    try:
        config = _config(path)
    except Exception:  # noqa: BLE001 - storages and the hub raise what they like
        return "float32"
    sections = [config, *(config[name] for name in ("text_config", "llm_config") if isinstance(config.get(name), dict))]
    named = next((str(one[key]) for one in sections for key in ("dtype", "torch_dtype") if one.get(key)), "")
    if not named and Path(path).is_dir():
        named = _most_common(Path(path))
    return BEST.get(named.removeprefix("torch."), "float32")


def check_attention(attn: str | None, gpus: float) -> None:
    """Find out whether an attention implementation can run, without loading anything.

    Args:
        attn: The configuration's ``model.attn``.
        gpus: GPUs of a worker.

    Raises:
        ConfigError: Its package is missing, or it needs a GPU and none is asked for.
    """
    if attn != "flash_attention_2":
        return
    if not gpus:
        raise ConfigError(
            "model.attn=flash_attention_2 computes on a GPU alone; set resources.gpus_per_worker, or leave model.attn out"
        )
    if find_spec("flash_attn") is None:
        raise ConfigError("model.attn=flash_attention_2 needs a package: `pip install flash-attn`; or leave model.attn out")


def _config(path: str) -> dict[str, Any]:
    if "://" in path or Path(path).exists():
        folder: StoragePath = storage_path(path)
        return dict(json_of(folder / "config.json"))
    from huggingface_hub import hf_hub_download  # only where a model has a hub id

    name, _, revision = path.partition("@")
    return dict(json.loads(Path(hf_hub_download(name, "config.json", revision=revision or None)).read_text()))


def _most_common(folder: Path) -> str:
    """Return the precision of most numbers in a folder's first safetensors file, from its header alone."""
    file = min(folder.glob("*.safetensors"), default=None)
    if file is None:
        return ""
    numbers: Counter[str] = Counter()
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                tensor = opened.get_slice(name)
                numbers[tensor.get_dtype()] += prod(tensor.get_shape())
    except (SafetensorError, OSError):
        return ""
    return numbers.most_common(1)[0][0] if numbers else ""
