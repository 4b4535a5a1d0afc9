"""How long a training step will take: arithmetic at an assumed share of the GPU's peak, and traffic at assumed speeds."""

from __future__ import annotations

from pharmacist_ray.doctor.estimate import BYTES, Item, Setup, extra_of
from pharmacist_ray.doctor.shape import Shape

PEAK = {
    "H100": {"bfloat16": 989e12, "float32": 67e12},
    "H200": {"bfloat16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
}
"""FLOP/s of dense matrix products by the vendor's data sheets (SXM; float32 without TF32, PyTorch's default)."""
UTILISATION = 0.35
"""Share of the peak that is reached (ours, an assumption)."""
LINK = 50e9
"""Bytes/s at which a GPU receives shards from the others (ours, an assumption: one 400 Gbit/s adapter per GPU, nothing overlapped)."""
PCIE = 20e9
"""Bytes/s between a GPU and CPU memory (ours, an assumption: PCIe 4.0 × 16, pinned)."""


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


def seconds(shape: Shape, setup: Setup, gpu: str = "A100") -> list[Item]:
    """Return the seconds of one optimiser step, item by item; nothing is taken to overlap.

    Args:
        shape: The model.
        setup: The run.
        gpu: Name of the GPU; one that holds no key of `PEAK` counts as an A100.
    """
    width, wide = BYTES[setup.dtype], 4 if setup.lora else BYTES[setup.dtype]
    peak = PEAK[known_gpu(gpu)][setup.dtype]
    trained = shape.adapter if setup.lora else shape.parameters
    tokens = (setup.micro_batch * setup.accumulation * setup.length, "tokens")
    items = [Item("arithmetic", ((token_flops(shape, setup), "FLOP"), tokens), ((peak, "FLOP/s"), (UTILISATION, "")))]
    others = setup.workers - 1
    if setup.zero == 3 and others:
        # Forward, backward, and between them the recomputation.
        gathers = _passes(setup) * (2 + setup.checkpointing) + extra_of(setup.objective).forwards
        times, whole = (gathers * setup.accumulation, "gathers"), (shape.parameters * width, "B")
        items.append(Item("gathering weights", (times, (others / setup.workers, ""), whole), ((LINK, "B/s"),)))
        if setup.offload == "parameters":
            items.append(Item("weights from the CPU", (times, whole), ((setup.workers, "GPUs"), (PCIE, "B/s"))))
    if others:
        # A ring's reduce-scatter and all-gather.
        items.append(Item("reducing gradients", ((2 * others / setup.workers, ""), (trained * wide, "B")), ((LINK, "B/s"),)))
    if setup.offload != "none":
        items.append(Item("optimiser on the CPU", ((2, ""), (trained * wide, "B")), ((setup.workers, "GPUs"), (PCIE, "B/s"))))
    return [item for item in items if item.amount]


def known_gpu(name: str) -> str:
    """Return the key of `PEAK` that a GPU's name holds, else ``A100``."""
    return next((key for key in PEAK if key in name), "A100")


def _passes(setup: Setup) -> float:
    passes = extra_of(setup.objective).passes
    return passes + (1 / setup.probe if setup.objective == "t_vaccine" else 0)
