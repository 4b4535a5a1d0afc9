"""The folder of a selection: what `datasets.load_dataset` reads, what later stages read, and how it came about.

    data/train-*.parquet   the original columns, then pharmacist_id and pharmacist_score
    rows/part-*.parquet    the same rows in canonical form, shard by shard
    curated.jsonl          the same records as they were read, if asked for
    README.md              Hugging Face dataset card
    manifest.json          rule, counts, versions, provenance

Original columns come from free-form JSON, so their types are found first and are the same in all files: integers and floats in
one place become floats, objects get all the keys seen there, and a place that only ever held null is a string. Where nothing
simpler fits (text here and a list there, an object without keys or with more than 128 different ones, integers beyond 64 bits,
nesting deeper than 16), the values become JSON strings, and the manifest names the place.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import pharmacist_ray
from pharmacist_ray.data.schema import ROW_SCHEMA
from pharmacist_ray.errors import ArtifactError, DataError
from pharmacist_ray.storage import StoragePath, move_tree, opened_parquet, remove_tree, working_folder

Kept = Callable[[], Iterator[tuple[StoragePath, pa.Table]]]
"""Starts a pass over the shards: the file with all rows of a shard, and the (id, score, …) of the rows to keep."""
Kind = None | str | list[Any] | dict[str, Any]
"""The type of one place in JSON: None (only nulls so far), bool, int, float, string, json, [kind of the items], {key: kind}."""

_KEYS, _DEPTH, _COLUMNS = 128, 16, 1000
_FILE_BYTES = 256 << 20  # text per data file; the hub advises files of a few hundred MB
_BATCH = 1024  # rows


@contextmanager
def replacing(out: StoragePath) -> Iterator[Path]:
    """Give a temporary folder beside ``out`` that takes its place if the block succeeds, and is removed if it fails.

    Raises:
        ArtifactError: ``out`` is there and is not a selection, so it is not ours to replace.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())) and not (out / "manifest.json").is_file():
        raise ArtifactError(f"{out} is there and is not a selection (it has no manifest.json); move it or choose another folder")
    fresh = working_folder(out.with_name(f".{out.name}.new"))
    remove_tree(fresh)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        remove_tree(fresh)
        raise
    move_tree(fresh, out, last=["manifest.json"])


def write_curated(folder: Path, kept: Kept, *, facts: Mapping[str, Any], provenance: Mapping[str, Any], jsonl: bool) -> None:
    """Write the files of a selection in two passes over the kept rows: canonical rows and types, then typed columns.

    Args:
        folder: An empty folder.
        kept: The rows to keep.
        facts: Rule and counts, for the manifest and the card.
        provenance: Where it came from, for the manifest and the card. JSON-able.
        jsonl: Also write ``curated.jsonl``.

    Raises:
        DataError: A column is called ``pharmacist_…``, or there are more than 1,000 different columns.
    """
    kind = _write_rows(folder, kept, jsonl)
    files = _write_data(folder, kept, kind)
    manifest = {
        "kind": "selection",
        **facts,
        "json_columns": sorted(_json_places(kind)),
        "files": files,
        "versions": {
            "pharmacist_ray": pharmacist_ray.__version__,
            "python": platform.python_version(),
            "pyarrow": pa.__version__,
        },
        "provenance": provenance,
    }
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    text = orjson.dumps(manifest, default=str, option=options).decode()
    (folder / "README.md").write_text(_card(facts, text), encoding="utf-8")
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _write_rows(folder: Path, kept: Kept, jsonl: bool) -> dict[str, Kind]:
    """Write ``rows/`` and ``curated.jsonl``; return the kind of every original column, in order of appearance."""
    kinds: dict[str, Kind] = {}
    (folder / "rows").mkdir()
    with ExitStack() as stack:
        lines = stack.enter_context((folder / "curated.jsonl").open("wb")) if jsonl else None
        for source, table in kept():
            with pq.ParquetWriter(folder / "rows" / source.name, ROW_SCHEMA) as writer:
                for batch in _rows(source, table):
                    writer.write_batch(batch)
                    for raw, record in _records(batch):
                        for name, value in record.items():
                            kinds[name] = _merge(kinds.get(name), value)
                        if lines is not None:
                            lines.write((orjson.dumps(record) if "\n" in raw else raw.encode()) + b"\n")
            if len(kinds) > _COLUMNS:
                raise DataError(f"the kept rows have more than {_COLUMNS} different columns; nest them in one, or drop some")
    if clash := sorted(name for name in kinds if name.startswith("pharmacist_")):
        raise DataError(f"column '{clash[0]}' of the data has a name that selections use for their own; rename or drop it")
    return kinds


