"""What of a model bears on its cost, from its config.json alone: its modules are built on the meta device, so counts are exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pharmacist_ray.config.schema import ModelConfig
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.hub import on_disk
from pharmacist_ray.models.load import add_lora, first_layers
from pharmacist_ray.models.taps import decoder_layers


@dataclass(frozen=True)
class Shape:
    """What of a model bears on its cost. Counts are of numbers, not of bytes."""

    parameters: int
    """All of the base, tied weights once."""
    linear: int
    """Those of linear modules but the output head's: what `model.quantization` keeps in few bits."""
    embedding: int
    """The input table, or 0 where the output head is the same tensor: a look-up multiplies nothing."""
    head: int
    """The output head, vocabulary × hidden."""
    largest: int
    """The largest tensor."""
    layer: int
    """The largest decoder layer."""
    layers: int
    hidden: int
    heads: int
    attention: int
    """Heads × their width."""
    keys: int
    """Key-value heads × their width."""
    intermediate: int
    vocabulary: int
    inputs: int
    """Widths of the inputs of a decoder layer's linear modules, summed; siblings of one width share one (queries, keys and values;
    attention's output is counted with them, because attention keeps it anyway)."""
    adapter: int
    """The LoRA adapter."""
    adapted_weights: int
    """Weights beside which it lies."""
    adapted: float
    """Adapted modules of a decoder layer, on average."""
    adapted_inputs: float
    """Widths of their inputs, summed over modules."""
    adapted_distinct: float
    """The same with shared inputs counted once."""
    rank: int


def shape_of(model: ModelConfig, first: int | None = None) -> Shape:
    """Return a model's shape; no weights are read or made.

    Args:
        model: The model and the adapter that is put on it.
        first: Its first so many decoder layers alone; None: all.

    Raises:
        ModelError: There is no such model, it is no causal language model, or a LoRA target names no linear module.
    """
    trust = model.trust_remote_code
    try:
        with torch.device("meta"):
            settings = AutoConfig.from_pretrained(on_disk(model.path), trust_remote_code=trust)
            if first is not None:
                settings = first_layers(settings, first)
            base = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust)
    except ModelError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"cannot build '{model.path}' from its config.json: {said} ({type(error).__name__})") from error
    text, layers = settings.get_text_config(), decoder_layers(base)
    hidden = text.hidden_size
    head_width = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    table, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    sizes = [parameter.numel() for parameter in base.parameters()]
    linear = sum(
        module.weight.numel()
        for module in base.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not base.get_output_embeddings()
    )
    largest_layer = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    linears = [(name, _width(module)) for name, module in layers[0].named_modules() if isinstance(module, nn.Linear | Conv1D)]
    with torch.device("meta"):
        with_lora = add_lora(base, model.lora, seed=0)
    bases = {name: module.base_layer for name, module in with_lora.named_modules() if hasattr(module, "lora_A")}
    adapted = [(name, _width(module)) for name, module in bases.items()]
    return Shape(
        parameters=sum(sizes),
        linear=linear,
        embedding=0 if table is head else table.numel(),
        head=head.numel(),
        largest=max(sizes),
        layer=largest_layer,
        layers=len(layers),
        hidden=hidden,
        heads=text.num_attention_heads,
        attention=text.num_attention_heads * head_width,
        keys=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_width,
        intermediate=getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * hidden,
        vocabulary=head.shape[0],
        inputs=_distinct(linears),
        adapter=sum(parameter.numel() for parameter in with_lora.parameters() if parameter.requires_grad),
        adapted_weights=sum(module.weight.numel() for module in bases.values()),
        adapted=len(adapted) / len(layers),
        adapted_inputs=sum(width for _, width in adapted) / len(layers),
        adapted_distinct=_distinct(adapted) / len(layers),
        rank=model.lora.r,
    )


def _width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]


def _distinct(linears: list[tuple[str, int]]) -> int:
    """Sum the widths of inputs, where modules of one parent and one width count as reading one tensor."""
    return sum(width for _, width in {(name.rpartition(".")[0], width) for name, width in linears})
