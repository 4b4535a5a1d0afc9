"""Which rows make up which batch. In training: a pure function of (number of rows, batch size, seed, step).

There is no iterator state, so a resumed run continues with exactly the batch it would have had, and the number of workers only
decides who computes which part of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


def length_batches(lengths: Sequence[int], tokens_per_batch: float, *, rows: int | None = None) -> list[list[int]]:
    """Return row numbers in batches of at most so many padded tokens, rows of like length together, longest first.

    Longest first, so that a batch too large for the memory fails at once and not after hours. A single row longer than the budget
    gets a batch of its own. The result depends on the lengths and the rows' order alone.

    Args:
        lengths: Tokens of each row.
        tokens_per_batch: Rows × the longest of them, at most.
        rows: At most so many rows a batch.
    """
    batches: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        size = len(batches[-1]) + 1 if batches else 0
        if not size or width * size > tokens_per_batch or (rows is not None and size > rows):
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches


@dataclass
class BatchOrder:
    """An endless walk over shuffled epochs, cut into batches of equal size; an epoch's rest starts the next batch.

    With a replay set, every batch has the same number of its rows, whatever the size of the main set.
    """

    rows: int
    """Rows of the main set, numbered from 0."""
    batch_size: int
    seed: int
    replay_rows: int = 0
    """Rows of the replay set, numbered after those of the main set."""
    replay_per_batch: int = 0
    _epochs: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def batch(self, step: int) -> list[int]:
        """Return the row numbers of the batch of a step, counted from 0."""
        if not self.replay_per_batch:
            return self._walk(step, self.batch_size, self.rows, 0)
        main = self._walk(step, self.batch_size - self.replay_per_batch, self.rows, 0)
        return main + [self.rows + row for row in self._walk(step, self.replay_per_batch, self.replay_rows, 1)]

    def drawn(self, steps: int) -> list[int]:
        """Return the numbers of all rows that so many steps take, in order."""
        return sorted({row for step in range(steps) for row in self.batch(step)})

    def micro_batches(self, step: int, *, rank: int, workers: int, accumulation: int, places: bool = False) -> list[list[int]]:
        """Return one worker's micro-batches; over all workers they make up `batch` and all have the same size.

        Args:
            step: Optimiser step, counted from 0.
            rank: This worker, 0 … ``workers`` − 1.
            workers: Number of data-parallel workers.
            accumulation: Micro-batches per step on each worker; ``workers × accumulation`` divides the batch size.
            places: Return places in the batch instead of row numbers.
        """
        size = self.batch_size // (workers * accumulation)
        rows = list(range(self.batch_size)) if places else self.batch(step)
        return [rows[start : start + size] for start in range(rank * size, self.batch_size, workers * size)]

    def _walk(self, step: int, size: int, rows: int, which: int) -> list[int]:
        return [self._at(position, rows, which) for position in range(step * size, (step + 1) * size)]

    def _at(self, position: int, rows: int, which: int) -> int:
        epoch, offset = divmod(position, rows)
        if (which, epoch) not in self._epochs:
            for old in [key for key in self._epochs if key[0] == which and key[1] < epoch - 1]:
                del self._epochs[old]
            self._epochs[which, epoch] = np.random.default_rng([self.seed, epoch, which]).permutation(rows)
        return int(self._epochs[which, epoch][offset])
