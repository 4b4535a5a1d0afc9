"""What the stages that train nothing hold per GPU, in bytes: fit's directions, scoring and answering.

As in `estimate`, every number is a product of named factors, and an upper bound: all rows are as long as ``max_length``. Of what is
never alive at the same moment, here only the larger part counts, for a batch is taken as large as memory allows.
"""

from __future__ import annotations

from dataclasses import replace

from pharmacist_ray.config.schema import Config
from pharmacist_ray.curation.groups import AT_ONCE
from pharmacist_ray.curation.selector import DIRECTIONS
from pharmacist_ray.doctor.estimate import BYTES, FEW_BITS, LOGIT, RESERVE, Item, Setup, layer_bytes, total
from pharmacist_ray.doctor.groups import fitting_group, group_of
from pharmacist_ray.doctor.guests import guest_memory, guests_of
from pharmacist_ray.doctor.shape import Shape
from pharmacist_ray.models.influence import CHUNK

GRADIENTS = 0.3
"""Gradients that are alive at once within a decoder layer, as a share of what it keeps (measured: 0.23 to 0.28)."""

Factors = tuple[tuple[float, str], ...]


def fit_memory(shape: Shape, config: Config) -> list[Item]:
    """Return what a worker holds while it takes the directions of `fit`, item by item.

    Args:
        shape: The model.
        config: The configuration, its precision resolved.
    """
    selector = config.selector
    setup = pass_setup(config, selector.tokens_per_batch, selector.warmup.checkpointing, fitting_group(config))
    # The sum and a pass's own gradient; that of the attack, and the first direction; weights before the attack. With an inner step two
    # more: its gradient, and the weights before it.
    from pharmacist_ray.curation.scorers import parts_of  # which needs Ray, and the GPU program has none

    copies = 5 + 2 * bool(selector.inner_lr)
    if "groups" in parts_of(config.scoring.scorers, selector):  # a gradient of each, or random directions at once to find them by
        copies += max(selector.coverage.groups, AT_ONCE)
    items = [*weights_memory(shape, setup), Item("gradients and back-ups", ((copies, "copies"), *_adapter(shape)))]
    return _whole([*items, *pass_memory(shape, setup)], setup)


def score_memory(shape: Shape, config: Config, group: int | None = None) -> list[Item]:
    """Return what an actor, or each GPU of a group, holds while it scores; nothing where no scorer needs the model.

    Args:
        shape: The model.
        config: The configuration, its precision resolved.
        group: GPUs that hold the model together at ZeRO 3; None: as the configuration says.
    """
    from pharmacist_ray.curation.scorers import needs_model, parts_of

    scoring, parts = config.scoring, parts_of(config.scoring.scorers, config.selector)
    if not needs_model(scoring.scorers):
        return []
    setup = pass_setup(config, scoring.tokens_per_batch, scoring.checkpointing, group_of(config) if group is None else group)
    count = len(DIRECTIONS) * ("directions" in parts) + config.selector.coverage.groups * ("groups" in parts)
    points = len(config.selector.checkpoints) if count else 0
    adapters = points + sum(part in parts for part in ("reference", "tov"))
    directions: Factors = ((points, "checkpoints"), (count, "directions"))
    items = [
        *weights_memory(shape, setup),
        Item("adapters of the selector", ((adapters, "adapters"), *_adapter(shape))),
        Item("directions", (*directions, *_adapter(shape))),
    ]
    if adapters and setup.dtype == "float32" and not setup.quantization and setup.zero != 3:  # see `models.folded`
        items.append(Item("weights with an adapter folded in", ((shape.adapted_weights, "weights"), (4, "B"))))
    if points and scoring.method != "difference":
        working = influence_memory(replace(shape, layers=differentiated(shape, config)), setup, scoring.method)
    else:
        working = forward_memory(shape, setup, _tokens(setup))
    return _whole([*items, *_with_guests(config, "score", working)], setup)


def differentiated(shape: Shape, config: Config) -> int:
    """Return the decoder layers, from the last, through which scoring goes back."""
    return min(config.scoring.last_layers or shape.layers, shape.layers)


def answer_memory(shape: Shape, config: Config, group: int | None = None) -> list[Item]:
    """Return what an actor, or the first GPU of a group, holds while a model answers prompts and judges that are models judge.

    Args:
        shape: The model.
        config: The configuration, its precision resolved; with an evaluation.
        group: GPUs that hold the model together at ZeRO 3; None: as the configuration says.
    """
    settings = config.evaluation
    assert settings is not None
    setup = pass_setup(config, config.model.max_length, False, group_of(config) if group is None else group)
    width, rows = BYTES[setup.dtype], (settings.batch_size, "rows")
    tokens = (config.model.max_length + settings.max_new_tokens, "tokens")
    working = [
        Item("keys and values", ((shape.layers, "layers"), rows, tokens, (2 * shape.keys * width, "B"))),
        # The prompts' own pass, of which only the last position's logits are made.
        Item("forward pass of a layer", (rows, (setup.length, "tokens"), (_forward_bytes(shape, setup), "B"))),
        Item("logits", (rows, (shape.vocabulary, "words"), (width + 4, "B"))),
    ]
    base = [] if settings.engine else base_memory(shape, setup)  # an endpoint's own GPUs hold the model
    items = [*base, *_with_guests(config, "evaluate", [] if settings.engine else working)]
    return _whole(items, setup) if items else []


