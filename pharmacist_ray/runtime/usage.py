"""What a stage's processes took: tokens a second and peak memory, as manifests and the report have them."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


def peak_bytes() -> int:
    """Return the most memory that this process held: what was allocated on its GPU where it uses one, else what was resident."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


@dataclass
class Usage:
    """What a process has passed through a model since it was made."""

    tokens: int = 0
    """Without padding."""
    passed: int = 0
    """The same, counted again for each pass, where that is known."""
    padding: int = 0
    """Padding that went with these."""
    started: float = field(default_factory=time.perf_counter)

    def taken(self) -> dict[str, Any]:
        """Return it as plain values, and begin anew."""
        now = time.perf_counter()
        counts = {"tokens": self.tokens, "passed": self.passed, "padding": self.padding}
        found = counts | {"seconds": now - self.started, "peak_bytes": peak_bytes()}
        self.tokens, self.passed, self.padding, self.started = 0, 0, 0, now
        return found


def put_together(parts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return tokens a second of one process, a mean over all that took part, the peak of the largest, and the share of padding.

    Empty where none took part; what is not known is left out.

    Args:
        parts: What `Usage.taken` returned, one for each unit of work.
    """
    found = [part for part in parts if "peak_bytes" in part]
    if not found:
        return {}
    seconds = sum(part["seconds"] for part in found)
    tokens = sum(part["tokens"] for part in found)
    pace = {"tokens_per_s": round(tokens / seconds, 1)} if tokens and seconds else {}
    padding, passed = (sum(part.get(name, 0) for part in found) for name in ("padding", "passed"))
    waste = {"padding": round(padding / (padding + passed), 4)} if passed else {}
    return pace | waste | {"peak_bytes": max(part["peak_bytes"] for part in found)}
