"""What a training did to the loss of some rows: an attack that hardly lowered that of its own harmful rows says nothing of a defence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.rows import read_rows
from pharmacist_ray.data.schema import rows_from_table
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.runtime.ranks import Ranks


def watched_loss(engine: Any, files: Sequence[str], renderer: Renderer, ranks: Ranks, batch_size: int) -> float | None:
    """Return the mean over rows of `per_sample_nll`, in nats, without dropout; None where there are no rows.

    Every worker asks for all rows, for a sharded model answers all of them together or none.

    Args:
        engine: The engine in training mode, which it is in again afterwards.
        files: Parquet files of canonical rows, which are few.
        renderer: Turns a row into token ids.
        ranks: This worker.
        batch_size: Rows at a time.
    """
    rows = rows_from_table(read_rows(files)) if files else []
    if not rows:
        return None
    samples, losses = renderer.render_all(rows), []
    engine.eval()
    with torch.no_grad():
        for first in range(0, len(samples), batch_size):
            batch = renderer.collate(samples[first : first + batch_size]).to(ranks.device)
            losses.append(per_sample_nll(engine, batch))
    engine.train()
    return float(torch.cat(losses).mean())
