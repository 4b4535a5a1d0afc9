"""The model to harden, and the adapter that is trained on it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pharmacist_ray.config.section import Count, Location, Positive, Section, Share


class LoraConfig(Section):
    """The low-rank adapter."""

    r: Count = 8
    """Rank (Vaccine and T-Vaccine public code: 8)."""
    alpha: Positive = 16.0
    """Scale numerator: the update is alpha / r · B·A (ours; published values range from 4/32 to 2)."""
    dropout: Share = 0.0
    """Dropout on the adapter's input; 0 so that paired passes see one network (ours)."""
    targets: str | list[str] = "all-linear"
    """Names of the linear modules that get an adapter, or `all-linear`."""


class ModelConfig(Section):
    """The model to harden."""

    path: Location
    """Folder, hub id or URI of a causal language model with safetensors weights. `owner/name@revision` is a branch, a tag or a commit; a
    run directory keeps to the commit that a name meant when it was begun."""
    template: Literal["auto", "chat", "alpaca", "plain"] = "auto"
    """Prompt template; `auto` takes the model's chat template, else Alpaca's."""
    system: str = Field(default="", exclude_if=lambda value: not value)
    """System prompt before every row that brings none of its own; for a chat template."""
    template_arguments: dict[str, bool | int | float | str] = Field(default={}, exclude_if=lambda value: not value)
    """What the chat template is given besides the turns, for example `{enable_thinking: false}` (Qwen3)."""
    max_length: Count = 256
    """Longest sequence in tokens, prompt and answer together (Booster's public code: 256)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the base weights; adapters are float32 always. `auto` takes the checkpoint's own (float16 becomes bfloat16, whose
    range gradients need)."""
    attn: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Attention implementation of transformers; by default the one that it takes for this model."""
    quantization: Literal["8bit", "4bit"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Load the frozen base in 8 bits or in 4 (NF4), for adapters on GPUs that the whole base does not fit; needs
    `pip install 'pharmacist-ray[quantization]'`."""
    lora: LoraConfig = LoraConfig()
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along. Leave it off unless you have read that code."""
