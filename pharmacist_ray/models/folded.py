"""A LoRA adapter folded into the weights beside which it lies, for passes during which neither moves.

W x + s B (A x) is (W + s B A) x: one product in the place of three, and no sum of outputs. The factors' gradients are still to be had, from
the layer's own input and its output's gradient alone; see `sample_grads`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def folded(model: Any) -> Iterator[None]:
    """Let a model compute with its adapter folded in, wherever that changes nothing but the order of rounding.

    It holds a second copy of the folded weights meanwhile; they are the very same ones afterwards. Left as they are: layers whose weights
    or factors are not float32 (half a weight's digits would swallow a small change), in few bits, spread over workers or tied to others,
    those whose adapter is off or is one of several, and whatever is not plain LoRA on a linear layer. Do not switch the adapter
    off inside the block.

    Args:
        model: A causal language model, bare or inside PEFT, whose dropout is off.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    kept: list[tuple[Any, torch.Tensor]] = []
    try:
        for layer in model.modules():
            if _foldable(layer) and uses[id(layer.base_layer.weight)] == 1:
                name, weight = layer.active_adapters[0], layer.base_layer.weight
                kept.append((layer, weight.data))
                factors = layer.lora_B[name].weight.data, layer.lora_A[name].weight.data
                weight.data = torch.addmm(weight.data, *factors, alpha=layer.scaling[name])
                layer.merged_adapters.append(name)
        yield
    finally:
        for layer, weights in kept:
            layer.base_layer.weight.data = weights
            layer.merged_adapters.clear()


def folded_factors(layer: Any) -> tuple[nn.Module, ...]:
    """Return the modules that hold A and B of a layer whose adapter is folded in, and nothing of any other."""
    return tuple(factors[name] for name in getattr(layer, "merged_adapters", ()) for factors in (layer.lora_A, layer.lora_B))


def at_factor(layer: Any, factor: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a factor would have got, had it not been folded in: its input, and its output's gradient.

    With y = s B (A x) these are x and s Bᵀ g for A, and A x and s g for B; there s is given to A x, which is smaller.

    Args:
        layer: A layer whose adapter is folded in.
        factor: The module that holds its A or its B.
        x: (…, in) The layer's input.
        grad: (…, out) Its output's gradient g.
    """
    (name,) = layer.merged_adapters
    a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return (x, (grad @ b).mul_(scale)) if factor is layer.lora_A[name] else ((x @ a.T).mul_(scale), grad)


def _foldable(layer: Any) -> bool:
    if not hasattr(layer, "lora_A") or type(getattr(layer, "base_layer", None)) is not nn.Linear:
        return False
    if layer.merged_adapters or layer.disable_adapters or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
        return False
    weights = [layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight]
    # Under ZeRO 3 the last pass may have left a layer gathered, and the next one lets it go.
    return all(one.dtype == torch.float32 and type(one.data) is torch.Tensor and not hasattr(one, "ds_id") for one in weights)