def _write_data(folder: Path, kept: Kept, kinds: dict[str, Kind]) -> list[str]:
    """Write ``data/`` in files of about 256 MB of text; return their paths."""
    fields = [pa.field(name, _arrow_type(kind)) for name, kind in kinds.items()]
    schema = pa.schema([*fields, pa.field("pharmacist_id", pa.string()), pa.field("pharmacist_score", pa.float64())])
    (folder / "data").mkdir()
    count, room, writer = 0, 0, None
    try:
        for source, table in kept():
            scores = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
            for batch in _rows(folder / "rows" / source.name, table):
                if writer is None or room <= 0:
                    if writer is not None:
                        writer.close()
                    writer = pq.ParquetWriter(folder / "data" / f"{count}.parquet", schema)
                    count, room = count + 1, _FILE_BYTES
                records = [record for _, record in _records(batch)]
                ids = batch["id"].to_pylist()
                columns = [
                    pa.array([_fit(kinds[field.name], record.get(field.name)) for record in records], field.type)
                    for field in fields
                ]
                writer.write_batch(pa.record_batch([*columns, ids, [scores[id] for id in ids]], schema=schema))
                room -= batch.nbytes
    finally:
        if writer is not None:
            writer.close()
    names = [f"data/train-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    for index, name in enumerate(names):
        (folder / "data" / f"{index}.parquet").rename(folder / name)
    return names


def _rows(source: StoragePath, table: pa.Table) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file whose ids are in the table."""
    wanted = table["id"].combine_chunks()
    if not len(wanted):
        return
    with opened_parquet(source) as file:
        for batch in file.iter_batches(_BATCH, columns=ROW_SCHEMA.names):
            chosen = batch.filter(pc.is_in(batch["id"], value_set=wanted))
            if len(chosen):
                yield chosen.cast(ROW_SCHEMA)


def _records(batch: pa.RecordBatch) -> Iterator[tuple[str, dict[str, Any]]]:
    for raw, id, source in zip(batch["raw"].to_pylist(), batch["id"].to_pylist(), batch["source"].to_pylist(), strict=True):
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise DataError(f"row {id} ({source}): its original columns are not one JSON object; ingest the candidates again")
        yield raw, record


def _merge(kind: Kind, value: Any, depth: int = 0) -> Kind:
    """Return the kind of a place that had a kind and now holds a value."""
    match value:
        case None:
            return kind
        case bool():
            return "bool" if kind in (None, "bool") else "json"
        case int() if -(1 << 63) <= value < 1 << 63:
            return "int" if kind in (None, "int") else "float" if kind == "float" else "json"
        case float():
            return "float" if kind in (None, "int", "float") else "json"
        case str():
            return "string" if kind in (None, "string") else "json"
        case list() if depth < _DEPTH and (kind is None or isinstance(kind, list)):
            inner = kind[0] if kind else None
            for item in value:
                inner = _merge(inner, item, depth + 1)
            return [inner]
        case dict() if depth < _DEPTH and (kind is None or isinstance(kind, dict)):
            inside = {**(kind or {})}
            for key, item in value.items():
                inside[key] = _merge(inside.get(key), item, depth + 1)
            return inside if len(inside) <= _KEYS else "json"
    return "json"


def _arrow_type(kind: Kind) -> pa.DataType:
    if isinstance(kind, list):
        return pa.list_(_arrow_type(kind[0]))
    if isinstance(kind, dict) and kind:
        return pa.struct([pa.field(key, _arrow_type(inner)) for key, inner in kind.items()])
    names = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    return names.get(kind, pa.string()) if isinstance(kind, str) else pa.string()


def _fit(kind: Kind, value: Any) -> Any:
    """Return a value in the form that the kind's Arrow type takes."""
    if value is None:
        return None
    if kind == "json" or kind == {}:
        return orjson.dumps(value).decode()
    if isinstance(kind, list):
        return [_fit(kind[0], item) for item in value]
    if isinstance(kind, dict):
        return {key: _fit(inner, value.get(key)) for key, inner in kind.items()}
    return float(value) if kind == "float" else value


def _json_places(kind: Kind, path: str = "") -> Iterator[str]:
    """Yield the dotted paths of the places that hold JSON strings."""
    if kind == "json" or (kind == {} and path):
        yield path
    elif isinstance(kind, list):
        yield from _json_places(kind[0], f"{path}[]")
    elif isinstance(kind, dict):
        for key, inner in kind.items():
            yield from _json_places(inner, f"{path}.{key}" if path else key)


def _card(facts: Mapping[str, Any], manifest: str) -> str:
    rule = facts["rule"]
    how = next(f"{name} {rule[name]}" for name in ("ratio", "count", "threshold") if rule[name] is not None)
    left_out = f", and {facts['left_out']:,} near-duplicates of better rows left out" if facts.get("left_out") else ""
    fenced = manifest.replace("`", "\\u0060")  # the same JSON, but text from the data cannot end the block
    return f"""---
license: unknown
pretty_name: Curated by pharmacist-ray
task_categories:
- text-generation
tags:
- safety-alignment
- data-selection
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---

# Safety-alignment data, curated by pharmacist-ray

{facts["kept"]:,} of {facts["candidates"]:,} candidates ({facts["scored"]:,} of them scored), selected by the score
`{rule["scorer"]}` with {how}, {"highest" if rule["descending"] else "lowest"} first, ties broken by id{left_out}. The worst score kept is
{facts["cut"]!r}.

    from datasets import load_dataset
    load_dataset("path/to/this/folder", split="train")

## Columns

The original columns, then `pharmacist_id` (hash of the content) and `pharmacist_score` (the score selected by; comparable within
this data set only). Places whose values had no common type hold JSON strings; `json_columns` below names them. `rows/` holds the
same rows in canonical form.

## Licence

Unknown to the tool: the licence of the candidates applies. Set `license` above before you publish this data set.

## How it was made

```json
{fenced}
```
"""
