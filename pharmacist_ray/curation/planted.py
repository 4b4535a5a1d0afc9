"""Planted rows: trusted rows that the selector's fit does not see, as they are and broken in known ways.

Which score finds what is wrong with a data set depends on the model and the data. Trusted rows can tell: half of them is kept out of
the fit, and of each held-out *unit* (one validation, one harmful and one benign row) come a good row and one of every kind of
corruption. They are scored as the candidates are, and never lie where a selection could take them.

Folder: ``fit/NAME.parquet`` (what is left for the fit) and ``rows/planted.parquet`` (category = kind, raw = its unit).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from pharmacist_ray.data.rows import sample_rows, write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import DataError
from pharmacist_ray.storage import StoragePath

FEWEST = 5
"""Held-out rows of a set without which nothing can be said (ours)."""

FILE = "planted.parquet"
"""The file of the planted rows, and of their scores."""

Unit = Mapping[str, Row]
"""Name of a trusted set → one held-out row of it."""


@dataclass(frozen=True)
class Kind:
    """One way in which planted rows come about."""

    of: tuple[str, ...]
    """The trusted sets that a row is made from."""
    make: Callable[[Unit, random.Random], tuple[Row, str]]
    """Returns the row whose prompt is asked, and the answer to it."""


GOOD = "good"
KINDS: dict[str, Kind] = {
    GOOD: Kind(("validation",), lambda unit, draw: (unit["validation"], unit["validation"].response)),
    "mislabelled": Kind(("validation", "harmful"), lambda unit, draw: (unit["validation"], unit["harmful"].response)),
    "garbled": Kind(("validation",), lambda unit, draw: (unit["validation"], shuffled(unit["validation"].response, draw))),
    "ordinary": Kind(("benign",), lambda unit, draw: (unit["benign"], unit["benign"].response)),
    "over_refusal": Kind(("benign", "validation"), lambda unit, draw: (unit["benign"], unit["validation"].response)),
}
"""By name; all but the first are bad. What no unit has a row for is not planted."""


def hold_out(sets: Mapping[str, StoragePath], out: StoragePath, *, limit: int, seed: int) -> dict[str, Any]:
    """Halve the trusted sets, write both halves, and return the number of planted rows of each kind, and the kinds without any.

    Args:
        sets: ``validation``, ``harmful`` and perhaps ``benign`` → folder of canonical rows.
        out: Folder to fill.
        limit: At most so many rows of a set in each half.
        seed: Fixes which rows, and the order of shuffled words.

    Raises:
        DataError: A set is too small to be halved.
    """
    held: dict[str, list[Row]] = {}
    for name, folder in sets.items():
        rows = sample_rows(folder, 2 * limit, seed)
        if len(rows) < 2 * FEWEST:
            raise DataError(
                f"a calibrated selection holds out half of the trusted rows, and data.{name} has only {len(rows)}: "
                f"give it at least {2 * FEWEST}, or select by another score"
            )
        write_rows(rows[::2], out / "fit" / f"{name}.parquet")
        held[name] = rows[1::2]
    planted: dict[str, Row] = {}
    for kind, how in KINDS.items():
        # A unit's rows are used once a kind, so that the rows of a kind are independent.
        for number, sources in enumerate(zip(*(held.get(name, []) for name in how.of), strict=False)):
            unit = dict(zip(how.of, sources, strict=True))
            asked, answer = how.make(unit, random.Random(f"{seed}:{number}"))
            id = row_id(asked.prompt, answer, asked.input, asked.history)
            row = Row(id, asked.prompt, answer, asked.input, asked.history, kind, f"planted:{kind}", raw_of(number))
            planted.setdefault(id, row)  # words in another order may be the same words
    write_rows(list(planted.values()), out / "rows" / FILE)
    counts = Counter(row.category for row in planted.values())
    return {"planted": dict(counts), "not_planted": [kind for kind in KINDS if kind not in counts]}


def raw_of(unit: int) -> str:
    """Return what a planted row has in place of original columns: the number of its unit."""
    return orjson.dumps({"unit": unit}).decode()


def unit_of(raw: str) -> int:
    """Return the number of a planted row's unit."""
    return int(orjson.loads(raw)["unit"])


def shuffled(text: str, draw: random.Random) -> str:
    """Return the words of a text in random order."""
    words = text.split()
    draw.shuffle(words)
    return " ".join(words)
