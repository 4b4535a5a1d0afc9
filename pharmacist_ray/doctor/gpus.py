"""What is known of GPUs: memory, peak, and how fast weights reach them. One table, and who says so."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pharmacist_ray.errors import unknown_name

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    memory_gib: float
    """What PyTorch sees of it, in GiB: less than its name says, by what the driver and error correction keep."""
    bfloat16: float
    """Peak of dense matrix products in bfloat16, FLOP/s; where the tensor cores do not know it, the rate of float32."""
    float32: float
    """The same in float32 without TF32, PyTorch's default, FLOP/s."""
    bandwidth: float
    """Bytes/s of its memory."""
    nvlink: float | None
    """Bytes/s at which it receives from the others of its node by NVLink; None: there is PCIe alone."""
    network: float
    """Bits/s between nodes with eight of it, as AWS has them."""
    names: str
    """Pattern of what CUDA or Ray call it."""

    @property
    def memory(self) -> float:
        """Bytes that PyTorch sees."""
        return self.memory_gib * 2**30


GPUS = {
    "B200": Gpu(178.0, 2250 * TERA, 75 * TERA, 8000 * GIGA, 900 * GIGA, 3200e9, r"B200"),
    "H200": Gpu(139.8, 989 * TERA, 67 * TERA, 4800 * GIGA, 450 * GIGA, 3200e9, r"H200"),
    "H100": Gpu(79.1, 989 * TERA, 67 * TERA, 3350 * GIGA, 450 * GIGA, 3200e9, r"H100"),
    "A100-80": Gpu(79.1, 312 * TERA, 19.5 * TERA, 2039 * GIGA, 300 * GIGA, 400e9, r"A100.*80"),
    "A100-40": Gpu(39.4, 312 * TERA, 19.5 * TERA, 1555 * GIGA, 300 * GIGA, 400e9, r"A100"),
    "L40S": Gpu(44.3, 362 * TERA, 91.6 * TERA, 864 * GIGA, None, 400e9, r"L40S"),
    "A10G": Gpu(22.0, 70 * TERA, 31.5 * TERA, 600 * GIGA, None, 100e9, r"A10G"),
    "L4": Gpu(22.0, 121 * TERA, 30.3 * TERA, 300 * GIGA, None, 100e9, r"L4\b"),
    "RTX4090": Gpu(23.5, 165 * TERA, 82.6 * TERA, 1008 * GIGA, None, 100e9, r"(RTX )?4090"),
    "T4": Gpu(14.6, 8.1 * TERA, 8.1 * TERA, 320 * GIGA, None, 100e9, r"T4\b"),
    "V100-32": Gpu(31.7, 15.7 * TERA, 15.7 * TERA, 900 * GIGA, 150 * GIGA, 100e9, r"V100.*32"),
    "V100-16": Gpu(15.8, 15.7 * TERA, 15.7 * TERA, 900 * GIGA, 150 * GIGA, 25e9, r"V100"),
}
"""Peaks, bandwidth and NVLink by NVIDIA's data sheets: SXM where there are several, products without sparsity, half of NVLink's figure,
which is of both directions. The A10G has no sheet: Baseten's comparison with the A10. Memory: as PyTorch reports it (of the H200 measured,
docs/results/gpu.json). Network: AWS's p6, p5, p4, g6, g5, g4dn and p3 instances; of an RTX4090, which is in none, ours. A more particular
name stands before one that it contains."""

LIKE = {"A100": "A100-40", "V100": "V100-16"}
"""A name that says no size → the smaller one, so that a plan holds on both."""


def gpu_of(name: str) -> tuple[str, Gpu]:
    """Return the key of `GPUS` that is meant by what somebody writes, and what is known of it.

    Args:
        name: A key in any case, or one of `LIKE`.

    Raises:
        ConfigError: There is no such GPU in the table; names those that there are.
    """
    plain = name.upper().removesuffix("GB").replace("_", "-")
    found = next((key for key in GPUS if key.upper() == LIKE.get(plain, plain)), None)
    if found is None:
        raise unknown_name("GPU", name, list(GPUS), "take one with the same memory or less")
    return found, GPUS[found]


def recognised(name: str) -> str | None:
    """Return the key of `GPUS` for what CUDA or Ray call a GPU, such as ``NVIDIA A100-SXM4-80GB``; None where it is not in the table."""
    return next((key for key, gpu in GPUS.items() if re.search(rf"(?<![A-Z0-9])({gpu.names})", name, re.IGNORECASE)), None)
