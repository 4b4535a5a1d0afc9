"""Rows that cannot be scored: find them, put them aside, and score the others.

A row may make the model or the tokenizer raise, or end the process that scores it (a segmentation fault, the memory's end). Either
way it has to be found among a shard's rows, and a process that is gone cannot say which row it was. So a worker writes beside the
shard's output what it is about to do, in ``<shard>.attempt.json``, and the next one that is given the shard reads what its
predecessor died of:

    once, over the whole shard     a machine that went away, most likely; all again
    twice                          the rows are halved, and each half is tried by itself
    over a part                    the part is halved in turn
    twice over a single row        the row goes to quarantine (`crashed_scorer`)

An error needs no second try, so that the same worker halves at once (`scorer_error`). When no part is left to try, the shard is
scored as if the quarantined rows had never been in it: in the same batches, so to the same bits. The parts' own scores are dropped.

A batch that does not fit in memory is not a row's fault: `models.budget` halves it, and only a row that does not fit even alone comes
here, by its name (`out_of_memory`).

Workers who hold a model together do a shard together. What one of them raises leaves the others in the middle of a pass, so the whole
group ends and begins anew; the one who knows why leaves a note beside the attempt, and all go on from there as one worker would. Where
memory ran out over several rows, they go on with half the tokens a batch.

One such row costs at most log₂(rows) + 4 attempts. What is not a row's fault ends the run with one line: more rows than `limit`,
rows that pass by themselves and not together, a worker that dies before it has looked at a row.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NoReturn, TypeVar

import orjson
import pyarrow as pa
import torch

from pharmacist_ray.data.quarantine import QUARANTINE_SCHEMA, printable_start
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError, ModelError, PharmacistError, ResourceError
from pharmacist_ray.models.budget import out_of_memory
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.storage import StoragePath, write_parquet, write_text

DEATHS = 2
"""Deaths over the same rows that it takes to blame them: preemptible machines go away, but hardly twice at the same place."""

LOADS = 3
"""Workers that may die over the same shard before they have looked at a row, while they load the model."""

_ROOM = "lower model.max_length, set scoring.checkpointing=true, or take larger GPUs"

Scores = TypeVar("Scores")

_log = logging.getLogger(__name__)


class RowAtFaultError(Exception):
    """A row cannot be scored, and whoever scores knows which."""

    def __init__(self, id: str, reason: str, detail: str) -> None:
        """Keep the row's id, and why it goes to quarantine."""
        super().__init__(id, reason, detail)
        self.id, self.reason, self.detail = id, reason, detail


@dataclass
class Attempt:
    """What has been tried on one shard, over workers and runs; kept in a file as long as the shard is not finished."""

    number: int = 0
    """How many workers have begun with the shard."""
    doing: str = ""
    """What the last worker was at: ``load``, ``all`` rows that are left, or a ``part``; empty if it said why it stopped."""
    loads: int = 0
    """Deaths before any row."""
    deaths: int = 0
    """Deaths over what is being tried now."""
    parts: list[tuple[int, int]] = field(default_factory=list)
    """Parts still to be tried, the first one now, as (first, last + 1) places of rows."""
    searched: bool = False
    """Whether all parts have been tried since a row was found last."""
    passed: bool = False
    """Whether any part went well."""
    found: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Place of a row that cannot be scored → reason and detail."""
    halvings: int = 0
    """How often a group of workers has halved its batches."""


@dataclass(frozen=True)
class Note:
    """Why a worker of a group ended it."""

    reason: str
    """As in the quarantine; empty where it was no row's fault."""
    detail: str = ""
    id: str = ""
    """The row, where it is known."""


