"""Tokenizers, models and LoRA adapters: from a folder or a hub id, from safetensors only, and every failure as one line."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from pharmacist_ray.config.schema import LoraConfig
from pharmacist_ray.errors import ModelError, unknown_name
from pharmacist_ray.models.hub import on_disk
from pharmacist_ray.models.quantized import beside, differentiable, is_quantized, quantized_loading
from pharmacist_ray.models.taps import decoder_layers
from pharmacist_ray.storage import StoragePath

transformers_logging.disable_progress_bar()  # weights load in seconds, and the bars of many workers fill a log

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The precisions a model can be loaded in."""

ALL_LINEAR = "all-linear"
"""As LoRA targets: every linear layer of the text decoder's layers. A mixture's router and its fused experts are none, and get no
adapter; nor does what else a model has, such as a part that sees."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(path: str | StoragePath, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder or hub id.

    Raises:
        ModelError: There is no such folder or model, or it holds no tokenizer.
    """
    path = on_disk(path)
    folder = _folder(path)
    if folder and not trust_remote_code and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ModelError(f"no tokenizer in '{path}'; save the model's own there (tokenizer.save_pretrained)")
    tokenizer: PreTrainedTokenizerBase = _get(path, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    return tokenizer


def load_model(
    path: str | StoragePath,
    *,
    dtype: str = "float32",
    adapter: str | StoragePath | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
    attn: str | None = None,
    quantization: str | None = None,
    layers: int | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """Return a causal language model in evaluation mode.

    Args:
        path: A folder or hub id with safetensors weights.
        dtype: A key of `DTYPES`. An adapter's own weights are float32 whatever this is.
        adapter: A PEFT adapter's folder or hub id to put on top; its weights stay trainable, the base is frozen.
        merge: Add the adapter into the weights, so that a plain model comes back.
        trust_remote_code: Run model code that comes with the weights. Only for sources as trusted as this package.
        attn: The attention implementation, a name that transformers knows; by default the one that it takes for this model.
        quantization: ``8bit`` or ``4bit`` for a frozen base in so few bits (see `models.quantized`).
        layers: Load the first so many decoder layers alone, with the norm and the output head behind the last of them.
        device: Where the model goes.

    Raises:
        ModelError: There is no such model or adapter; it has no safetensors weights, or weights are missing or of another shape.
    """
    if dtype not in DTYPES:
        raise unknown_name("model dtype", dtype, list(DTYPES))
    path = on_disk(path)
    _refuse_pickle(_folder(path), "model*.safetensors*", "*.bin")
    with _quiet() if layers else nullcontext():  # or transformers would list the weights of all other layers
        model, info = _get(
            path,
            AutoModelForCausalLM.from_pretrained,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({"attn_implementation": attn} if attn else {}),
            **({"config": _settings(path, trust_remote_code, layers)} if layers else {}),
            **(quantized_loading(quantization, DTYPES[dtype], device) if quantization else {}),
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"'{path}' lacks {len(missing)} of the model's weights ('{missing[0]}', …); download or export it again")
    if adapter is not None:
        model = load_adapter(model, adapter, merge=merge)
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is float32, such as adapters: PyTorch leaves tensor cores idle
    return (differentiable(model) if quantization else model.to(device)).eval()


def empty_model(path: str | StoragePath, *, trust_remote_code: bool = False, layers: int | None = None) -> Any:
    """Return the model without weights, on the meta device: its modules and shapes, from its configuration alone.

    Args:
        path: A folder or hub id.
        trust_remote_code: See `load_model`.
        layers: See `load_model`.

    Raises:
        ModelError: There is no such model, or it has fewer layers.
    """
    config = _settings(on_disk(path), trust_remote_code, layers)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _settings(path: str | Path, trust_remote_code: bool, layers: int | None) -> Any:
    settings = _get(path, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    return settings if layers is None else first_layers(settings, layers)


def first_layers(settings: Any, layers: int) -> Any:
    """Return a model's configuration with its first layers alone, changed in place.

    Raises:
        ModelError: It has fewer.
    """
    text = settings.get_text_config()
    count = text.num_hidden_layers
    if layers > count:
        raise ModelError(f"the model has {count} layers, and its first {layers} are asked for; lower scoring.proxy.layers")
    for name, value in vars(text).copy().items():
        if isinstance(value, list) and len(value) == count:  # one for each layer, such as the kind of its attention
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return settings


def load_adapter(model: Any, path: str | StoragePath, *, merge: bool = False) -> Any:
    """Return a model with a saved adapter on top, trainable, or merged into its weights: of a quantised base, into what layers put out.

    Raises:
        ModelError: There is no such adapter, it is not in safetensors, or it was made for another model.
    """
    path = on_disk(path)
    _refuse_pickle(_folder(path), "adapter_model.safetensors", "adapter_model.bin")
    config = _get(path, PeftConfig.from_pretrained)
    if config.peft_type != PeftType.LORA:
        raise ModelError(f"adapter '{path}' is of type {config.peft_type}; only LoRA adapters are supported")
    with _own_generator(0):  # PEFT draws an initialisation before it loads
        adapted = _get(path, lambda source, **_: PeftModel.from_pretrained(model, source, is_trainable=True, config=config))
    if folder := _folder(path):
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            differing = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
        if differing:
            raise ModelError(f"adapter '{path}' does not fit this model ('{min(differing)}', …); use the base it was made for")
    if merge and is_quantized(model):
        return beside(adapted)
    if merge and is_sharded(model):
        return _merge_sharded(adapted)
    return adapted.merge_and_unload(safe_merge=True) if merge else adapted


def is_sharded(model: Any) -> bool:
    """Say whether a model's weights, or some of them, are spread over workers (ZeRO 3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def add_lora(model: Any, settings: LoraConfig, seed: int) -> PeftModel:
    """Return the model, frozen, with a new LoRA adapter that changes nothing yet (B = 0); the adapter is float32.

    Args:
        model: A plain model; an earlier adapter must be merged first.
        settings: The adapter's shape.
        seed: Fixes A. The same on every device and rank; the caller's random generators do not move.

    Raises:
        ModelError: The model already has an adapter, or a target names no linear module.
    """
    if isinstance(model, PeftModel):
        raise ModelError("the model already has an adapter; merge it first (merge_adapter, or load_model with merge=True)")
    config = PeftLoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_adapted(model, [settings.targets] if isinstance(settings.targets, str) else settings.targets),
        task_type="CAUSAL_LM",
    )
    with _own_generator(seed):
        adapted: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=True)
    return adapted


def _adapted(model: Any, targets: Sequence[str]) -> list[str]:
    """Return what PEFT is to adapt, by the shortest names that mean just these modules.

    Raises:
        ModelError: A target names no linear module.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    layers = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    inside = [name for name, module in linear.items() if id(module) in layers]
    usable = [*inside, *(name for name, module in linear.items() if module is model.get_output_embeddings())]
    named = {target: inside if target == ALL_LINEAR else [name for name in usable if _ends(name, target)] for target in targets}
    unknown = [target for target, names in named.items() if not names]
    if unknown or not targets:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in usable}))
        raise ModelError(f"no linear module for LoRA targets {unknown}; this model has {known}; or use '{ALL_LINEAR}'")
    wanted = {name for names in named.values() for name in names}
    short = {name.rsplit(".", 1)[-1] for name in wanted}
    # PEFT goes by the ends of names, whatever the module is.
    return sorted(
        short if {name for name, _ in model.named_modules() if any(_ends(name, one) for one in short)} == wanted else wanted
    )


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def save_adapter(model: Any, out: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write an adapter as safetensors and its configuration as JSON; never the base's embeddings, and nothing from a hub.

    Args:
        model: The PEFT model.
        out: The folder; made if it is missing.
        state_dict: The gathered weights, where the model itself holds only a shard (ZeRO-3).
    """
    extra = {} if state_dict is None else {"state_dict": state_dict}
    model.save_pretrained(str(out), safe_serialization=True, save_embedding_layers=False, **extra)


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path, *, trust_remote_code: bool = False) -> None:
    """Write a base with an adapter merged into it as a plain model: safetensors in the base's own precision, with the tokenizer.

    The sum is formed in float32, so that a bfloat16 base is rounded once.

    Raises:
        ModelError: ``out`` is there already, or one of the inputs cannot be loaded.
    """
    out = Path(out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ModelError(f"'{out}' is there already; give an empty or a new folder for the merged model")
    tokenizer = load_tokenizer(base, trust_remote_code)
    model = load_model(base, adapter=adapter, merge=True, trust_remote_code=trust_remote_code)
    stored = _get(base, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code).dtype
    partial = out.with_name(out.name + ".partial")  # a folder under the final name is a whole one
    model.to(stored or torch.float32).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)


def _merge_sharded(adapted: PeftModel) -> Any:
    """Merge an adapter into a base that ZeRO 3 has sharded, gathering one matrix at a time."""
    from deepspeed.runtime.zero import GatheredParameters  # slow to import, and only training gets here

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            with torch.no_grad(), GatheredParameters([base.weight], modifier_rank=0):
                for name in module.active_adapters:
                    base.weight.data += module.get_delta_weight(name).to(base.weight)
    return adapted.unload()


def _folder(path: str | Path) -> Path | None:
    """Return the folder, or None for a hub id; what can be neither is an error."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if isinstance(path, Path) or folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise ModelError(f"'{path}' is not a folder, and a hub id has the form 'owner/name'; check the path")
    return None


def _refuse_pickle(folder: Path | None, wanted: str, unsafe: str) -> None:
    if folder and not any(folder.glob(wanted)):
        found = "only pickled weights, which can run code when loaded" if any(folder.glob(unsafe)) else "no weights"
        raise ModelError(f"{found} in '{folder}'; needed is {wanted.replace('*', '')} (save_pretrained writes it)")


def _get(path: str | Path, load: Callable[..., Any], **arguments: Any) -> Any:
    """Call a from_pretrained, and turn what it raises (it is not documented, and varies) into one line."""
    try:
        return load(str(path), **arguments)
    except Exception as error:
        first = " ".join(str(error).split())
        what = f"cannot load '{path}'" if _folder(path) else f"'{path}' is no folder here and cannot be had from the hub"
        raise ModelError(f"{what}: {first[:300]} ({type(error).__name__})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings off the screen inside the block."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def _own_generator(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block (PEFT initialises there, whatever the device) and put it back afterwards."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for something by its old name
        yield
