"""How many tokens go through a model at a time: as many as are asked for, and half as many each time that memory runs out.

The one place that knows what running out of memory looks like. The batch that failed is tried again in two, so nothing is lost, and
the smaller size is remembered for all that comes after it. What does not fit even alone is named, and whoever asked decides.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pharmacist_ray.data.batches import length_batches

_log = logging.getLogger(__name__)


class TooLongError(Exception):
    """A single sequence does not fit in memory."""

    def __init__(self, place: int, tokens: int) -> None:
        """Keep which of the sequences it is, and how long."""
        super().__init__(place, tokens)
        self.place, self.tokens = place, tokens

    def __str__(self) -> str:
        return f"its {self.tokens:,} tokens do not fit in memory, even alone"


@dataclass
class TokenBudget:
    """A number of padded tokens, which only ever shrinks."""

    tokens: float = math.inf
    """Rows × the longest of them, of one batch."""
    together: tuple[int, int] | None = None
    """Where the model is spread over workers, who have to pass through it at the same time: which of them this is, and how many there
    are. Each is given the same sequences and takes its share of them."""
    passed: int = 0
    """Tokens that have gone through a model by it, without padding."""
    padding: int = 0
    """Padding that went with them."""

    def run(self, lengths: Sequence[int], work: Callable[[list[int]], None], *, rows: int | None = None) -> None:
        """Call ``work`` with the places of sequences, batch by batch, longest first, until each has been in one that went well.

        Workers who pass together take turns over the same batches, and one for which none is left gets an empty one: it passes something
        through the model all the same, and keeps nothing. Memory that runs out there is an error as any other, for the others are in the
        middle of the pass.

        Args:
            lengths: Tokens of each sequence.
            work: Takes places; it must not have changed anything where it runs out of memory.
            rows: At most so many a batch.

        Raises:
            TooLongError: A sequence does not fit even alone.
        """
        if self.together:
            rank, workers = self.together
            share = math.ceil(len(lengths) / workers)
            batches = length_batches(lengths, self.tokens, rows=min(rows or share, share))
            for first in range(0, len(batches), workers):
                batch = batches[first + rank] if first + rank < len(batches) else []
                try:
                    work(batch)
                except Exception as error:
                    if out_of_memory(error) and len(batch) == 1:
                        raise TooLongError(batch[0], lengths[batch[0]]) from error
                    raise
                self._count(batch, lengths)
            return
        left = list(range(len(lengths)))
        while left:
            done: set[int] = set()
            for batch in length_batches([lengths[place] for place in left], self.tokens, rows=rows):
                places = [left[index] for index in batch]
                if not _fits(work, places):
                    self._shrink(places, lengths)
                    break
                self._count(places, lengths)
                done.update(places)
            left = [place for place in left if place not in done]

    def _count(self, places: list[int], lengths: Sequence[int]) -> None:
        own = [lengths[place] for place in places]
        self.passed += sum(own)
        self.padding += max(own, default=0) * len(own) - sum(own)

    def _shrink(self, places: list[int], lengths: Sequence[int]) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest = max(lengths[place] for place in places)
        self.tokens = max(1, len(places) * longest // 2)
        if len(places) == 1:
            raise TooLongError(places[0], longest)
        _log.warning("%d × %d tokens do not fit in memory; going on with %d at a time", len(places), longest, self.tokens)


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error says that memory has run out, on a GPU or on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _fits(work: Callable[[list[int]], None], places: list[int]) -> bool:
    """Do the work; when this has returned, nothing refers any more to what a failed attempt had made."""
    try:
        work(places)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False
    return True
