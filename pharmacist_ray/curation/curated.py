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
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import pharmacist_ray
from pharmacist_ray.data.schema import ROW_SCHEMA
from pharmacist_ray.errors import ArtifactError, DataError
from pharmacist_ray.runtime.tasks import in_tasks
from pharmacist_ray.storage import StoragePath, matching, move_tree, opened_parquet, remove_tree, replacing, write_text

Keep = Callable[[Any], tuple[StoragePath, pa.Table]]
"""Returns the file with all rows of a shard, and the id, score and category of those to keep, in the file's order."""
Kind = None | str | list[Any] | dict[str, Any]
"""The type of one place in JSON: None (only nulls so far), bool, int, float, string, json, [kind of the items], {key: kind}."""

MAX_CATEGORIES = 1000
"""Categories that are counted one by one; with quotas this bounds the memory at 0.5 GB."""

_KEYS, _DEPTH, _COLUMNS = 128, 16, 1000
_FILE_BYTES = 256 << 20  # text per data file; the hub advises files of a few hundred MB
_BATCH = 1024  # rows


@dataclass(frozen=True)
class Part:
    """What was kept of a shard."""

    rows: int
    size: int
    """Bytes, as text in memory."""
    categories: Counter[str]
    """Rows of each; empty if there are more than `MAX_CATEGORIES`."""
    scores: tuple[float, float] | None
    """The lowest and the highest; None where nothing was kept."""
    kinds: dict[str, Kind]
    """The type of every original column, in the order of appearance."""


