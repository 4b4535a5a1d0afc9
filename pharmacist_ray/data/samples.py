"""A table's rows as token ids by their numbers: tokenised once, many at a time, for whoever meets them again and again."""

from __future__ import annotations

from array import array

import pyarrow as pa

from pharmacist_ray.data.render import TEXTS, Rendered, Renderer
from pharmacist_ray.data.rows import row_at
from pharmacist_ray.data.schema import rows_from_table

KEPT = 65536
"""Rows whose ids are kept, four bytes a token; those after them are rendered when they are met (ours: 64 MiB at 250 tokens a row)."""


class Samples:
    """Rendered rows of a table in memory."""

    def __init__(self, table: pa.Table, renderer: Renderer) -> None:
        """Render the first `KEPT` rows.

        Args:
            table: Canonical rows, as from `read_rows`.
            renderer: Turns a row into token ids.

        Raises:
            DataError: One of them cannot be rendered.
        """
        self.table, self.renderer = table, renderer
        self._kept: list[tuple[array[int], int]] = []
        for first in range(0, min(table.num_rows, KEPT), TEXTS):
            rows = rows_from_table(table.slice(first, min(TEXTS, KEPT - first)))
            self._kept += [(array("i", sample.ids), sample.answer_start) for sample in renderer.render_all(rows)]

    def __getitem__(self, number: int) -> Rendered:
        """Return a row's sample.

        Raises:
            DataError: It cannot be rendered.
        """
        if number >= len(self._kept):
            return self.renderer.render(row_at(self.table, number))
        ids, answer_start = self._kept[number]
        return Rendered(ids.tolist(), answer_start)
