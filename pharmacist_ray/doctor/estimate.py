"""What a training run will hold per GPU, in bytes, from the model's shape alone.

Every number is a product of named factors (`Item`), so that what is printed is what was computed. The result is an upper bound: all
rows are as long as ``max_length``, and what is never alive at the same moment is added up all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from pharmacist_ray.config.schema import Config, TrainConfig
from pharmacist_ray.doctor.shape import Shape
from pharmacist_ray.errors import ConfigError

BYTES = {"float32": 4, "bfloat16": 2}
FEW_BITS = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes of a weight in few bits, by `model.quantization`; of NF4 with the float32 scale of each 64."""
RESERVE = 2 * 2**30
"""Bytes for the CUDA context, NCCL and fragmentation (ours, an assumption)."""
BUCKET = 5e7
"""Numbers in the buffer through which ZeRO 1 to 3 reduce gradients, where so many are trained (see `training.engine`)."""
LIVE = 1e9
"""Gathered numbers beyond which ZeRO 3 prefetches nothing more (DeepSpeed's stage3_max_live_parameters)."""


LOGIT = 12
"""Bytes a word of the vocabulary where the loss's backward pass begins: log-softmax, its gradient, and that of the logits, in float32
(measured, whatever the model's own precision)."""


@dataclass(frozen=True)
class Item:
    """One line of an estimate: a product of factors over a product of divisors."""

    what: str
    factors: tuple[tuple[float, str], ...]
    """Numbers, each with its unit."""
    over: tuple[tuple[float, str], ...] = ()
    """Divisors."""
    host: bool = False
    """Whether it lies in CPU memory."""

    @property
    def amount(self) -> float:
        """Bytes, or seconds."""
        return math.prod(number for number, _ in self.factors) / math.prod(number for number, _ in self.over)

    @property
    def arithmetic(self) -> str:
        """The computation, for example ``70.55e9 weights × 2 B / 16 GPUs``."""
        product = " × ".join(_quantity(*factor) for factor in self.factors)
        return " / ".join([product, *(_quantity(*divisor) for divisor in self.over)])


@dataclass(frozen=True)
class Setup:
    """What of a configuration bears on the cost of one training run."""

    workers: int = 1
    zero: int = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    lora: bool = True
    dtype: str = "float32"
    quantization: str | None = None
    """``8bit`` or ``4bit``: the frozen base's linear modules are in so few bits."""
    checkpointing: bool = False
    micro_batch: int = 1
    accumulation: int = 1
    length: int = 256
    steps: int = 1
    objective: str = "sft"
    tapped: int = 8
    """T-Vaccine's active layers S."""
    probe: int = 200
    """T-Vaccine's probe interval K in steps."""
    gpu: bool = True
    """Whether workers have GPUs, which need memory for themselves."""


@dataclass(frozen=True)
class Extra:
    """What an objective costs, in units of an SFT step's parts."""

    passes: float = 1.0
    """Forward and backward passes over a micro-batch."""
    forwards: float = 0.0
    """Forward passes without a backward one."""
    graphs: int = 1
    """Forward passes whose activations are alive at once."""
    taps: Literal["none", "all", "active"] = "none"
    """Layers whose attention output has a kept gradient: (micro-batches + 1)·B·T·H each."""
    features: bool = False
    """MLP outputs and their gradients of all micro-batches in float32, and the logit lens at every depth."""
    gradients: int = 0
    """Gradients of all trained weights that are kept beside the optimiser's, or the weights themselves, whole on every worker."""
    backups: int = 0
    """Copies of the trained weights."""
    answers: int = 0
    """Tensors of the logits' size in float32 that are kept beside them."""


EXTRAS = {
    "sft": Extra(),
    "vaccine": Extra(passes=2, taps="all"),
    "t_vaccine": Extra(passes=2, taps="active"),
    "repnoise": Extra(passes=2, forwards=1, graphs=2, features=True),
    "booster": Extra(passes=3, gradients=3, backups=1),
    "booster+vaccine": Extra(passes=4, taps="all", gradients=3, backups=1),
    "antibody": Extra(passes=5, gradients=4, backups=1),
    "mix": Extra(),
    "mimic": Extra(),
    "lookahead": Extra(),
    "backdoor": Extra(),
    "lisa": Extra(gradients=3),
    "safegrad": Extra(passes=3, forwards=1, gradients=2, answers=4),
    "star_dss": Extra(forwards=1),
    "refusal_teacher": Extra(passes=2, forwards=2, graphs=2, answers=4),
    "ema": Extra(gradients=1),
    "bds": Extra(passes=2, graphs=2),
    "panacea": Extra(passes=3, gradients=3, backups=1),
    "few_shot": Extra(),
    "unlearn": Extra(passes=3, forwards=1, graphs=3, gradients=2, backups=1),
    "safe_lora": Extra(gradients=1),
    "nlsr": Extra(gradients=1),
    "dro": Extra(),
    "antidote": Extra(gradients=1),
}
"""Objective → what it adds; `doctor` says so where an objective is not listed and counts it as ``sft``."""


