"""The rows of a training run, as micro-batches by step: a function of the step alone, so there is no iterator state to save."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pharmacist_ray.data.batches import BatchOrder
from pharmacist_ray.data.render import IGNORE, Batch, Renderer
from pharmacist_ray.data.rows import count_rows, read_numbered, read_rows, row_at
from pharmacist_ray.data.samples import Samples
from pharmacist_ray.errors import DataError
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.storage import read_table, storage_path
from pharmacist_ray.training.task import TrainTask

FEW = 4
"""Of so many times as many rows as steps take, those that they take are read alone: the ids are read twice then (ours)."""
HARMFUL_SEED = 7_919
"""Added to a run's seed in the order of its harmful rows."""
BESIDE = {"safe": (15_485_863, "finetune.safe"), "ordinary": (32_452_843, "data.benign")}
"""Kind of trusted rows beside those of a fine-tune → what is added to the run's seed in their order, and where more are given."""


class Stream:
    """Rows in a fixed order of batches."""

    def __init__(
        self,
        table: pa.Table,
        order: BatchOrder,
        renderer: Renderer,
        partners: dict[int, Sequence[int]] | None = None,
        weights: NDArray[np.float32] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Render a small set at once.

        A row that cannot be rendered must stop every worker at the same point, or the others would wait for it. Small sets, which
        may not have come through ingestion, are rendered now by all; large ones have been checked there.

        Args:
            table: Canonical rows.
            order: Which rows make up which batch.
            renderer: Turns a row into token ids.
            partners: Row → token ids of another answer to its prompt; tokens equal to the other's are not supervised.
            weights: What each row weighs, (rows,).
            numbers: The rows' numbers where others are never met and were not read, in order; None: all were.
        """
        self._numbers = None if numbers is None else np.asarray(numbers)
        self.table, self.order, self._renderer, self._partners = table, order, renderer, partners or {}
        self._weights = weights
        self._samples = Samples(table, renderer)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.order.rows + self.order.replay_rows

    def step(self, number: int, ranks: Ranks, accumulation: int) -> tuple[list[Batch], list[list[int]]]:
        """Return one worker's micro-batches of a step, and the places of their rows in the step's whole batch."""
        places = self.order.micro_batches(number, rank=ranks.rank, workers=ranks.workers, accumulation=accumulation, places=True)
        whole = self.order.batch(number)
        return [self._collate([whole[place] for place in micro]).to(ranks.device) for micro in places], places

    def ids(self, number: int, rank: int, workers: int, accumulation: int, micro: int) -> list[str]:
        """Return the row ids of one micro-batch."""
        rows = self.order.micro_batches(number, rank=rank, workers=workers, accumulation=accumulation)[micro]
        return [str(self.table.column("id")[place]) for place in self._places(rows)]

    def rows(self, number: int, ranks: Ranks, accumulation: int) -> list[list[int]]:
        """Return the row numbers of one worker's micro-batches of a step."""
        return self.order.micro_batches(number, rank=ranks.rank, workers=ranks.workers, accumulation=accumulation)

    def whole(self, number: int) -> list[str]:
        """Return the row ids of a step's whole batch."""
        return self.ids(number, 0, 1, 1, 0)

    def single(self, row: int) -> Batch:
        """Return a batch of one row."""
        return self._collate([row])

    def _places(self, rows: list[int]) -> list[int]:
        """Return where rows stand in the table."""
        return rows if self._numbers is None else np.searchsorted(self._numbers, rows).tolist()

    def _collate(self, rows: list[int]) -> Batch:
        rows = self._places(rows)
        batch = self._renderer.collate([self._samples[row] for row in rows])
        for place, row in enumerate(rows):
            if other := self._partners.get(row):
                for position, token in enumerate(other[: batch.labels.shape[1]]):
                    if batch.labels[place, position] == token:
                        batch.labels[place, position] = IGNORE
        return batch if self._weights is None else replace(batch, weights=torch.from_numpy(self._weights[rows]))


def alignment_stream(task: TrainTask, renderer: Renderer, *, steps: int | None = None) -> Stream:
    """Return the training rows of a task, with its replay rows.

    Args:
        task: The task.
        renderer: Turns a row into token ids.
        steps: Only the rows of so many steps are asked for; where these are few, no others are read. None: any may be.

    Raises:
        DataError: There are fewer rows than a batch takes.
    """
    size, (rows, replay) = task.train.batch_size, (sum(map(count_rows, paths)) for paths in (task.rows, task.replay))
    per_batch = round(task.replay_share * size) if replay else 0
    if rows < size - per_batch or per_batch >= size:
        raise DataError(f"{task.name}: {rows} training rows are fewer than batch_size={size}; give more or lower it")
    order, numbers = BatchOrder(rows, size, task.seed, replay, per_batch), None
    if steps is not None and FEW * steps * size < rows + replay:
        numbers = order.drawn(steps)
        split = bisect_left(numbers, rows)
        parts = ((task.rows, numbers[:split]), (task.replay, [number - rows for number in numbers[split:]]))
        table = pa.concat_tables([read_numbered(paths, some) for paths, some in parts if some])
    else:
        table = pa.concat_tables([read_rows(paths, raw=False) for paths in (task.rows, task.replay) if paths])
    weights = _weights(task.row_weights, table.column("id")) if task.row_weights else None
    return Stream(table, order, renderer, weights=weights, numbers=numbers)


def _weights(files: Sequence[str], ids: pa.ChunkedArray) -> NDArray[np.float32]:
    known = pa.concat_tables([read_table(storage_path(file), columns=["id", "weight"]) for file in files])
    place = pc.index_in(ids, value_set=known["id"].combine_chunks())
    return np.asarray(pc.fill_null(known["weight"].take(place), 1.0)).astype(np.float32)


def harmful_stream(task: TrainTask, renderer: Renderer, kind: Literal["rows", "pairs"], alignment: Stream) -> Stream:
    """Return the harmful rows of a task, as many a step as alignment rows.

    Args:
        task: The task.
        renderer: Turns a row into token ids.
        kind: ``pairs`` keeps the rows whose prompt is among the alignment rows, and supervises only tokens that differ from the safe
            answer, position by position (RepNoise's mask); of several safe answers the first by id counts. Where there is no such
            prompt at all, the rows stay as they are: there is no safe answer to compare with.
        alignment: The alignment rows.

    Raises:
        DataError: There are fewer rows than a batch takes.
    """
    table = read_rows(task.harmful, raw=False)
    partners: dict[int, Sequence[int]] = {}
    if kind == "pairs":
        safe: dict[tuple[str, str], int] = {}
        prompts, inputs = (alignment.table.column(name).to_pylist() for name in ("prompt", "input"))
        for index, key in enumerate(zip(prompts, inputs, strict=True)):
            safe.setdefault(key, index)
        keys = list(zip(table.column("prompt").to_pylist(), table.column("input").to_pylist(), strict=True))
        kept: list[int] = []
        for index, key in enumerate(keys):
            if key not in safe:
                continue
            other = renderer.render(row_at(alignment.table, safe[key])).ids
            if renderer.render(row_at(table, index)).ids != other:
                partners[len(kept)] = other
                kept.append(index)
        if not safe.keys().isdisjoint(keys):
            table = table.take(pa.array(kept, pa.int64()))
    size = task.train.batch_size
    if table.num_rows < size:
        raise DataError(
            f"{task.name}: {task.objective} needs at least batch_size={size} harmful rows"
            + (" whose prompt is also among the alignment rows" if kind == "pairs" else "")
            + f", got {table.num_rows}; give more (alignment.harmful) or lower alignment.train.batch_size"
        )
    return Stream(table, BatchOrder(table.num_rows, size, task.seed + HARMFUL_SEED), renderer, partners)


def stream_beside(task: TrainTask, renderer: Renderer, kind: Literal["safe", "ordinary"]) -> Stream:
    """Return the safe rows of a task or its ordinary ones, as many a step as there are rows of the fine-tune.

    Args:
        task: The task.
        renderer: Turns a row into token ids.
        kind: Which.

    Raises:
        DataError: There are fewer rows than a batch takes.
    """
    seed, where = BESIDE[kind]
    table, size = read_rows(task.safe if kind == "safe" else task.ordinary, raw=False), task.train.batch_size
    if table.num_rows < size:
        raise DataError(
            f"{task.name}: {task.objective} needs at least batch_size={size} {kind} rows, got {table.num_rows}; give more ({where}) "
            "or lower the fine-tune's batch_size"
        )
    return Stream(table, BatchOrder(table.num_rows, size, task.seed + seed), renderer)
