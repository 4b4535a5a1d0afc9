"""A prompt of trained embeddings before every question: kept as PEFT's prompt tuning, read by PEFT and by `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pharmacist_ray.storage import local_copy, storage_path

_NAME, _FILE = "prompt_embeddings", "adapter_model.safetensors"


def save_prompt(prompt: torch.Tensor, folder: Path, model: Any, base: str) -> None:
    """Write a prompt so that ``PeftModel.from_pretrained`` loads it onto the model that it was trained for.

    Args:
        prompt: Its embeddings, (tokens, H).
        folder: Where to.
        model: That model, for its shape.
        base: What the model was made from.
    """
    from peft import PromptTuningConfig, TaskType

    text = model.config.get_text_config()
    PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=text.num_attention_heads,
        num_layers=text.num_hidden_layers,
    ).save_pretrained(str(folder))
    save_file({_NAME: prompt.detach().float().cpu().contiguous()}, folder / _FILE)


def load_prompt(folder: str) -> torch.Tensor:
    """Return a prompt's embeddings, (tokens, H) in float32."""
    found: torch.Tensor = load_file(Path(local_copy(storage_path(folder))) / _FILE)[_NAME]
    return found


def embed(
    model: Any, prompts_ids: Sequence[Sequence[int]], prompt: torch.Tensor | None, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return questions as embeddings with a prompt right before each, padded, and their attention mask: (B, T, H) and (B, T).

    Padding comes before the prompt, and not between it and the question as in PEFT's own batches: how far the two are apart would hang on
    the other questions.

    Args:
        model: A causal language model, bare.
        prompts_ids: Token ids of B questions.
        prompt: Its embeddings, (tokens, H), or none.
        left: Whether to pad on the left, as for writing on, or on the right.
    """
    table = model.get_input_embeddings()
    device = table.weight.device
    longest = max(map(len, prompts_ids))
    found = table(
        torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts_ids], device=device)
    )  # in one pass, for all workers
    rows = [own[: len(ids)] for own, ids in zip(found, prompts_ids, strict=True)]
    rows = rows if prompt is None else [torch.cat([prompt.to(own), own]) for own in rows]
    width = max(map(len, rows))
    pads = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, *pad)) for row, pad in zip(rows, pads, strict=True)])
    ones = [torch.ones(len(row), dtype=torch.long, device=device) for row in rows]
    mask = torch.stack([torch.nn.functional.pad(one, pad) for one, pad in zip(ones, pads, strict=True)])
    return embeds, mask
