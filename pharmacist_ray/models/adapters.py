"""LoRA adapters as they lie on disk: their factors, and several of them as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pharmacist_ray.storage import json_of, local_copy, storage_path


def factors_of(folder: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return module → (s B, A) of an adapter on disk, s its scale α/r or, with rsLoRA, α/√r."""
    place = local_copy(storage_path(folder))
    config: Mapping[str, Any] = json_of(place / "adapter_config.json")
    tensors = load_file(Path(place) / "adapter_model.safetensors")
    found = {}
    for name, b in tensors.items():
        if ".lora_B." in name:
            module = module_of(name)
            rank = config.get("rank_pattern", {}).get(module, b.shape[1])
            alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            found[module] = (b.float() * scale, tensors[name.replace(".lora_B.", ".lora_A.")].float())
    return found


def short_name(adapters: Sequence[str]) -> str:
    """Return a name for a sequence of adapters, of letters and digits, the same for the same folders."""
    return hashlib.blake2b("|".join(adapters).encode(), digest_size=8).hexdigest()


def module_of(name: str) -> str:
    """Return the module that a parameter of an adapter belongs to, as the base names it."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def stacked(adapters: Sequence[str], base: str, out: Path) -> int:
    """Write one adapter that does what several do one on top of the other, and return its rank.

    Merged one after the other they add Σ s_k B_k A_k to a weight, and that is B A with B = [s_1 B_1, s_2 B_2, …] and the A_k below each
    other: exact, at the sum of their ranks. A module that one of them does not touch has zeros in its place.

    Args:
        adapters: Their folders, in any order.
        base: What the result names as its base model.
        out: The folder to write.
    """
    parts = [factors_of(folder) for folder in adapters]
    ranks = [max(a.shape[0] for _, a in part.values()) for part in parts]
    tensors: dict[str, torch.Tensor] = {}
    modules = sorted({module for part in parts for module in part})
    for module in modules:
        b, a = next(part[module] for part in parts if module in part)
        bs, as_ = [], []
        for part, rank in zip(parts, ranks, strict=True):
            own_b, own_a = part.get(module, (b.new_zeros(b.shape[0], 0), a.new_zeros(0, a.shape[1])))
            missing = rank - own_a.shape[0]
            bs += [own_b, b.new_zeros(b.shape[0], missing)]
            as_ += [own_a, a.new_zeros(missing, a.shape[1])]
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.cat(bs, dim=1)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.cat(as_, dim=0)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors")
    rank = sum(ranks)
    config = {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return rank