def _with_guests(config: Config, stage: str, working: list[Item]) -> list[Item]:
    """Return what other models hold, and the larger of what the model and what they hold at work: they take turns."""
    held, at_work, _ = guest_memory(guests_of(config, stage))
    return [*held, *(at_work if total(at_work) > total(working) else working)]


def influence_memory(shape: Shape, setup: Setup, method: str) -> list[Item]:
    """Return what scoring rows along directions holds besides weights and directions, item by item.

    Args:
        shape: The model.
        setup: Rows, length, precision and checkpointing.
        method: ``hooks`` or ``ghost``.
    """
    items = pass_memory(shape, setup)
    if method == "hooks":
        # Of one matrix at a time; a large one in parts.
        numbers = setup.micro_batch * shape.rank * max(shape.hidden, shape.attention, shape.intermediate)
        items.append(Item("gradients of single rows", ((min(numbers, CHUNK), "numbers"), (4, "B"))))
    return items


def pass_memory(shape: Shape, setup: Setup) -> list[Item]:
    """Return what a forward and a backward pass to an adapter over a frozen base hold besides the weights.

    `influence` keeps as much as training does: it needs the same inputs of the adapter's modules.

    Args:
        shape: The model.
        setup: Rows, length, precision and checkpointing.
    """
    tokens, per_token = _tokens(setup), (layer_bytes(shape, setup), "B")
    if setup.checkpointing:
        kept = Item("inputs of recomputed layers", ((shape.layers, "layers"), *tokens, (shape.hidden * BYTES[setup.dtype], "B")))
        again = Item("recomputing a layer", ((1 + GRADIENTS, "layers"), *tokens, per_token))
    else:
        kept = Item("activations", ((shape.layers, "layers"), *tokens, per_token))
        again = Item("backward pass of a layer", ((GRADIENTS, "layers"), *tokens, per_token))
    loss = Item("logits", (*tokens, (shape.vocabulary, "words"), (LOGIT, "B")))
    norm = Item("last norm", (*tokens, (4 * shape.hidden + 4, "B")))
    return [kept, norm, max(again, loss, key=lambda item: item.amount)]


def forward_memory(shape: Shape, setup: Setup, tokens: Factors) -> list[Item]:
    """Return what a forward pass alone holds besides the weights: one layer, or the logits and their log-softmax.

    Args:
        shape: The model.
        setup: Length and precision.
        tokens: Rows and their length.
    """
    logit = 4 + 4 if setup.dtype == "float32" else 2 + 4 + 4
    layer = Item("forward pass of a layer", (*tokens, (_forward_bytes(shape, setup), "B")))
    return [max(layer, Item("logits", (*tokens, (shape.vocabulary, "words"), (logit, "B"))), key=lambda item: item.amount)]


def _forward_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes per token of one layer's forward pass: three intermediates of its MLP, or its attention's inputs, and the residual."""
    width = BYTES[setup.dtype]
    return width * (max(3 * shape.intermediate, 2 * (shape.attention + shape.keys)) + 2 * shape.hidden)


def pass_setup(config: Config, tokens_per_batch: int, checkpointing: bool, group: int = 1) -> Setup:
    """Return a pass over a batch of so many padded tokens, of rows that are all of full length; at least one row.

    Args:
        config: The configuration, its precision resolved.
        tokens_per_batch: Padded tokens of a batch.
        checkpointing: Whether activations are computed again.
        group: GPUs that hold the model together at ZeRO 3.
    """
    length = min(config.model.max_length, tokens_per_batch)
    rows = max(1, tokens_per_batch // config.model.max_length)
    return Setup(
        workers=group,
        zero=3 if group > 1 else 0,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        checkpointing=checkpointing,
        micro_batch=rows,
        length=max(length, config.model.max_length),
        gpu=config.resources.gpus_per_worker > 0,
    )


def _tokens(setup: Setup) -> Factors:
    return ((setup.micro_batch, "rows"), (setup.length, "tokens"))


def _adapter(shape: Shape) -> Factors:
    return ((shape.adapter, "weights"), (4, "B"))


def weights_memory(shape: Shape, setup: Setup) -> list[Item]:
    """Return what the base and an adapter in float32 take."""
    return [*base_memory(shape, setup), Item("adapter", _adapter(shape))]


def base_memory(shape: Shape, setup: Setup) -> list[Item]:
    """Return what the base takes: whole, or at ZeRO 3 a share of it and what is gathered.

    A layer is let go as soon as it was passed and the next one fetched by then (see `training.sharded`): two layers, or one beside the
    largest tensor.
    """
    few, width = shape.linear if setup.quantization else 0, (BYTES[setup.dtype], "B")
    if setup.zero == 3:
        gathered = (min(shape.parameters, shape.layer + max(shape.layer, shape.largest)), "weights")
        return [
            Item("base weights", ((shape.parameters, "weights"), width), ((setup.workers, "GPUs"),)),
            Item("gathered weights", (gathered, width)),
        ]
    return [
        Item("base weights", ((shape.parameters - few, "weights"), width)),
        Item("base weights in few bits", ((few, "weights"), (FEW_BITS.get(setup.quantization or "", 0.0), "B"))),
    ]


def _whole(items: list[Item], setup: Setup) -> list[Item]:
    if setup.gpu:
        items.append(Item("CUDA, NCCL, fragmentation", ((RESERVE, "B"),)))
    return [item for item in items if item.amount]
