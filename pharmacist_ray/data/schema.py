"""What a row is, how it gets its id, and which shard it lives in.

An id is a hash of the row's content, never a position: scores, selections, quarantine and reports join on it, and a row that is
dropped somewhere never shifts another row's score. The shard of a row and its place in a random order are functions of its id, so
neither depends on how many workers there were.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

ROW_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("history", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),
    ]
)
"""The columns of every ingested Parquet file."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sample in canonical form.

    ``prompt`` is the last user turn and ``response`` the answer to it; an absent optional part is the empty string.
    """

    id: str
    """128-bit BLAKE2b of the content, 32 hexadecimal digits; see `row_id`."""
    prompt: str
    response: str
    input: str = ""
    """The extra input field of Alpaca-like data."""
    history: str = ""
    """Earlier turns (system, user, assistant) as a JSON list of ``{"role", "content"}``."""
    category: str = ""
    """The value of the configured category column; used by per-category quotas."""
    source: str = ""
    """``file:line`` (or ``file:row``) where the row was read."""
    raw: str = ""
    """All original columns as one JSON object; written back untouched when the row is selected."""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a plain dictionary in the order of `ROW_SCHEMA`."""
        return {name: getattr(self, name) for name in ROW_SCHEMA.names}


def row_id(prompt: str, response: str, input: str = "", history: str = "") -> str:
    """Return the id of a row: a hash of what a model would be trained on, and of nothing else.

    Args:
        prompt: The last user turn.
        response: The answer.
        input: The extra input field, or the empty string.
        history: Earlier turns as JSON, or the empty string.
    """
    return hashlib.blake2b(orjson.dumps([history, prompt, input, response]), digest_size=16).hexdigest()


def shard_of(id: str, shards: int) -> int:
    """Return the shard (0 … ``shards`` − 1) of a row; depends on the id alone."""
    return int(id[:12], 16) % shards


def uniform(id: str, seed: int) -> float:
    """Return a number in [0, 1) that looks random but depends on the id and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{id}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def rows_from_table(table: pa.Table) -> list[Row]:
    """Return the rows of an ingested table, in its order; without what they came as, where the table leaves it out."""
    names = [name for name in ROW_SCHEMA.names if name != "raw" or name in table.column_names]
    return [Row(**values) for values in table.select(names).to_pylist()]


def table_from_rows(rows: list[Row]) -> pa.Table:
    """Return rows as a table with `ROW_SCHEMA`."""
    return pa.Table.from_pylist([row.as_dict() for row in rows], schema=ROW_SCHEMA)
