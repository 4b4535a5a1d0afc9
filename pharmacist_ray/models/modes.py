"""Gradient checkpointing, and a model that stands still but for it."""

from __future__ import annotations

from typing import Any


def enable_checkpointing(model: Any) -> None:
    """Let a model of transformers, perhaps with an adapter, recompute its layers' activations in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def stand_still(model: Any) -> None:
    """Switch dropout off, and leave gradient checkpointing on where it is enabled.

    A layer checkpoints only in training mode; those with a dropout of their own (a rate, not a module) must do without.
    """
    model.eval()
    for module in model.modules():
        own_dropout = any("drop" in key and isinstance(rate, float) and rate > 0 for key, rate in vars(module).items())
        if getattr(module, "gradient_checkpointing", False) and not own_dropout:
            module.training = True
