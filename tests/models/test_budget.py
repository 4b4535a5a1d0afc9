from __future__ import annotations

import gc
import weakref

import pytest
import torch

from pharmacist_ray.models.budget import TokenBudget, TooLongError, out_of_memory

LENGTHS = [3, 9, 4, 9, 1, 6, 2, 8, 5, 7]


class Memory:
    """Takes batches of at most so many padded tokens, and notes what it was given."""

    def __init__(self, room: int, error: BaseException | None = None) -> None:
        self.room, self.error = room, error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.taken: list[list[int]] = []
        self.refused: list[list[int]] = []

    def __call__(self, places: list[int]) -> None:
        if len(places) * max(LENGTHS[place] for place in places) > self.room:
            self.refused.append(places)
            raise self.error
        self.taken.append(places)


@pytest.mark.parametrize("room", [9, 13, 20, 54, 1000])
@pytest.mark.parametrize("tokens", [float("inf"), 40, 1])
def test_every_row_is_done_once_whatever_the_memory(room: int, tokens: float) -> None:
    memory = Memory(room)
    TokenBudget(tokens).run(LENGTHS, memory)
    assert sorted(place for places in memory.taken for place in places) == [*range(len(LENGTHS))]


def test_what_went_through_and_its_padding_are_counted_once_each() -> None:
    budget, memory = TokenBudget(64), Memory(20)
    budget.run(LENGTHS, memory)  # a batch that does not fit has not gone through
    assert budget.passed == sum(LENGTHS)
    padded = sum(len(places) * max(LENGTHS[place] for place in places) for places in memory.taken)
    assert 0 < budget.padding == padded - sum(LENGTHS)
    budget.run(LENGTHS, memory)
    assert (budget.passed, budget.padding) == (2 * sum(LENGTHS), 2 * (padded - sum(LENGTHS)))


def test_a_batch_is_halved_until_it_fits_and_the_size_is_remembered() -> None:
    budget, memory = TokenBudget(64), Memory(20)
    budget.run(LENGTHS, memory)
    # 7 × 9 = 63 do not fit, nor do half of it, 3 × 9 = 27; 13 do.
    assert [len(places) for places in memory.refused] == [7, 3]
    assert budget.tokens == 13
    memory.refused.clear()
    budget.run(LENGTHS, memory)
    assert memory.refused == []


def test_what_does_not_fit_even_alone_is_named_with_its_length() -> None:
    budget, memory = TokenBudget(64), Memory(8)
    with pytest.raises(TooLongError, match=r"^its 9 tokens do not fit in memory, even alone$") as raised:
        budget.run(LENGTHS, memory)
    assert (raised.value.place, raised.value.tokens) == (1, 9)
    assert budget.tokens < 9


def test_rows_may_be_bounded_too() -> None:
    memory = Memory(1000)
    TokenBudget().run(LENGTHS, memory, rows=4)
    assert [len(places) for places in memory.taken] == [4, 4, 2]


def test_only_the_end_of_memory_halves() -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes")):
        assert out_of_memory(error)
        TokenBudget().run(LENGTHS, Memory(20, error))
    with pytest.raises(IndexError):
        TokenBudget().run(LENGTHS, Memory(20, IndexError("index out of range")))


def test_nothing_of_a_failed_batch_is_alive_when_the_next_one_is_tried() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def work(places: list[int]) -> None:
        gc.disable()  # what is freed is freed by itself
        assert all(one() is None for one in made)
        activations = torch.zeros(len(places))
        made.append(weakref.ref(activations))
        if len(places) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    try:
        TokenBudget().run(LENGTHS, work)
    finally:
        gc.enable()
    assert len(made) > 3
