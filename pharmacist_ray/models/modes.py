"""Gradient checkpointing, dropout, and a model that stands still but for checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Switch the dropout modules of a model off inside a block; all else, gradient checkpointing too, stays as it is."""
    active = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True
