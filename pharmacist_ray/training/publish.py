"""Write trained weights in the form that PEFT or transformers load without us, one parameter at a time where they are sharded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed.runtime.zero import GatheredParameters
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from pharmacist_ray.models.load import save_adapter
from pharmacist_ray.runtime.ranks import Ranks

FILE_BYTES = 4 * 2**30
"""About how large one file of full weights gets; the first worker holds one at a time."""


def publish_weights(
    engine: Any,
    folder: Path,
    weights: Literal["lora", "full"],
    ranks: Ranks,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write an adapter, or a model. All workers take part, the first one writes.

    Args:
        engine: The engine.
        folder: Where to.
        weights: What was trained.
        ranks: This worker.
        tokenizer: Goes with full weights.
    """
    module, sharded = engine.module, engine.zero_optimization_stage() == 3
    if weights == "lora":
        gathered = dict(_whole(module, trained_only=True)) if sharded else None
        if ranks.first:
            save_adapter(module, folder, gathered)
    elif sharded:
        _write_files(module, folder, ranks)
    elif ranks.first:
        module.save_pretrained(folder, safe_serialization=True)
    if weights == "full" and ranks.first and tokenizer is not None:
        tokenizer.save_pretrained(folder)
    ranks.barrier()


def _whole(module: torch.nn.Module, *, trained_only: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter whole, on the CPU, gathering one at a time."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or not trained_only:
            with GatheredParameters([parameter]):
                yield name, parameter.detach().cpu().clone().contiguous()


def _write_files(module: Any, folder: Path, ranks: Ranks) -> None:
    """Write a sharded model as Hugging Face's numbered safetensors files with their index."""
    held: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    total = 0

    def flush() -> None:
        if held:
            save_file(held, folder / f"part-{len(files):05d}.safetensors", metadata={"format": "pt"})
            files.append(list(held))
            held.clear()

    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in _whole(module, trained_only=False):
        if not ranks.first:
            continue
        total += tensor.nbytes
        held[name] = tensor
        if sum(one.nbytes for one in held.values()) >= FILE_BYTES:
            flush()
    if not ranks.first:
        return
    flush()
    index: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        (folder / f"part-{number:05d}.safetensors").rename(folder / final)
        index |= dict.fromkeys(names, final)
    if len(files) > 1:
        listed = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listed, indent=1))
    module.config.save_pretrained(folder)
    if module.can_generate() and module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
