"""A frozen base in 8 or in 4 bits, by bitsandbytes: for adapters on GPUs that the whole base does not fit (QLoRA, arXiv 2305.14314).

An adapter cannot be merged into such weights: the sum would be rounded to 4 bits, and another one after it again. So what is merged
elsewhere is added here to what a layer puts out: W x + s B (A x), with W as it was loaded. It is then part of the base, as a merged adapter
is: nothing that turns adapters off turns it off.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from pharmacist_ray.config.schema import Config, ModelConfig, TrainConfig
from pharmacist_ray.errors import ConfigError

if TYPE_CHECKING:  # seconds to import, and every run is checked here
    from peft import PeftModel

INSTALL = "`pip install 'pharmacist-ray[quantization]'`"


def quantized_loading(bits: str, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Return what ``from_pretrained`` is given to load a base in few bits: NF4 for 4, LLM.int8 for 8; the output head stays whole.

    Args:
        bits: ``8bit`` or ``4bit``.
        dtype: Precision of what is not in few bits, and of products.
        device: Where the model goes; it is there as soon as it is loaded.
    """
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def differentiable(model: Any) -> Any:
    """Keep a model's layers in the form that gradients go through, and return it.

    Of 4 bits on some CPUs, a pass without gradients would repack the weights for a kernel that has no backward pass, for good, and the
    next pass with gradients would go wrong without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def is_quantized(model: Any) -> bool:
    """Whether a model, bare or inside PEFT, was loaded in few bits."""
    base = getattr(model, "get_base_model", lambda: model)()
    return bool(getattr(base, "is_quantized", False))


def beside(adapted: PeftModel) -> Any:
    """Return the base with an adapter's product added to what its layers put out, instead of to their weights.

    Args:
        adapted: The base with that adapter on top.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    made = []
    for module in layers:
        for name in module.active_adapters:
            factors = (module.lora_A[name].weight, module.lora_B[name].weight)
            made.append((module.get_base_layer(), *(one.detach().clone() for one in factors), module.scaling[name]))
    base = adapted.unload()
    for layer, a, b, scaling in made:
        layer.register_forward_hook(_Plus(a, b, scaling))
    return base


class _Plus:
    """Adds s B (A x) to a layer's output; a class, so that a model with it can be copied and sent."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        self.a, self.b, self.scaling = a, b, scaling

    def __call__(self, layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        if self.a.device != x.device:
            self.a, self.b = self.a.to(x.device), self.b.to(x.device)
        return output + (linear(linear(x.to(self.a.dtype), self.a), self.b) * self.scaling).to(output.dtype)


def check_bits(model: ModelConfig, where: str) -> None:
    """Find out whether a model can be loaded in the bits that it asks for.

    Args:
        model: The model's section.
        where: The key that asks for them, for the error.

    Raises:
        ConfigError: The package is missing, or the model brings its own code.
    """
    if model.quantization is None:
        return
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"{where} needs bitsandbytes: {INSTALL}, or leave it out")
    if model.trust_remote_code:
        raise ConfigError(f"{where} cannot be had with a model of its own code; leave one of the two out")


def check_quantization(config: Config) -> None:
    """Find out whether a base can be loaded in few bits, and whether all that is to be done can be done over it.

    Raises:
        ConfigError: The package is missing, all weights are to be trained, or the model is to be sharded.
    """
    if config.model.quantization is None:
        return
    check_bits(config.model, "model.quantization")
    trainings: dict[str, TrainConfig | None] = {
        "selector.warmup": config.selector.warmup,
        "selector.reference": config.selector.reference,
        "selector.tov": config.selector.tov,
        "alignment.train": config.alignment.train,
        "finetune.train": config.finetune.train,
        **{f"attacks '{attack.name}'": attack.train for attack in config.attacks},
    }
    for where, train in trainings.items():
        if train is not None and train.weights == "full":
            raise ConfigError(f"{where} trains all weights, and those of model.quantization are frozen; set its weights to lora")
        if train is not None and train.zero_stage == 3:
            raise ConfigError(
                f"{where} has zero_stage=3, which cannot shard the weights of model.quantization; set it to 2 or less"
            )
