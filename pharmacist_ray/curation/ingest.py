"""Ingestion: whatever the user has becomes sharded Parquet files of canonical rows, by tasks of Ray; little of it, here and now.

    chunks ─ count ─┐
    chunks ─────────┴─ parse ─ partition by shard ─ deduplicate, write one file per shard

Every row ends up in one of three places: ``rows/``, the count of duplicates, or ``quarantine/``. The rows are counted by a
pass of its own before they are parsed, and the sums have to agree. The shard of a row is a function of its id, the one of several
equal rows that stays is the first in the input, and files are sorted by id: neither workers nor chunk sizes show in the output.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pharmacist_ray.curation.partition import buckets_of, read_bucket, write_pieces
from pharmacist_ray.data.layouts import BadRow, check_columns, to_row
from pharmacist_ray.data.public_sets import stage_public_set
from pharmacist_ray.data.quarantine import QUARANTINE_SCHEMA, TEXT_CHARS, printable_start
from pharmacist_ray.data.readers import Chunk, count_chunk, numbered, plan, public_name, read_chunk, record_of, stage_huggingface
from pharmacist_ray.data.schema import ROW_SCHEMA, Row, shard_of
from pharmacist_ray.errors import DataError, ModelError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.tasks import in_tasks
from pharmacist_ray.storage import RemotePath, StoragePath, remove_tree, write_parquet, write_text

if TYPE_CHECKING:
    from pharmacist_ray.data.room import Room

SHARD_BYTES = 16 << 20
"""Input bytes per shard; ours: large enough for few files, small enough for a worker to lose little when it is killed."""

SHARD_ROWS = 16_384
"""Rows per shard at most, on average; ours: a scoring actor holds one shard's rows, so its memory does not grow with the data."""

FINE_ROWS, FINE_SHARDS = 1024, 1024
"""Up to so many shards have as few rows as this; ours: a shard is one actor's unit of work, and many actors shall have some."""

MIN_SHARDS = 8

LOT_BYTES = 256 << 20
"""Input bytes that one task parses at most, unless a chunk has more (ours)."""

LOTS = 64
"""Fewest lots, if there are as many chunks (ours: an equal share for each CPU of a large node)."""

SMALL_BYTES = 32 << 20
"""A source of at most so many bytes is ingested in this process (ours: ten seconds, in which workers would just have started)."""

