"""The search for rows that cannot be scored, by itself: a worker's death is an exception that nobody catches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pharmacist_ray.curation.poison import Attempt, Isolation, RowAtFaultError
from pharmacist_ray.data.quarantine import QUARANTINE_SCHEMA
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import ArtifactError, ModelError, PharmacistError, ResourceError
from pharmacist_ray.runtime.ranks import Ranks


class Gone(BaseException):
    """The process has ended."""


def rows(count: int) -> list[Row]:
    return [Row(row_id(f"p{n}", "r"), f"p{n}", "r", source=f"a:b.jsonl:{n + 1}", raw=f'{{"n":{n}}}') for n in range(count)]


def scorer(*, kill: Sequence[int] = (), fail: Sequence[int] = ()) -> Callable[[Sequence[Row]], list[str]]:
    killers, failing = ({f"p{n}" for n in places} for places in (kill, fail))

    def score(some: Sequence[Row]) -> list[str]:
        prompts = [row.prompt for row in some]
        if killers & {*prompts}:
            raise Gone
        if failing & {*prompts}:
            raise IndexError("index out of\nrange in self")
        return prompts

    return score


def attempts(count: int, score: Callable[[Sequence[Row]], list[str]], file: Path) -> tuple[Isolation, list[str]]:
    """Give the shard to one worker after the other until one ends with it."""
    for _ in range(200):
        try:
            isolation = Isolation("part-00000.parquet", rows(count), file)
            places, scores = isolation.run(score)
        except Gone:
            continue
        assert scores == [f"p{place}" for place in places]
        return isolation, scores
    raise AssertionError("never ends")


@pytest.mark.parametrize("count", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
def test_a_row_that_ends_the_process_is_found_in_few_attempts(count: int, where: float, tmp_path: Path) -> None:
    bad = round(where * (count - 1))
    isolation, scores = attempts(count, scorer(kill=[bad]), tmp_path / "attempt.json")
    assert scores == [f"p{n}" for n in range(count) if n != bad]
    assert isolation.now.found == {str(bad): ("crashed_scorer", "2 scoring workers died at it")}
    assert isolation.now.number <= math.ceil(math.log2(count)) + 5  # the first one, and log₂(rows) + 4 more


def test_a_row_that_raises_is_found_by_the_worker_that_meets_it(tmp_path: Path) -> None:
    isolation, scores = attempts(1000, scorer(fail=[17, 18, 900]), tmp_path / "attempt.json")
    assert len(scores) == 997
    assert (isolation.now.number, {*isolation.now.found}) == (1, {"17", "18", "900"})
    assert {*isolation.now.found.values()} == {("scorer_error", "IndexError: index out of range in self")}


class Member(Ranks):
    """A worker of a group of two, without the other."""

    def share(self, value: Any) -> Any:
        return value or (Attempt(), None)


def test_what_one_of_a_group_says_is_what_all_go_on_from(tmp_path: Path) -> None:
    """The first worker is in the middle of a pass when the second one raises, and ends without a word."""
    file, cpu = tmp_path / "part-00000.attempt.json", torch.device("cpu")

    def begun() -> Isolation:
        return Isolation("part-00000.parquet", rows(20), file, Member(0, 2, cpu))

    def ends(error: Exception) -> None:
        first, other = begun(), Isolation("part-00000.parquet", rows(20), tmp_path / "elsewhere.json", Member(1, 2, cpu))
        other.now, other.file = first.now, file
        lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

        def score(some: Sequence[Row]) -> None:
            raise error

        def cut_off(some: Sequence[Row]) -> None:
            raise lost

        with pytest.raises(RuntimeError, match="closed by peer"):
            first.run(cut_off)
        with pytest.raises(type(error)):
            other.run(score)
        assert json.loads(file.read_text())["doing"] in ("all", "part")
        assert file.with_name(f"{file.name}.1").exists()

    def after() -> Attempt:
        now = begun()
        now._note("")  # and it ends before it has tried anything
        return now.now

    def parts() -> list[tuple[int, int]]:
        return [(first, last) for first, last in after().parts]

    ends(RowAtFaultError(rows(20)[7].id, "out_of_memory", "too long"))
    assert after().found == {"7": ("out_of_memory", "too long")}
    assert not list(tmp_path.glob("*.1"))  # read once
    ends(torch.OutOfMemoryError("CUDA out of memory"))
    assert ((now := after()).halvings, now.parts) == (1, [])
    ends(ValueError("a word that is none"))
    assert parts() == [(0, 10), (10, 20)]  # an error needs no second try
    ends(ModelError("no such layer"))
    assert parts() == [(0, 10), (10, 20)]  # no row's fault
    with pytest.raises(RuntimeError, match="closed by peer"):
        begun().run(lambda some: (_ for _ in ()).throw(RuntimeError("gloo: closed by peer")))
    assert parts() == [(0, 5), (5, 10), (10, 20)]  # nobody said anything: a death over a part
    assert begun().now.found == {"7": ["out_of_memory", "too long"]}


def test_both_kinds_in_one_shard(tmp_path: Path) -> None:
    isolation, scores = attempts(1000, scorer(kill=[3, 500], fail=[4]), tmp_path / "attempt.json")
    assert len(scores) == 997
    assert {place: reason for place, (reason, _) in isolation.now.found.items()} == {
        "3": "crashed_scorer",
        "4": "scorer_error",
        "500": "crashed_scorer",
    }


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_workers_that_die_of_something_else_cost_no_row(deaths: int, tmp_path: Path) -> None:
    left = [deaths]

    def score(some: Sequence[Row]) -> list[str]:
        if left[0]:
            left[0] -= 1
            raise Gone
        return [row.prompt for row in some]

    isolation, scores = attempts(8, score, tmp_path / "attempt.json")
    assert (len(scores), isolation.now.found, isolation.now.number) == (8, {}, deaths + 1)


def test_a_row_that_is_named_costs_no_search_and_no_other_row(tmp_path: Path) -> None:
    tried: list[int] = []

    def score(some: Sequence[Row]) -> list[str]:
        tried.append(len(some))
        if long := next((row for row in some if row.prompt in ("p5", "p6")), None):
            raise RowAtFaultError(long.id, "out_of_memory", "its 99 tokens do not fit in memory, even alone")
        return [row.prompt for row in some]

    isolation, scores = attempts(8, score, tmp_path / "attempt.json")
    assert scores == ["p0", "p1", "p2", "p3", "p4", "p7"]
    assert tried == [8, 7, 6]
    assert isolation.now.found["5"] == ("out_of_memory", "its 99 tokens do not fit in memory, even alone")


def test_many_rows_too_long_for_memory_and_a_trusted_one_end_the_run_with_what_to_do(tmp_path: Path) -> None:
    def score(some: Sequence[Row], id: str | None = None) -> list[str]:
        raise RowAtFaultError(id or some[0].id, "out_of_memory", "its 99 tokens do not fit in memory, even alone")

    advice = r"lower model\.max_length, set scoring\.checkpointing=true, or take larger GPUs"
    with pytest.raises(ResourceError, match=rf"^4 of the 8 rows of part-00000\.parquet cannot be scored, .* {advice}"):
        attempts(8, score, tmp_path / "attempt.json")
    with pytest.raises(ResourceError, match=rf"^trusted row abc: its 99 tokens do not fit in memory, even alone; {advice}"):
        attempts(8, lambda some: score(some, "abc"), tmp_path / "attempt.json")


def test_the_quarantine_names_place_reason_and_row(tmp_path: Path) -> None:
    isolation, _ = attempts(8, scorer(fail=[5]), tmp_path / "attempt.json")
    assert isolation.quarantine(tmp_path / "quarantine" / "part-00000.parquet") == 1
    table = pq.read_table(tmp_path / "quarantine" / "part-00000.parquet")
    assert table.schema == QUARANTINE_SCHEMA
    assert table.to_pylist() == [
        {
            "source": "a:b.jsonl",
            "line": 6,
            "reason": "scorer_error",
            "detail": f"row {rows(8)[5].id}: IndexError: index out of range in self",
            "text": '{"n":5}',
        }
    ]
    assert (tmp_path / "attempt.json").exists()
    isolation.done()
    assert not (tmp_path / "attempt.json").exists()


@pytest.mark.parametrize(("kind", "error"), [("fail", ModelError), ("kill", ResourceError)])
def test_a_broken_model_is_not_taken_for_bad_rows(kind: str, error: type[PharmacistError], tmp_path: Path) -> None:
    with pytest.raises(error, match=r"^4 of the 1000 rows of part-00000\.parquet cannot be scored, .* look at the model"):
        attempts(1000, scorer(**{kind: range(1000)}), tmp_path / "attempt.json")
    assert not (tmp_path / "attempt.json").exists()


def test_one_row_in_a_hundred_may_be_bad_where_others_go_well(tmp_path: Path) -> None:
    bad = range(1, 1000, 100)
    _, scores = attempts(1000, scorer(fail=[*bad]), tmp_path / "attempt.json")
    assert len(scores) == 990
    with pytest.raises(ModelError, match=r"^11 of the 1000 rows"):
        attempts(1000, scorer(fail=[*bad, 7]), tmp_path / "other.json")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_shard_of_several_rows_goes_to_quarantine_as_a_whole(count: int, tmp_path: Path) -> None:
    score = scorer(fail=range(count))
    if count == 1:
        assert attempts(1, score, tmp_path / "attempt.json")[1] == []
        return
    with pytest.raises(ModelError, match=rf"^{count} of the {count} rows"):
        attempts(count, score, tmp_path / "attempt.json")


def test_rows_that_fail_only_together_are_nobodys_fault(tmp_path: Path) -> None:
    def raising(error: BaseException) -> Callable[[Sequence[Row]], list[str]]:
        def score(some: Sequence[Row]) -> list[str]:
            if len(some) > 4:
                raise error
            return [row.prompt for row in some]

        return score

    for error in (Gone(), MemoryError("no room")):
        with pytest.raises(ResourceError, match=r"can be scored one by one but not together .* lower scoring\.tokens_per_batch"):
            attempts(16, raising(error), tmp_path / "attempt.json")
    with pytest.raises(ValueError, match="a bug"):  # with its traceback
        attempts(16, raising(ValueError("a bug")), tmp_path / "attempt.json")


def test_errors_of_ours_and_of_files_are_no_rows_fault(tmp_path: Path) -> None:
    for error in (ArtifactError("the selector is incomplete"), OSError(28, "No space left on device")):

        def score(some: Sequence[Row], error: Exception = error) -> list[str]:
            raise error

        for _ in range(3):  # the same command again is no death either
            with pytest.raises(type(error)):
                Isolation("part-00000.parquet", rows(8), tmp_path / "attempt.json").run(score)
        left = Isolation("part-00000.parquet", rows(8), tmp_path / "attempt.json")
        assert (left.now.parts, left.now.found, left.now.deaths) == ([], {}, 0)


def test_workers_that_die_before_any_row_end_the_run(tmp_path: Path) -> None:
    def load() -> None:
        raise Gone

    for _ in range(3):
        with pytest.raises(Gone):
            Isolation("part-00000.parquet", rows(8), tmp_path / "attempt.json").load(load)
    with pytest.raises(ResourceError, match=r"^3 scoring workers died while they loaded the model, before any row; "):
        Isolation("part-00000.parquet", rows(8), tmp_path / "attempt.json")
    isolation = Isolation("part-00000.parquet", rows(8), tmp_path / "attempt.json")
    isolation.load(lambda: None)
    assert isolation.run(scorer())[0] == [*range(8)]