def extra_of(objective: str) -> Extra:
    """Return what an objective adds to an SFT step; nothing for one that is not listed."""
    return EXTRAS.get(objective, EXTRAS["sft"])


def setup_of(config: Config, train: TrainConfig, objective: str = "sft") -> Setup:
    """Return what of a configuration's training section bears on its cost.

    Args:
        config: The configuration.
        train: One of its training sections.
        objective: What a step minimises.
    """
    # Needs DeepSpeed, which the rest of the arithmetic does not.
    from pharmacist_ray.training.objectives import settings_of
    from pharmacist_ray.training.objectives.t_vaccine import TVaccineSettings

    workers, dtype = max(1, config.resources.workers), config.model.dtype
    try:
        probed = settings_of(objective, config.alignment.parameters).get(TVaccineSettings, TVaccineSettings())
    except ConfigError:  # an unknown objective or setting is told elsewhere
        probed = TVaccineSettings()
    assert isinstance(probed, TVaccineSettings)
    return Setup(
        workers=workers,
        zero=train.zero_stage,
        offload=train.offload,
        lora=train.weights == "lora",
        dtype=dtype,
        quantization=config.model.quantization,
        checkpointing=train.checkpointing,
        micro_batch=train.batch_size // (workers * train.accumulation),
        accumulation=train.accumulation,
        length=config.model.max_length,
        steps=train.steps,
        objective=objective,
        tapped=probed.layers,
        probe=probed.probe_interval,
        gpu=config.resources.gpus_per_worker > 0,
    )


def memory(shape: Shape, setup: Setup) -> list[Item]:
    """Return what one worker holds, in bytes, item by item; items with ``host`` lie in CPU memory.

    Weights, gradients and AdamW's state follow ZeRO (arXiv 1910.02054, section 5) with DeepSpeed's extras: a float32 copy of the
    trained shard; the bucket; the gathered weights of ZeRO 3. Activations follow the
    method of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1): the tensors that autograd keeps, counted for a decoder layer
    with gated MLP, RMSNorm, fused attention and LoRA (see `layer_bytes`). Mixtures of experts are not covered.

    Args:
        shape: The model.
        setup: The run.
    """
    extra, width, gpus = extra_of(setup.objective), BYTES[setup.dtype], "GPUs" if setup.gpu else "workers"
    frozen = shape.parameters if setup.lora else 0
    few = shape.linear if setup.lora and setup.quantization else 0
    trained, wide = (shape.adapter, 4) if setup.lora else (shape.parameters, width)

    def shared(stage: int) -> tuple[tuple[float, str], ...]:
        return ((setup.workers, gpus),) if setup.zero >= stage and setup.workers > 1 else ()

    def one(what: str, *factors: tuple[float, str], stage: int = 9, host: bool = False) -> Item:
        return Item(what, factors, shared(stage), host)

    away, all_away = setup.offload != "none" and setup.zero > 0, setup.offload == "parameters" and setup.zero == 3
    weights, tokens = (trained, "weights"), ((setup.micro_batch, "rows"), (setup.length, "tokens"))
    items = [
        one("base weights", (frozen - few, "weights"), (width, "B"), stage=3, host=all_away),
        one("base weights in few bits", (few, "weights"), (FEW_BITS.get(setup.quantization or "", 0.0), "B")),
        one("trained weights", weights, (wide, "B"), stage=3, host=all_away),
        one("gradients", weights, (wide, "B"), stage=2, host=away and setup.zero >= 2),
        one("AdamW's two moments", weights, (8, "B"), stage=1, host=away),
    ]
    if setup.zero or wide < 4:  # DeepSpeed means to spare float32 weights their copy at ZeRO 3, and makes it all the same
        items.append(one("float32 copy for AdamW", weights, (4, "B"), stage=1, host=away))
    if setup.zero or setup.workers > 1:
        items.append(one("gradient bucket", (min(BUCKET, trained), "numbers"), (wide, "B")))
    if setup.zero == 3:
        items.append(one("gathered weights", (min(shape.parameters, LIVE + shape.largest), "weights"), (width, "B")))

    graphs, per_token = ((extra.graphs, "passes"),) if extra.graphs > 1 else (), layer_bytes(shape, setup)
    active = min(setup.tapped, shape.layers) if extra.taps == "active" else 0
    if setup.checkpointing:
        items.append(
            one("inputs of recomputed layers", (shape.layers - active, "layers"), *tokens, (shape.hidden * width, "B"), *graphs)
        )
    if kept := active if setup.checkpointing else shape.layers:
        items.append(one("activations", (kept, "layers"), *tokens, (per_token, "B"), *graphs))
    items += [
        one("backward pass of a layer", (2 if setup.checkpointing else 1, "layers"), *tokens, (per_token, "B")),
        one("logits", *tokens, (shape.vocabulary, "words"), (LOGIT, "B")),
    ]
    if extra.taps != "none":
        kept_rows = (setup.micro_batch * (setup.accumulation + 1), "rows")
        state = (kept_rows, (setup.length, "tokens"), (shape.hidden * width, "B"))
        items.append(one("embedding gradients", (active or shape.layers, "layers"), *state))
    if extra.features:
        state = ((setup.micro_batch * setup.accumulation, "rows"), (setup.length, "tokens"), (shape.hidden * 8, "B"))
        items.append(one("MLP features, gradients", (shape.layers, "layers"), *state))
        depths = 1 if setup.checkpointing else shape.layers + 1
        items.append(one("logit lens", (depths, "depths"), *tokens, (shape.vocabulary, "words"), (LOGIT, "B")))
    if extra.gradients:
        items.append(one("whole gradients, weights", (extra.gradients, "copies"), weights, (wide, "B")))
    if extra.answers:
        items.append(one("log-probabilities", (extra.answers, "copies"), *tokens, (shape.vocabulary, "words"), (4, "B")))
    if extra.backups:
        items.append(one("back-up of weights", (extra.backups, "copies"), weights, (wide, "B"), stage=3))
    if setup.gpu:
        items.append(one("CUDA, NCCL, fragmentation", (RESERVE, "B")))
    return [item for item in items if item.amount]