_BLOCK_BYTES = 2 << 20  # of raw text parsed at a time: as Python objects it takes twenty times as much
# On the way: a row, or a broken one with its reason, its text in `raw` and an id made of its place.
_WAY_SCHEMA = pa.schema(
    [
        *ROW_SCHEMA,
        pa.field("file", pa.int32()),
        pa.field("line", pa.int64()),
        pa.field("shard", pa.int32()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
_VALUES = attrgetter(*ROW_SCHEMA.names)
_Item = bytes | dict[str, Any] | BadRow  # a line, a Parquet row, or what has neither


@dataclass(frozen=True)
class Source:
    """What to read, and which column means what."""

    path: list[str]
    """Files, folders, patterns or URIs (see `readers.plan`), ``hf:NAME``, or folders made by ``save_to_disk``."""
    layout: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    category_column: str = "category"
    split: str = "train"
    """For Hugging Face data sets only."""
    prompt_set: str | None = None
    """The public set that the path holds."""


@dataclass(frozen=True)
class IngestReport:
    """What became of the rows: ``rows_in == rows_out + duplicates + quarantined``."""

    rows_in: int
    rows_out: int
    duplicates: int
    quarantined: int
    reasons: dict[str, int]
    """Quarantined rows by reason."""
    shards: int


def ingest(
    source: Source,
    out: StoragePath,
    *,
    shards: int | None = None,
    model: ModelRef | None = None,
    strict: bool = False,
    require_response: bool = True,
    progress: Callable[[int, int], None] | None = None,
    chunk_bytes: int = 32 << 20,
    connect: Callable[[], object] | None = None,
) -> IngestReport:
    """Read a source and write ``out/rows/part-*.parquet``, ``out/quarantine/part-*.parquet`` and ``out/report.json``.

    Running it again replaces the files; the same input gives the same bytes.

    Args:
        source: What to read.
        out: Folder that every node sees under the same path.
        shards: Number of files; by default `shards_of`.
        model: If given, rows that cannot be rendered for it, as those whose prompt leaves no room for an answer, are quarantined.
        strict: Whether quarantined rows are an error. They are written nevertheless.
        require_response: False for evaluation prompts, which may come without an answer.
        progress: Called with (tasks done, tasks in all), where there are any.
        chunk_bytes: Input bytes that are read in one go; does not change the output.
        connect: Called before Ray is needed, for a source of more than `SMALL_BYTES`; where it is not connected, all is done here.

    Raises:
        DataError: The source cannot be read, has no rows or no usable rows, or ``strict`` and some are broken.
        ModelError: The model has no usable tokenizer.
        RuntimeError: A row was lost or doubled, which is a bug, or the input changed meanwhile.
    """
    check_columns(source.layout, source.columns)
    out = out.absolute()
    staging, rows, quarantine, report_file = out / "staging", out / "rows", out / "quarantine", out / "report.json"
    report_file.unlink(missing_ok=True)  # it is written last: a folder with a report is complete
    remove_tree(staging)
    try:
        chunks = _plan(source, staging, chunk_bytes)
        size = sum(chunk.size for chunk in chunks)
        small = size <= SMALL_BYTES and all(
            chunk.codec in (None, "parquet") for chunk in chunks
        )  # what is compressed may be of any size
        if connect and not small:
            connect()
        chunks, rows_in = _count(chunks, here=small)
        if not rows_in:
            raise DataError(f"no rows in {', '.join(map(public_name, source.path))}")
        shards = shards or shards_of(rows_in, size)
        how = {
            "shards": shards,
            "model": model,
            "layout": source.layout,
            "columns": dict(source.columns),
            "category_column": source.category_column,
            "require_response": require_response,
        }
        for folder in (rows, quarantine):
            folder.mkdir(parents=True, exist_ok=True)
        totals: Counter[str] = Counter()
        written: set[tuple[str, int]] = set()
        for shard, counts in _written_here(chunks, out, how) if small else _written_by_tasks(chunks, out, staging, how, progress):
            totals.update(counts)
            written |= {(kind, shard) for kind in ("rows", "quarantined") if counts[kind]}
    finally:
        remove_tree(staging)

    for shard in range(shards):
        if ("rows", shard) not in written:
            write_parquet(ROW_SCHEMA.empty_table(), rows / _part(shard))
    _remove_others(rows, {_part(shard) for shard in range(shards)})
    _remove_others(quarantine, {_part(shard) for kind, shard in written if kind == "quarantined"})
    reasons = {key.removeprefix("reason:"): totals[key] for key in sorted(totals) if key.startswith("reason:")}
    report = IngestReport(rows_in, totals["rows"], totals["duplicates"], totals["quarantined"], reasons, shards)
    if report.rows_in != report.rows_out + report.duplicates + report.quarantined:
        raise RuntimeError(f"rows were lost or doubled, or the input changed while it was read: {report}")
    write_text(orjson.dumps(asdict(report), option=orjson.OPT_INDENT_2).decode(), report_file)

    broken = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    if report.quarantined and (strict or not report.rows_out):
        found = "no usable row" if not report.rows_out else f"{report.quarantined} broken rows and --strict"
        raise DataError(
            f"{found} in {', '.join(map(public_name, source.path))}: {broken}; file, line and reason of each are in {quarantine}"
        )
    return report


def shards_of(rows: int, size: int) -> int:
    """Return how many shards rows are spread over; never depends on workers or actors.

    Args:
        rows: Rows read.
        size: Bytes read.
    """
    fine = min(FINE_SHARDS, -(-rows // FINE_ROWS))
    return max(MIN_SHARDS, fine, -(-size // SHARD_BYTES), -(-rows // SHARD_ROWS))


def _plan(source: Source, staging: StoragePath, chunk_bytes: int) -> list[Chunk]:
    """Return the chunks of a source; a Hugging Face data set is first written to ``staging``."""
    if not source.path:
        raise DataError("the source has no path")
    paths, names = [], {}
    for index, path in enumerate(source.path):
        target = staging / f"{index}.parquet"
        if source.prompt_set:
            staged: StoragePath | None = stage_public_set(source.prompt_set, path, source.split, target)
        else:
            staged = stage_huggingface(path, source.split, target)
        paths.append(str(staged) if staged else path)
        if staged:
            names[staged.inner if isinstance(staged, RemotePath) else str(staged)] = f"{path}[{source.split}]"
    return [replace(chunk, name=names.get(chunk.path, chunk.name)) for chunk in plan(paths, chunk_bytes=chunk_bytes)]


def _count(chunks: list[Chunk], here: bool) -> tuple[list[Chunk], int]:
    """Return the chunks with their line numbers, and how many rows they have together; counted in this process or by tasks."""
    fewest = len(chunks) + 1 if here else 1
    counts = list(in_tasks(count_chunk, chunks, count=len(chunks), fewest=fewest, what="ingestion"))
    return numbered(chunks, [lines for lines, _ in counts]), sum(rows for _, rows in counts)


def _written_here(chunks: Sequence[Chunk], out: StoragePath, how: Mapping[str, Any]) -> Iterator[tuple[int, Counter[str]]]:
    """Yield what `_write_shard` returns of every shard, written by this process; ``how`` goes to `_parsed`."""
    table = pa.concat_tables(_parsed(chunks, **how))
    for shard in pc.unique(table["shard"]):
        yield _write_shard(table.filter(pc.equal(table["shard"], shard)), out)


def _written_by_tasks(
    chunks: Sequence[Chunk],
    out: StoragePath,
    staging: StoragePath,
    how: Mapping[str, Any],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, Counter[str]]]:
    """Yield the same of shards that tasks of Ray write."""
    lots, pieces, buckets = _lots(chunks), list[StoragePath](), buckets_of(how["shards"])
    tell = progress or (lambda done, total: None)
    parse = partial(_write_lot, buckets=buckets, folder=staging, how=how)
    for done, names in enumerate(in_tasks(parse, enumerate(lots), count=len(lots), fewest=1, what="ingestion"), 1):
        pieces += [staging / name for name in names]
        tell(done, len(lots) + buckets)
    write = partial(_write_bucket, pieces=pieces, out=out)
    for done, found in enumerate(in_tasks(write, range(buckets), count=buckets, fewest=1, what="ingestion"), len(lots) + 1):
        tell(done, len(lots) + buckets)
        yield from found


def _lots(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Return the chunks in lots of neighbours, each one task's work."""
    most = min(LOT_BYTES, sum(chunk.size for chunk in chunks) // LOTS)
    lots: list[list[Chunk]] = []
    size = 0
    for chunk in chunks:
        if not lots or size + chunk.size > most:
            lots.append([])
            size = 0
        lots[-1].append(chunk)
        size += chunk.size
    return lots


def _write_lot(lot: tuple[int, Sequence[Chunk]], *, buckets: int, folder: StoragePath, how: Mapping[str, Any]) -> list[str]:
    number, chunks = lot
    return write_pieces(_parsed(chunks, **how), how["shards"], buckets, folder, f"{number:06d}")


def _write_bucket(bucket: int, *, pieces: Sequence[StoragePath], out: StoragePath) -> list[tuple[int, Counter[str]]]:
    return [_write_shard(table, out) for table in read_bucket(bucket, pieces=pieces)]


def _parsed(chunks: Sequence[Chunk], *, shards: int, model: ModelRef | None, **how: Any) -> Iterator[pa.Table]:
    """Yield the rows of chunks, good and broken, in tables with `_WAY_SCHEMA`; ``how`` goes to `to_row`."""
    for chunk in chunks:
        pending: list[tuple[int, _Item, Row | BadRow]] = []
        size = 0
        for number, item in read_chunk(chunk):
            row = _row(chunk, number, item, how)
            pending.append((number, item, row))
            size += len(row.raw) if isinstance(row, Row) else TEXT_CHARS
            if size > _BLOCK_BYTES:
                yield _table(chunk, pending, shards, model)
                pending, size = [], 0
        yield _table(chunk, pending, shards, model)  # also an empty one: there has to be one


def _row(chunk: Chunk, line: int, item: _Item, how: dict[str, Any]) -> Row | BadRow:
    """Return what was read as a row, or why it is none."""
    if isinstance(item, BadRow):
        return item
    try:
        record = record_of(item) if isinstance(item, bytes) else item
        raw = item.decode().strip() if isinstance(item, bytes) else None
        return to_row(record, source=f"{chunk.name}:{line}", raw=raw, **how)
    except BadRow as bad:
        return bad


def _table(chunk: Chunk, read: list[tuple[int, _Item, Row | BadRow]], shards: int, model: ModelRef | None) -> pa.Table:
    """Return what was read as a table with `_WAY_SCHEMA`; a row that does not fit the model is broken."""
    if model is not None:
        good = {place: row for place, (_, _, row) in enumerate(read) if isinstance(row, Row)}
        places = list(good)
        for index, bad in _room(model).misfits(list(good.values())).items():
            line, item, _ = read[places[index]]
            read[places[index]] = line, item, bad
    entries = [_entry(chunk, *one, shards) for one in read]
    columns = list(zip(*entries, strict=True)) or [()] * len(_WAY_SCHEMA)
    arrays = [pa.array(column, type_.type) for column, type_ in zip(columns, _WAY_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=_WAY_SCHEMA)


def _entry(chunk: Chunk, line: int, item: _Item, row: Row | BadRow, shards: int) -> tuple[Any, ...]:
    """Return what was read as the values of `_WAY_SCHEMA`."""
    reason = detail = ""
    if isinstance(row, BadRow):
        text = row.text or (item.decode(errors="replace") if isinstance(item, bytes) else repr(item))
        place = hashlib.blake2b(f"{chunk.name}:{line}".encode(), digest_size=16).hexdigest()
        reason, detail = row.reason, printable_start(row.detail)
        row = Row(id=place, prompt="", response="", source=chunk.name, raw=printable_start(text))
    return (*_VALUES(row), chunk.file, line, shard_of(row.id, shards), reason, detail)


@lru_cache(maxsize=1)  # once per worker process, which Ray keeps for many tasks
def _room(model: ModelRef) -> Room:
    from transformers import AutoTokenizer  # seconds to import, and only needed here

    from pharmacist_ray.data.render import Renderer
    from pharmacist_ray.data.room import Room
    from pharmacist_ray.models.hub import on_disk

    try:
        tokenizer = AutoTokenizer.from_pretrained(on_disk(model.path), trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a tokenizer from {model.path}: {' '.join(str(error).split())[:300]}") from error
    arguments = dict(model.template_arguments)
    return Room(Renderer(tokenizer, model.template, model.max_length, system=model.system, arguments=arguments))


def _write_shard(table: pa.Table, out: StoragePath) -> tuple[int, Counter[str]]:
    """Write the two files of one shard and return its number and what became of its rows.

    The bytes depend on the rows alone, not on the blocks they came in: a task that Ray runs again writes the same file.
    """
    table = table.sort_by([("id", "ascending"), ("file", "ascending"), ("line", "ascending")])
    shard = int(table["shard"][0].as_py())
    good = table.filter(pc.equal(table["reason"], ""))
    broken = table.filter(pc.not_equal(table["reason"], ""))
    counts = Counter({f"reason:{reason}": count for reason, count in Counter(broken["reason"].to_pylist()).items()})
    if len(good):
        ids = good["id"].combine_chunks()
        first = pa.concat_arrays([pa.array([True]), pc.not_equal(ids[1:], ids[:-1])])
        unique = good.filter(first)
        counts.update(rows=len(unique), duplicates=len(good) - len(unique))
        write_parquet(unique.select(ROW_SCHEMA.names).cast(ROW_SCHEMA).combine_chunks(), out / "rows" / _part(shard))
    if len(broken):
        broken = broken.sort_by([("file", "ascending"), ("line", "ascending")])
        counts.update(quarantined=len(broken))
        columns = broken.select(["source", "line", "reason", "detail", "raw"]).rename_columns(QUARANTINE_SCHEMA.names)
        write_parquet(columns.cast(QUARANTINE_SCHEMA).combine_chunks(), out / "quarantine" / _part(shard))
    return shard, counts


def _part(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


def _remove_others(folder: StoragePath, keep: set[str]) -> None:
    """Remove what an earlier or an interrupted ingestion left."""
    for pattern in ("part-*.parquet", ".part-*"):
        for path in folder.glob(pattern):
            if path.name not in keep:
                path.unlink(missing_ok=True)
