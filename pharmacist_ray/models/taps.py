"""Hidden-state taps: read, shift or differentiate what named modules of every decoder layer put out.

The one primitive behind every method that works on embeddings rather than weights: Vaccine's and T-Vaccine's perturbation, RepNoise's
features and logit lens. A shift is added as a constant, so that under gradient checkpointing the recomputation sees the same one; all
hooks are gone when a block ends, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import nn

from pharmacist_ray.errors import ModelError

Tap = Literal["layer", "attention", "mlp", "norm"]
"""Where to tap: a decoder layer's output, its self-attention's output before the residual sum, its MLP's output; or the model's
last normalisation, of which there is one."""

_NAMES: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "norm": ("norm", "ln_f", "final_layer_norm", "final_layernorm"),
}
"""The names that the model classes of transformers give these modules."""

_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""What they call the projection of what an attention has mixed."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers in order.

    Args:
        model: A causal language model, bare or inside PEFT.

    Raises:
        ModelError: There is no list of as many modules as the configuration has layers.
    """
    return list(_decoder(model)[1])


def modules_at(model: nn.Module, place: Tap) -> list[nn.Module]:
    """Return the modules of one kind: one for every decoder layer, in order, or for ``norm`` the only one.

    Args:
        model: A causal language model, bare or inside PEFT; on the meta device will do.
        place: Where to tap.

    Raises:
        ModelError: The model has no modules of the names that this kind goes by.
    """
    parent, layers = _decoder(model)
    if place == "layer":
        return list(layers)
    holders = [parent] if place == "norm" else list(layers)
    names = _NAMES[place]
    children = [dict(holder.named_children()) for holder in holders]
    found = [next((own[name] for name in names if name in own), None) for own in children]
    if any(module is None for module in found):
        known = ", ".join(children[0])
        raise ModelError(
            f"{_kind(model)} has no {place} module under any of the names {', '.join(names)} (there are: {known}); "
            "use an objective that does not tap it"
        )
    return cast("list[nn.Module]", found)


def after_attention(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a decoder layer that come after its attention has mixed the tokens: the projection of its output, and the MLP.

    None where they have other names.
    """
    own = dict(layer.named_children())
    attention, mlp = (next((own[name] for name in _NAMES[kind] if name in own), None) for kind in ("attention", "mlp"))
    inner = dict(attention.named_children()) if attention is not None else {}
    output = next((inner[name] for name in _OUTPUT if name in inner), None)
    return [module for module in (output, mlp) if module is not None]


@contextmanager
def captured(modules: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect what modules put out during the forward passes of a block, with its graph.

    Args:
        modules: Whose outputs; a module that returns a tuple counts by its first tensor.

    Yields:
        A list that is filled in place: after a forward pass, entry l is the last output of module l.
    """
    outputs: list[torch.Tensor] = [torch.empty(0)] * len(modules)

    def keep(index: int, output: torch.Tensor) -> torch.Tensor:
        outputs[index] = output
        return output

    with _hooked(modules, keep):
        yield outputs


@contextmanager
def shifted(modules: Sequence[nn.Module], shifts: Sequence[torch.Tensor]) -> Iterator[None]:
    """Add constants to what modules put out inside a block; the backward pass must lie in the block too.

    Args:
        modules: Whose outputs.
        shifts: One tensor of the output's shape (B, T, H) per module.
    """
    with _hooked(modules, lambda index, output: output + shifts[index].to(output.dtype)):
        yield


def gradients_at(modules: Sequence[nn.Module], loss: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of a loss with respect to what modules put out.

    Zero leaves are added to the outputs and differentiated, so nothing reaches any ``.grad`` and no gradient of a weight is built.

    Args:
        modules: Whose outputs.
        loss: Runs the forward pass and returns a scalar.

    Returns:
        One tensor (B, T, H) per module.
    """
    leaves: dict[int, torch.Tensor] = {}

    def add(index: int, output: torch.Tensor) -> torch.Tensor:
        if index not in leaves:  # a recomputation under gradient checkpointing meets its leaf again
            leaves[index] = torch.zeros_like(output, requires_grad=True)
        return output + leaves[index]

    with torch.enable_grad(), _hooked(modules, add):
        value = loss()
        return list(torch.autograd.grad(value, [leaves[index] for index in range(len(modules))]))


@contextmanager
def _hooked(modules: Sequence[nn.Module], use: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    def hook(index: int) -> Callable[..., Any]:
        def run(_: nn.Module, __: Any, output: Any) -> Any:
            # Attention returns (output, weights, …); a bare tensor must not be mistaken for a tuple of batch rows.
            if isinstance(output, torch.Tensor):
                return use(index, output)
            return (use(index, output[0]), *output[1:])

        return run

    handles = [module.register_forward_hook(hook(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Return the module that holds the list of decoder layers, and the list."""
    base = getattr(model, "get_base_model", lambda: model)()
    config = getattr(base, "config", None)
    count = getattr(config.get_text_config() if config is not None else None, "num_hidden_layers", None)
    text = getattr(base, "get_decoder", lambda: None)() or base  # of a model that also sees, what reads and writes
    for holder in text.modules():
        for child in holder.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return holder, child
    raise ModelError(f"{_kind(model)} has no list of its {count} decoder layers; this objective cannot find them")


def _kind(model: nn.Module) -> str:
    base = getattr(model, "get_base_model", lambda: model)()
    return type(base).__name__