class Isolation:
    """Scores one shard's rows, whatever some of them do."""

    def __init__(self, shard: str, rows: Sequence[Row], file: StoragePath, group: Ranks | None = None) -> None:
        """Read what earlier workers left, and draw the conclusion from the last one's death.

        Args:
            shard: The shard's name, for messages.
            rows: Its rows, always in the same order.
            file: Where attempts are noted down.
            group: This worker's place among those who score the shard together.

        Raises:
            ResourceError: What workers die of is not a row.
        """
        self.shard, self.rows, self.file, self.group = shard, rows, file, group
        self.now, note = group.share(self._left() if group.first else None) if group else self._left()  # type: ignore[misc]
        self.now.number += 1
        if note:
            self._told(note)
        elif self.now.doing == "load":
            self.now.loads += 1
        elif self.now.doing:
            self._died()
        if self.now.loads >= LOADS:
            self._give_up(
                ResourceError(
                    f"{self.now.loads} scoring workers died while they loaded the model, before any row; there may be too little "
                    "memory: lower resources.actors, or give the machines more"
                )
            )

    @property
    def limit(self) -> int:
        """How many rows may be put aside: three, or one in a hundred once it is known that others go well (ours)."""
        return max(3, len(self.rows) // 100) if self.now.passed else 3

    def load(self, load: Callable[[], object]) -> None:
        """Do what comes before any row, such as loading the model, so that a worker that dies of it is told from others."""
        self._note("load")
        load()
        self.now.loads = 0

    def run(self, score: Callable[[Sequence[Row]], Scores]) -> tuple[list[int], Scores]:
        """Return the places of the rows that can be scored, and what ``score`` returned for them.

        Args:
            score: Scores rows; called again and again if some of them cannot be.

        Raises:
            ModelError: More rows than `limit` make it raise.
            ResourceError: More rows than `limit` end the process, or rows do so together but not alone.
        """
        while True:
            whole = not self.now.parts
            first, last = (0, len(self.rows)) if whole else self.now.parts[0]
            places = [place for place in range(first, last) if str(place) not in self.now.found]
            self._note("all" if whole else "part")
            try:
                scores = score([self.rows[place] for place in places])
            except RowAtFaultError as error:
                if self.group:
                    self._leave(Note(error.reason, error.detail, error.id), error)
                place = next((place for place in places if self.rows[place].id == error.id), None)
                if place is None:
                    self._note("")
                    raise ResourceError(f"trusted row {error.id}: {error.detail}; {_ROOM}") from None
                _log.warning("%s: row %s cannot be scored: %s", self.shard, error.id, error.detail)
                self._put_aside(place, error.reason, error.detail)
                continue
            except Exception as error:
                if not _may_be_a_rows(error) or (whole and self.now.searched and not out_of_memory(error)):
                    if self.group:
                        self._leave(Note(""), error)
                    self._note("")
                    raise
                said = " ".join([*str(error).split(), *getattr(error, "__notes__", ())])
                detail = f"{type(error).__name__}: {printable_start(said)[:300]}"
                if self.group and _of_another(error):
                    raise  # for this one the others' end is the end as well
                if self.group:
                    self._leave(Note("out_of_memory" if out_of_memory(error) else "scorer_error", detail), error)
                _log.warning("%s: rows %d to %d cannot be scored", self.shard, first, last, exc_info=True)
                self._failed("scorer_error", detail)
                continue
            if whole:
                return places, scores
            self.now.passed = True
            self._next_part()

    def quarantine(self, file: StoragePath) -> int:
        """Write the rows that were put aside in the schema of ingestion's quarantine; return how many there are."""
        if not self.now.found:
            return 0
        places = sorted(map(int, self.now.found))
        records = []
        for place in places:
            row, (reason, detail) = self.rows[place], self.now.found[str(place)]
            name, _, line = row.source.rpartition(":")
            number = int(line) if line.isdecimal() else 0
            records.append(
                (name or row.source, number, reason, f"row {row.id}: {printable_start(detail)}", printable_start(row.raw))
            )
        columns = [
            pa.array(column, kind.type) for column, kind in zip(zip(*records, strict=True), QUARANTINE_SCHEMA, strict=True)
        ]
        write_parquet(pa.Table.from_arrays(columns, schema=QUARANTINE_SCHEMA), file)
        return len(records)

    def done(self) -> None:
        """Forget the attempts: the shard's output is there."""
        self.file.unlink(missing_ok=True)

    def _left(self) -> tuple[Attempt, Note | None]:
        """Return what earlier workers left behind: the attempt, and why it ended where one of a group said so."""
        now = Attempt(**orjson.loads(self.file.read_text())) if self.file.exists() else Attempt()
        notes: list[StoragePath] = sorted(self.file.parent.glob(f"{self.file.name}.*"))
        said = [Note(**orjson.loads(file.read_text())) for file in notes]
        for file in notes:
            file.unlink(missing_ok=True)
        return now, min(said, key=lambda note: (not note.reason, not note.id), default=None)

    def _leave(self, note: Note, error: Exception) -> NoReturn:
        """Say why this worker ends its group, and end it."""
        assert self.group is not None
        write_text(orjson.dumps(asdict(note)).decode(), self.file.with_name(f"{self.file.name}.{self.group.rank}"))
        raise error

    def _told(self, note: Note) -> None:
        """Draw the conclusion from what a worker of the group before this one said."""
        place = next((place for place, row in enumerate(self.rows) if row.id == note.id), None)
        if note.id and place is None:
            self._give_up(ResourceError(f"trusted row {note.id}: {note.detail}; {_ROOM}"))
        elif place is not None:
            self._put_aside(place, note.reason, note.detail)
        elif note.reason == "out_of_memory":
            self.now.halvings += 1
        elif note.reason:
            self._failed(note.reason, note.detail)

    def _died(self) -> None:
        """Draw the conclusion from a worker that is gone."""
        self.now.deaths += 1
        alone = bool(self.now.parts) and self.now.parts[0][1] - self.now.parts[0][0] == 1
        if self.now.deaths >= DEATHS or (self.now.parts and not alone):
            self._failed("crashed_scorer", f"{self.now.deaths} scoring workers died at it")

    def _failed(self, reason: str, detail: str) -> None:
        """Narrow down what was tried last, and put a single row aside."""
        self.now.deaths = 0
        if not self.now.parts:
            if self.now.searched:
                self._give_up(
                    ResourceError(
                        f"the rows of {self.shard} can be scored one by one but not together ({detail}); there may be too little "
                        "memory: lower scoring.tokens_per_batch or resources.actors"
                    )
                )
            self.now.parts = _halves(0, len(self.rows))
            return
        first, last = self.now.parts[0]
        if last - first > 1:
            self.now.parts[:1] = _halves(first, last)
            return
        self._next_part()
        self._put_aside(first, reason, detail)

    def _put_aside(self, place: int, reason: str, detail: str) -> None:
        self.now.found[str(place)] = (reason, detail)
        # Long rows come first, so that nothing is known yet of the others.
        limit = max(3, len(self.rows) // 100) if reason == "out_of_memory" else self.limit
        few = len(self.now.found) <= limit and (len(self.now.found) < len(self.rows) or len(self.rows) == 1)
        if not few:
            kind = ModelError if reason == "scorer_error" else ResourceError
            what = _ROOM if reason == "out_of_memory" else "look at the model, its tokenizer and the memory"
            self._give_up(
                kind(
                    f"{len(self.now.found)} of the {len(self.rows)} rows of {self.shard} cannot be scored, the last one is "
                    f"{self.rows[place].id} ({detail}); so many are hardly the rows' fault: {what}, then score again"
                )
            )

    def _next_part(self) -> None:
        del self.now.parts[0]
        self.now.deaths = 0
        self.now.searched = not self.now.parts

    def _give_up(self, error: PharmacistError) -> None:
        self.file.unlink(missing_ok=True)  # the same command again starts afresh
        raise error

    def _note(self, doing: str) -> None:
        self.now.doing = doing
        if self.group and not self.group.first:
            return
        write_text(orjson.dumps(asdict(self.now)).decode(), self.file)


def attempt_file(scores: StoragePath) -> StoragePath:
    """Return where attempts at a shard are noted down.

    Args:
        scores: The shard's output.
    """
    return scores.with_name(f"{scores.stem}.attempt.json")


def _halves(first: int, last: int) -> list[tuple[int, int]]:
    middle = (first + last + 1) // 2
    return [part for part in ((first, middle), (middle, last)) if part[0] < part[1]]


def _of_another(error: Exception) -> bool:
    """Say whether an error is what a worker sees of another one's end: gloo's are of no class of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def _may_be_a_rows(error: Exception) -> bool:
    """Say whether an error may come from a row; errors of ours (but a row's own) and of files come from elsewhere."""
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        # After an assertion on a GPU every later call fails in this process, so its end is the only way to the other rows.
        os._exit(1)
    return isinstance(error, DataError) or not isinstance(error, PharmacistError | OSError)
