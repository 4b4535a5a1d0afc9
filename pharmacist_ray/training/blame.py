"""Which rows of a step make the model raise: asked only when a step has failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.training.streams import Stream


def rows_that_fail(engine: Any, streams: Sequence[Stream], number: int, ranks: Ranks, accumulation: int) -> list[str]:
    """Return the ids of this worker's rows of a step that make the model raise by themselves, each passed through it alone.

    Where a model is sharded (ZeRO 3) a forward takes all workers, of which the others know nothing, so none is tried.

    Args:
        engine: The engine whose step failed.
        streams: The rows of the step.
        number: The step, counted from 0.
        ranks: This worker.
        accumulation: Micro-batches a step.
    """
    failed: list[str] = []
    if engine.zero_optimization_stage() == 3:
        return failed
    for stream in streams:
        for micro, rows in enumerate(stream.rows(number, ranks, accumulation)):
            ids = stream.ids(number, ranks.rank, ranks.workers, accumulation, micro)
            for id, row in zip(ids, rows, strict=True):
                try:
                    with torch.no_grad():
                        per_sample_nll(engine.module, stream.single(row).to(ranks.device))
                except Exception:  # noqa: BLE001 - whatever it is, it is this row's; the step's own error is what is shown
                    failed.append(id)
    return failed
