"""What is kept of a row that cannot be used: where it stood, why, and how it begins."""

from __future__ import annotations

import pyarrow as pa

TEXT_CHARS = 2000
"""Characters that are kept of it."""

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""The columns of a quarantine file: where, why (a key of `layouts.REASONS`), and the first `TEXT_CHARS` characters."""


def printable_start(text: str) -> str:
    """Return the beginning of a text, as something that can be written."""
    return text[:TEXT_CHARS].encode(errors="replace").decode()
