"""Write a selection again as a trainer wants it, with what each row weighs; see `curation.trainers` for the layouts.

A row's weight is ½ + its rank among the kept rows, where a rank is the share of them with a lower score, those with the same score
counted half (ours). Scores have no common scale and ranks do; weights lie between ½ and 1½, and their mean is 1, so that a learning rate
keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pharmacist_ray.curation.combine import rank_among, sample_scores
from pharmacist_ray.curation.trainers import EXPORTS, FILE, Sample
from pharmacist_ray.data.render import text_before_answer, turns_before_answer, with_system
from pharmacist_ray.data.rows import parquet_files
from pharmacist_ray.data.schema import ROW_SCHEMA, Row, rows_from_table
from pharmacist_ray.errors import ArtifactError, DataError
from pharmacist_ray.plugins import blaming
from pharmacist_ray.storage import StoragePath, opened_parquet, read_table, replacing, write_text

_BATCH = 1024  # rows


def write_export(
    selection: StoragePath, name: str, out: StoragePath, *, weighed: bool = True, system: str = "", plain: bool = False
) -> dict[str, Any]:
    """Write ``out/train.parquet``, the layout's columns and ``weight``, and what the trainer wants beside it; return the counts.

    Rows are read and written a piece at a time, in the selection's order.

    Args:
        selection: The selection's folder.
        name: A key of `EXPORTS`, or a plug-in's name.
        out: The folder to fill.
        weighed: Whether the selection's scores say anything; where they do not, every weight is 1.
        system: A system prompt before every row's turns that bring none of their own.
        plain: Whether text for models without a chat template is the bare prompt; else Alpaca's frame.

    Raises:
        ConfigError: There is no such export.
        PluginError: It is a plug-in's, and fails.
        DataError: The layout has no place for any of the rows.
        ArtifactError: The selection's files do not belong together.
    """
    export, plugin = EXPORTS[name], EXPORTS.plugin(name)
    known = _known(selection) if weighed else np.zeros(0)
    schema, written, left_out, writer = export.schema, 0, 0, None
    with replacing(out / FILE) as file:
        try:
            for rows, scores in _scored_rows(selection):
                records = [export.record(_sample(row, system, plain)) for row in rows]
                fits = np.array([record is not None for record in records])
                written, left_out = written + int(fits.sum()), left_out + int((~fits).sum())
                with blaming(plugin):
                    table = pa.Table.from_pylist([record for record in records if record is not None], schema=schema)
                    table = table.append_column(
                        "weight", pa.array(_weights(known, scores[fits]) if weighed else np.ones(fits.sum()))
                    )
                if not len(table):
                    continue
                schema = schema or table.schema.remove(table.schema.get_field_index("weight"))
                writer = writer or pq.ParquetWriter(file, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise DataError(f"selection.export: '{name}' has no place for any of the {left_out} rows; leave it out")
    for beside, text in export.beside(str(out)).items():
        write_text(text, out / beside)
    return {"rows": written, "left_out": left_out, "weight": "0.5 + rank among the kept rows" if weighed else "1"}


def write_weights(selection: StoragePath, out: StoragePath) -> None:
    """Write what each row of a selection weighs: ``id`` and ``weight``, a piece at a time.

    Args:
        selection: The selection's folder.
        out: The Parquet file to write.
    """
    known, schema = _known(selection), pa.schema([("id", pa.string()), ("weight", pa.float64())])
    with replacing(out) as file, pq.ParquetWriter(file, schema) as writer:
        for part in parquet_files(selection / "data"):
            scored = _scores(part)
            weights = _weights(known, np.asarray(scored["score"], np.float64))
            writer.write_table(pa.table([scored["id"], pa.array(weights)], schema=schema))


def _known(selection: StoragePath) -> NDArray[np.float64]:
    """Return the scores among which ranks are found, in order."""
    return np.sort(sample_scores(parquet_files(selection / "data"), ["score"], _scores)["score"])


def _weights(known: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 + rank_among(known, scores)


def _sample(row: Row, system: str, plain: bool) -> Sample:
    return Sample(row, with_system(turns_before_answer(row), system), text_before_answer(row, plain=plain))


def _scores(file: StoragePath) -> pa.Table:
    return read_table(file, columns=["pharmacist_id", "pharmacist_score"]).rename_columns(["id", "score"])


def _scored_rows(selection: StoragePath) -> Iterator[tuple[list[Row], NDArray[np.float64]]]:
    """Yield the rows of ``rows/`` with their scores of ``data/``, which has them in the same order in other files."""
    scored = _each_score(selection)
    for file in parquet_files(selection / "rows"):
        with opened_parquet(file) as parquet:
            for batch in parquet.iter_batches(_BATCH, columns=ROW_SCHEMA.names):
                rows = rows_from_table(pa.Table.from_batches([batch]))
                found = [next(scored, ("", np.nan)) for _ in rows]
                if [id for id, _ in found] != [row.id for row in rows]:
                    raise ArtifactError(f"{selection}: data/ and rows/ do not have the same rows; remove it and select again")
                yield rows, np.array([score for _, score in found])


def _each_score(selection: StoragePath) -> Iterator[tuple[str, float]]:
    for file in parquet_files(selection / "data"):
        with opened_parquet(file) as parquet:
            for batch in parquet.iter_batches(_BATCH, columns=["pharmacist_id", "pharmacist_score"]):
                yield from zip(batch["pharmacist_id"].to_pylist(), batch["pharmacist_score"].to_pylist(), strict=True)