@contextmanager
def taking_its_place(out: StoragePath) -> Iterator[StoragePath]:
    """Give a new folder beside ``out`` that takes its place if the block succeeds, and is removed if it fails.

    Raises:
        ArtifactError: ``out`` is there and is not a selection, so it is not ours to replace.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())) and not (out / "manifest.json").is_file():
        raise ArtifactError(f"{out} is there and is not a selection (it has no manifest.json); move it or choose another folder")
    fresh = out.with_name(f".{out.name}.new")
    remove_tree(fresh)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        remove_tree(fresh)
        raise
    move_tree(fresh, out, last=["manifest.json"])


def write_curated(
    folder: StoragePath,
    shards: Sequence[Any],
    keep: Keep,
    *,
    facts: Callable[[Sequence[Part]], Mapping[str, Any]],
    provenance: Mapping[str, Any],
    jsonl: bool,
) -> None:
    """Write the files of a selection in two passes over the kept rows: canonical rows and types, then typed columns.

    Where Ray is connected, its tasks do: a shard each, then a file each.

    Args:
        folder: An empty folder.
        shards: All shards.
        keep: Says what of a shard is kept.
        facts: Returns rule and counts, for the manifest and the card, from what was kept of each shard.
        provenance: Where it came from, for the manifest and the card. JSON-able.
        jsonl: Also write ``curated.jsonl``.

    Raises:
        DataError: A column is called ``pharmacist_…``, or there are more than 1,000 different columns.
    """
    parts, kind = list[Part](), dict[str, Kind]()
    for part in in_tasks(partial(_write_rows, keep=keep, folder=folder, jsonl=jsonl), shards, count=len(shards)):
        kind |= {name: _both(kind.get(name), one) for name, one in part.kinds.items()}
        parts.append(replace(part, kinds={}))
        if len(kind) > _COLUMNS:
            raise DataError(f"the kept rows have more than {_COLUMNS} different columns; nest them in one, or drop some")
    if clash := sorted(name for name in kind if name.startswith("pharmacist_")):
        raise DataError(f"column '{clash[0]}' of the data has a name that selections use for their own; rename or drop it")
    if jsonl:
        _join(folder / "lines", folder / "curated.jsonl")
    groups = _files(shards, parts)
    files = list(in_tasks(partial(_write_data, keep=keep, folder=folder, kinds=kind), groups, count=len(groups), fewest=2))
    known = facts(parts)
    manifest = {
        "kind": "selection",
        **known,
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
    write_text(_card(known, text), folder / "README.md")
    write_text(text + "\n", folder / "manifest.json")


def _write_rows(shard: Any, *, keep: Keep, folder: StoragePath, jsonl: bool) -> Part:
    """Write what is kept of a shard to ``rows/``, and to ``lines/`` if its lines are wanted."""
    source, table = keep(shard)
    kinds, size = dict[str, Kind](), 0
    with ExitStack() as stack:
        file = stack.enter_context(replacing(folder / "rows" / source.name))
        lines: IO[bytes] | None = None
        if jsonl:
            piece = stack.enter_context(replacing(folder / "lines" / f"{source.stem}.jsonl"))
            lines = stack.enter_context(piece.open("wb"))
        with pq.ParquetWriter(file, ROW_SCHEMA) as writer:
            for batch in _rows(source, table):
                writer.write_batch(batch)
                size += batch.nbytes
                for raw, record in _records(batch):
                    for name, value in record.items():
                        kinds[name] = _merge(kinds.get(name), value)
                    if lines is not None:
                        lines.write((orjson.dumps(record) if "\n" in raw else raw.encode()) + b"\n")
    ends = pc.min_max(table["score"]).as_py() if len(table) else None
    counts = Counter({one["values"]: one["counts"] for one in pc.value_counts(table["category"]).to_pylist()})
    few = counts if len(counts) <= MAX_CATEGORIES else Counter[str]()
    return Part(len(table), size, few, ends and (ends["min"], ends["max"]), kinds)


def _join(pieces: StoragePath, file: StoragePath) -> None:
    """Make one file of the pieces in a folder, in the order of their names, and remove them."""
    with replacing(file) as target, target.open("wb") as out:
        for piece in matching(pieces, "*.jsonl"):
            with piece.open("rb") as part:
                shutil.copyfileobj(part, out)
    remove_tree(pieces)


def _files(shards: Sequence[Any], parts: Sequence[Part]) -> list[tuple[str, list[Any]]]:
    """Return the files of ``data/`` and the shards that each is made from: one after the other, about 256 MB of text a file."""
    groups, room = list[list[Any]](), 0
    for shard, part in zip(shards, parts, strict=True):
        if part.rows:
            if room <= 0:
                groups.append([])
                room = _FILE_BYTES
            groups[-1].append(shard)
            room -= part.size
    return [(f"data/train-{number:05d}-of-{len(groups):05d}.parquet", group) for number, group in enumerate(groups)]


def _write_data(named: tuple[str, list[Any]], *, keep: Keep, folder: StoragePath, kinds: dict[str, Kind]) -> str:
    """Write a file of ``data/`` from what is kept of some shards; return its name."""
    name, shards = named
    fields = [pa.field(column, _arrow_type(kind)) for column, kind in kinds.items()]
    schema = pa.schema([*fields, pa.field("pharmacist_id", pa.string()), pa.field("pharmacist_score", pa.float64())])
    with replacing(folder / name) as file, pq.ParquetWriter(file, schema) as writer:
        for source, table in map(keep, shards):
            done = 0
            for batch in _rows(folder / "rows" / source.name, table):
                records = [record for _, record in _records(batch)]
                columns = [
                    pa.array([_fit(kinds[field.name], record.get(field.name)) for record in records], field.type)
                    for field in fields
                ]
                mine = table.slice(done, len(batch))  # the file has the kept rows alone, in the table's order
                done += len(batch)
                ids, scores = (mine[column].combine_chunks() for column in ("id", "score"))
                writer.write_batch(pa.record_batch([*columns, ids, scores], schema=schema))
    return name


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


def _both(kind: Kind, other: Kind) -> Kind:
    """Return the kind of a place that has one kind in some rows and another in others."""
    if kind is None or other is None:
        return other if kind is None else kind
    if isinstance(kind, list) and isinstance(other, list):
        return [_both(kind[0], other[0])]
    if isinstance(kind, dict) and isinstance(other, dict):
        inside = kind | {key: _both(kind.get(key), inner) for key, inner in other.items()}
        return inside if len(inside) <= _KEYS else "json"
    if kind == other:
        return kind
    return "float" if {str(kind), str(other)} == {"int", "float"} else "json"


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
