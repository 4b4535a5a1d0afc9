"""How long a training step will take: arithmetic at an assumed share of the GPU's peak, and traffic at assumed speeds."""

from __future__ import annotations

from pharmacist_ray.doctor.estimate import BYTES, Item, Setup, extra_of
from pharmacist_ray.doctor.gpus import GPUS, recognised
from pharmacist_ray.doctor.shape import Shape

UTILISATION = 0.3
"""Share of the peak that is reached. Measured on an H200 with a model of 8B in bfloat16: 0.29 by scoring, 0.30 by an adapter's step, 0.32
with what checkpointing computes again (docs/results/gpu.json); for every other GPU and model an assumption. One of 1B reached 0.2."""
LINK = 50e9
"""Bytes/s at which a GPU receives shards from the others (ours, an assumption: one 400 Gbit/s adapter per GPU, nothing overlapped)."""
PCIE = 20e9
"""Bytes/s between a GPU and CPU memory (ours, an assumption: PCIe 4.0 × 16, pinned)."""
USUAL = "A100-40"
"""What a GPU counts as that is not in the table."""


def token_flops(shape: Shape, setup: Setup) -> float:
    """Return the floating-point operations per token of one step: 2·N forward, 2·N backward through activations, 2 per trained weight.

    N counts the weights that multiply (an embedding table is looked up). Gradient checkpointing runs a second forward pass. Kaplan et
    al. 2020 (arXiv 2001.08361, section 2.1); attention's own products, 2·T·H per layer, are left out.

    Args:
        shape: The model.
        setup: The run.
    """
    extra, again = extra_of(setup.objective), int(setup.checkpointing)
    weights = shape.parameters - shape.embedding + (shape.adapter if setup.lora else 0)
    trained = shape.adapter if setup.lora else weights
    lens = 2.0 * shape.head * (shape.layers + 1) * (3 + again) if extra.features else 0.0
    return _passes(setup) * (2.0 * weights * (2 + again) + 2.0 * trained) + extra.forwards * 2.0 * weights + lens


def seconds(shape: Shape, setup: Setup, gpu: str = USUAL, link: float = LINK) -> list[Item]:
    """Return the seconds of one optimiser step, item by item; nothing is taken to overlap.

    Args:
        shape: The model.
        setup: The run.
        gpu: What CUDA or the table calls the GPU; one that is not in the table counts as `USUAL`.
        link: Bytes/s at which a GPU receives from the others.
    """
    width, wide = BYTES[setup.dtype], 4 if setup.lora else BYTES[setup.dtype]
    trained = shape.adapter if setup.lora else shape.parameters
    tokens = (setup.micro_batch * setup.accumulation * setup.length, "tokens")
    items = [arithmetic((token_flops(shape, setup), "FLOP"), tokens, gpu=gpu, dtype=setup.dtype)]
    others = setup.workers - 1
    # Forward, backward, and between them the recomputation.
    gathers = _passes(setup) * (2 + setup.checkpointing) + extra_of(setup.objective).forwards
    times = gathers * setup.accumulation
    if setup.zero == 3 and others:
        items.append(gathering(shape, setup.dtype, setup.workers, times, link))
    if setup.zero == 3 and setup.offload == "parameters":
        moved = ((times, "gathers"), (shape.parameters * width, "B"))
        items.append(Item("weights from the CPU", moved, ((setup.workers, "GPUs"), (PCIE, "B/s"))))
    if others:
        # A ring's reduce-scatter and all-gather.
        items.append(Item("reducing gradients", ((2 * others / setup.workers, ""), (trained * wide, "B")), ((link, "B/s"),)))
    if setup.offload != "none":
        items.append(Item("optimiser on the CPU", ((2, ""), (trained * wide, "B")), ((setup.workers, "GPUs"), (PCIE, "B/s"))))
    return [item for item in items if item.amount]


def arithmetic(*factors: tuple[float, str], gpu: str, dtype: str) -> Item:
    """Return the seconds that floating-point operations take.

    Args:
        factors: Whose product is their number.
        gpu: What CUDA or the table calls the GPU.
        dtype: Precision of the base weights.
    """
    return Item("arithmetic", factors, ((peak(gpu, dtype), "FLOP/s"), (UTILISATION, "")))


def gathering(shape: Shape, dtype: str, gpus: int, gathers: float, link: float) -> Item:
    """Return the seconds in which every GPU of a group at ZeRO 3 receives all weights: weights × (n - 1)/n over the link, each time.

    Args:
        shape: The model.
        dtype: Precision of its weights.
        gpus: n, the GPUs of the group.
        gathers: How often.
        link: Bytes/s at which a GPU receives from the others.
    """
    factors = ((gathers, "gathers"), ((gpus - 1) / gpus, ""), (shape.parameters * BYTES[dtype], "B"))
    return Item("gathering weights", factors, ((link, "B/s"),))


def peak(gpu: str, dtype: str) -> float:
    """Return the FLOP/s of a GPU by its data sheet."""
    one = GPUS[known_gpu(gpu)]
    return one.bfloat16 if dtype == "bfloat16" else one.float32


def known_gpu(name: str) -> str:
    """Return the key of `GPUS` for a GPU's name, else `USUAL`."""
    return name if name in GPUS else recognised(name) or USUAL


def _passes(setup: Setup) -> float:
    passes = extra_of(setup.objective).passes
    return passes + (1 / setup.probe if setup.objective == "t_vaccine" else 0)