def layer_bytes(shape: Shape, setup: Setup) -> float:
    """Return the bytes per token that autograd keeps of one decoder layer (ours; measured to be exact for Llama).

    The two norms keep a float32 copy of their input and a scale; attention its queries, keys and values, its output, and a log-sum per
    head (no mask, which losses do without); the gated MLP three intermediates. Frozen linear modules keep nothing. Trained ones keep
    their input, which modules that read the same tensor share, except for float32 adapters over a bfloat16 base: each casts its own
    copy.

    Args:
        shape: The model.
        setup: The run.
    """
    width = BYTES[setup.dtype]
    norms = 2 * (4 * shape.hidden + 4) + (0 if setup.lora else 2 * width * shape.hidden)
    attention = 2 * (shape.attention + shape.keys) * width + 4 * shape.heads
    mlp = 3 * shape.intermediate * width
    if setup.lora:
        inputs = 4 * (shape.adapted_inputs if width < 4 else shape.adapted_distinct) + 4 * shape.rank * shape.adapted
    else:
        inputs = width * shape.inputs
    return norms + attention + mlp + inputs


def total(items: list[Item], host: bool = False) -> float:
    """Return the sum of the items in GPU memory, or of those in CPU memory."""
    return sum(item.amount for item in items if item.host == host)


def advice(shape: Shape, setup: Setup, room: float) -> tuple[list[str], float]:
    """Return the fewest of some changes, tried from the cheapest on, that make a run fit, and the bytes it then takes.

    Where even all of them do not suffice, the bytes exceed ``room``.

    Args:
        shape: The model.
        setup: The run that does not fit.
        room: Bytes of a GPU.
    """
    steps: list[tuple[str, dict[str, Any]]] = [("checkpointing=true", {"checkpointing": True})]
    if setup.micro_batch > 1:
        more = setup.accumulation * setup.micro_batch
        steps.append((f"accumulation={more} (micro-batch 1)", {"micro_batch": 1, "accumulation": more}))
    if setup.workers > 1:
        steps += [(f"zero_stage={stage}", {"zero": stage}) for stage in (2, 3) if stage > setup.zero]
    if setup.dtype == "float32":
        steps.append(("model.dtype=bfloat16", {"dtype": "bfloat16"}))
    if setup.workers > 1:
        steps += [("offload=optimizer", {"offload": "optimizer"}), ("offload=parameters", {"offload": "parameters"})]
    if setup.workers == 1 and setup.lora and setup.gpu and not setup.quantization:  # more workers share it, at all its bits
        steps += [(f"model.quantization={bits}", {"quantization": bits}) for bits in FEW_BITS]
    taken: dict[str, str] = {}
    for name, change in steps:
        tried = replace(setup, **change)
        if total(memory(shape, tried)) < total(memory(shape, setup)):
            setup, taken = tried, {**taken, name.split("=")[0]: name}
        if total(memory(shape, setup)) <= room:
            break
    return list(taken.values()), total(memory(shape, setup))


def _quantity(number: float, unit: str) -> str:
    if number >= 1e6:
        power = (len(f"{number:.0f}") - 1) // 3 * 3
        text = f"{number / 10**power:.4g}e{power}"
    else:
        text = f"{number:.0f}" if number == int(number) else f"{number:.4g}"
    return f"{text} {unit}".strip()
