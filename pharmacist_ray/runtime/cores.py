"""How a process computes on a CPU: with how many threads, and with memory that it does not hand back between passes."""

from __future__ import annotations

import ctypes

import torch

KEPT = 1 << 30
"""Bytes of freed memory that a process keeps (ours)."""
MAPPED = 64 << 20
"""Bytes of a tensor that is given back all the same (ours): a heap that is used again has holes, a few times its largest tensor."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # as malloc.h numbers them


def use_cores(threads: int) -> None:
    """Compute with so many threads, and keep freed memory for the next pass.

    glibc may return a pass's tensors to the system, which has to clear every page of them for the next pass. Whether it does depends on
    how the heap happens to lie, so that the same program takes up to a third longer in one process than in another. Where the C library
    has no such setting it is left as it is.

    Args:
        threads: Threads of torch's operations.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, KEPT)
        mallopt(_TOP_PAD, KEPT)  # or, above the threshold, all of it would be given back
        mallopt(_MMAP_THRESHOLD, MAPPED)
