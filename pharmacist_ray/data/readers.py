"""Input files as pieces of work: `plan` cuts them into chunks, `read_chunk` reads one with bounded memory.

A plain JSON-lines file is cut anywhere, every chunk owning the lines that *start* in its byte range; a compressed one is a single
streaming chunk; a Parquet file is cut at its row groups. Lines and rows are numbered from 1 as an editor would. Where a chunk's
first line stands in its file is known only after the chunks before it were counted: `count_chunk` on each, then `numbered`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pharmacist_ray.data.layouts import BadRow
from pharmacist_ray.errors import DataError
from pharmacist_ray.storage import StoragePath, replacing

if TYPE_CHECKING:
    import datasets

MAX_LINE_BYTES = 16 << 20
"""A longer line is not one sample but a broken file; ours."""

_BLOCK = 4 << 20
_SUFFIX = re.compile(r"\.(?:(?P<kind>jsonl|ndjson|json)(?:\.(?P<codec>gz|zst))?|(?P<parquet>parquet))$", re.IGNORECASE)
_CODECS = {"gz": "gzip", "zst": "zstd"}
_KNOWN = ".jsonl, .ndjson, .json (one object per line), each also with .gz or .zst, and .parquet"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one file. Its place in the list that `plan` returns is its place in the data."""

    filesystem: fs.FileSystem
    path: str
    """Path within the file system."""
    name: str
    """The file as the user named it, without credentials; what quarantine shows."""
    file: int
    """Number of the file, from 0."""
    start: int
    """First byte, or first row group."""
    end: int | None
    """Byte or row group after the last; None reads to the end."""
    codec: str | None
    """``gzip``, ``zstd``, ``None`` for plain JSON lines, ``"parquet"`` for Parquet."""
    size: int
    """Bytes: of the file's piece as stored; for Parquet uncompressed."""
    first: int = 1
    """Number of the first line or row."""
    rows: int | None = None
    """Rows, where the file's metadata tells."""


def plan(paths: Sequence[str], filesystem: fs.FileSystem | None = None, chunk_bytes: int = 32 << 20) -> list[Chunk]:
    """Return the chunks of all files the paths name, in the order of the paths and, within a pattern or folder, of the names.

    Args:
        paths: Files, folders (all data files below), patterns with ``*``, ``**`` and ``[]`` (``?`` for local files only), or URIs
            of any of these (``s3://``, ``gs://``, ``hdfs://``, ``file://``; options go into the URI's query).
        filesystem: Read every path in this file system instead.
        chunk_bytes: A chunk's size in bytes, as far as the format allows. Never changes the rows.

    Raises:
        DataError: A path does not exist, a pattern matches nothing, a file's type is unknown, or a file cannot be opened.
    """
    files: dict[tuple[str, str, str], tuple[fs.FileSystem, str, str]] = {}  # a file that is named twice is still one file
    for path in paths:
        parts = urlsplit(path if "://" in path else "", allow_fragments=False)
        for system, inner, name in _expand(path, filesystem):
            files.setdefault((parts.netloc, parts.query, inner), (system, inner, name))
    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(_cut, *place, number, chunk_bytes) for number, place in enumerate(files.values())]
        return [chunk for job in jobs for chunk in job.result()]


def read_chunk(chunk: Chunk) -> Iterator[tuple[int, bytes | dict[str, Any] | BadRow]]:
    """Yield the rows of a chunk with their numbers: a line's bytes, or a Parquet row's columns.

    Blank lines are counted as lines but are no rows. What has no value to hand out comes as a `BadRow`: a line over
    `MAX_LINE_BYTES`, a Parquet row with a text that is not UTF-8.

    Raises:
        DataError: The file cannot be read to its end.
    """
    try:
        if chunk.codec == "parquet":
            yield from _parquet_rows(chunk)
        else:
            yield from ((number, line) for number, line in enumerate(_lines(chunk), chunk.first) if _is_row(line))
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(chunk.name, error) from error


def record_of(line: bytes) -> dict[str, Any]:
    """Return a line's JSON object.

    Raises:
        BadRow: It is none.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        unicode = "UTF-8" in error.msg or "surrogate" in error.msg
        raise BadRow("invalid_utf8" if unicode else "bad_json", str(error)) from None
    if not isinstance(record, dict):
        raise BadRow("bad_json", f"the line is a JSON {type(record).__name__}, not an object")
    return record


def count_chunk(chunk: Chunk) -> tuple[int, int]:
    """Return how many lines (blank ones too) and how many rows a chunk has.

    Raises:
        DataError: The file cannot be read to its end.
    """
    if chunk.rows is not None:
        return chunk.rows, chunk.rows
    lines = rows = 0
    try:
        for line in _lines(chunk):
            lines += 1
            rows += _is_row(line)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(chunk.name, error) from error
    return lines, rows


def numbered(chunks: Sequence[Chunk], lines: Sequence[int]) -> list[Chunk]:
    """Return the chunks with the number of each one's first line, given how many lines each has."""
    result: list[Chunk] = []
    for chunk, previous in zip(chunks, [0, *lines], strict=False):
        same = bool(result) and result[-1].file == chunk.file
        result.append(replace(chunk, first=result[-1].first + previous if same else 1))
    return result


def stage_huggingface(path: str, split: str, target: StoragePath) -> StoragePath | None:
    """Write a Hugging Face data set as a Parquet file, so that it is read like any other; return the file.

    Args:
        path: As for `load_huggingface`.
        split: Which split, for example ``train`` or ``train[:100]``.
        target: The file to write.

    Raises:
        DataError: There is no such data set or split; offline, none in the cache.
    """
    found = load_huggingface(path, split)
    if found is None:
        return None
    with replacing(target) as temporary:
        found.to_parquet(str(temporary))
    return target


def load_huggingface(path: str, split: str) -> datasets.Dataset | None:
    """Return a split of a Hugging Face data set.

    Args:
        path: ``hf:NAME`` or ``hf:NAME:CONFIGURATION`` for `datasets.load_dataset` (a hub id or a local folder), or a folder made
            by ``save_to_disk``. Anything else is none of ours: the result is None.
        split: Which split, for example ``train`` or ``train[:100]``.

    Raises:
        DataError: There is no such data set or split; offline, none in the cache.
    """
    local = Path(os.path.expanduser(path.removeprefix("hf:")))
    saved = any((local / marker).is_file() for marker in ("dataset_dict.json", "state.json"))
    if not saved and not path.startswith("hf:"):
        return None
    import datasets  # slow to import, and most runs read plain files

    try:
        if saved:
            found = datasets.load_from_disk(str(local))
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise ValueError(f"unknown split '{split}'; known: {', '.join(sorted(found))}")
                found = found[split]
        else:
            name, _, configuration = path.removeprefix("hf:").removeprefix("//").partition(":")
            found = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises what its file systems and the network raise
        raise DataError(
            f"cannot load the Hugging Face data set '{path}' (split '{split}'): {_one_line(error)}; "
            "give an existing folder or hub id, and without a network one that is in the cache"
        ) from error
    return found


def public_name(path: str) -> str:
    """Return a path as given, a URI without the credentials that may stand before its host and in its query."""
    parts = urlsplit(path if "://" in path else "", allow_fragments=False)
    return f"{parts.scheme}://{_host(parts)}{parts.path}" if parts.scheme else path


def _expand(path: str, filesystem: fs.FileSystem | None) -> list[tuple[fs.FileSystem, str, str]]:
    """Return (file system, path in it, name to show) of every file a path names."""
    prefix, shown = "", public_name(path)
    if filesystem is not None:
        inner = path
    elif "://" in path:
        parts = urlsplit(path, allow_fragments=False)
        query = f"?{parts.query}" if parts.query else ""
        try:  # the path stays out of the URI: a pattern is not a valid one
            filesystem, root = fs.FileSystem.from_uri(f"{parts.scheme}://{parts.netloc}/{query}")
        except (OSError, ValueError, pa.ArrowException) as error:
            secret = parts.netloc.rpartition("@")[0] + "@"  # which the message may repeat
            raise DataError(f"cannot read {shown}: {_one_line(error).replace(secret, '')}") from None
        inner = f"{root.rstrip('/')}/{unquote(parts.path).lstrip('/')}"
        prefix = f"{parts.scheme}://{_host(parts) if root.startswith('/') else ''}"
    else:
        filesystem, inner = fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        info = filesystem.get_file_info(inner)
        if info.is_file:
            found = [inner]
        elif info.type == fs.FileType.Directory:
            found = [file for file in _walk(filesystem, inner) if _SUFFIX.search(file) and not _hidden(file, inner)]
        elif re.search(r"[*?[]", inner):
            folder = re.split(r"[*?[]", inner, maxsplit=1)[0].rpartition("/")[0] or "/"
            deep = "**" in inner or "/" in inner[len(folder) + 1 :]
            pattern = _regex(inner)
            found = [file for file in _walk(filesystem, folder, deep) if pattern.fullmatch(file)]
        else:
            raise DataError(f"no such file: {shown}; for a data set of the Hugging Face hub write hf:NAME")
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(shown, error) from error
    if not found:
        raise DataError(f"nothing to read at {shown}; known types: {_KNOWN}")
    if "://" in path:
        return [(filesystem, file, prefix + file) for file in found]
    # What the user wrote is shown, relative or not, so that two machines name a row alike.
    relative = prefix == "" and not os.path.isabs(path) and isinstance(filesystem, fs.LocalFileSystem)
    return [(filesystem, file, os.path.relpath(file) if relative else file) for file in found]


def _walk(filesystem: fs.FileSystem, folder: str, deep: bool = True) -> list[str]:
    """Return the files in a folder, and in those below it, sorted."""
    selector = fs.FileSelector(folder, recursive=deep, allow_not_found=True)
    return sorted(info.path for info in filesystem.get_file_info(selector) if info.is_file)


def _hidden(file: str, folder: str) -> bool:
    """Whether a file below a folder is some tool's own (``_SUCCESS``, ``.cache/…``)."""
    return any(part.startswith(("_", ".")) for part in file[len(folder) :].strip("/").split("/"))


def _regex(pattern: str) -> re.Pattern[str]:
    """Return a shell pattern as a regular expression: ``*`` and ``?`` stay within a folder, ``**`` does not."""
    translate = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.findall(r"\*\*/|\*\*|\*|\?|\[!?[^\]]+\]|.", pattern, re.DOTALL)
    return re.compile(
        "".join(translate.get(piece) or (piece.replace("[!", "[^") if len(piece) > 2 else re.escape(piece)) for piece in pieces),
        re.DOTALL,
    )


def _cut(filesystem: fs.FileSystem, path: str, name: str, file: int, chunk_bytes: int) -> list[Chunk]:
    """Return the chunks of one file."""
    match = _SUFFIX.search(path)
    if match is None:
        raise DataError(f"{name}: unknown file type; known: {_KNOWN}")
    codec = "parquet" if match["parquet"] else _CODECS.get((match["codec"] or "").lower())
    whole = Chunk(filesystem, path, name, file, 0, None, codec, 0)
    try:
        if codec == "parquet":
            with filesystem.open_input_file(path) as source:
                return _groups(whole, pq.read_metadata(source), chunk_bytes)
        size = filesystem.get_file_info(path).size
        if match["kind"].lower() == "json":
            with _open(whole) as stream:
                if stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                    raise DataError(f"{name} is one JSON array, not one object per line; rewrite it as JSON lines")
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(name, error) from error
    if codec is not None:
        return [replace(whole, size=size)]
    starts = range(0, max(size, 1), chunk_bytes)
    return [replace(whole, start=at, end=min(at + chunk_bytes, size), size=min(chunk_bytes, size - at)) for at in starts]


def _groups(whole: Chunk, metadata: pq.FileMetaData, chunk_bytes: int) -> list[Chunk]:
    """Return the chunks of a Parquet file: as many of its row groups each as fit."""
    chunks: list[Chunk] = []
    first = 1
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if chunks and chunks[-1].size + group.total_byte_size <= chunk_bytes:
            last = chunks.pop()
            rows = (last.rows or 0) + group.num_rows
            chunks.append(replace(last, end=index + 1, size=last.size + group.total_byte_size, rows=rows))
        else:
            size, rows = group.total_byte_size, group.num_rows
            chunks.append(replace(whole, start=index, end=index + 1, size=size, first=first, rows=rows))
        first += group.num_rows
    return chunks


def _open(chunk: Chunk) -> IO[bytes]:
    """Open a JSON-lines chunk at the byte before its first: that byte tells whether a line starts there."""
    if chunk.codec is not None:
        return chunk.filesystem.open_input_stream(chunk.path, compression=chunk.codec, buffer_size=_BLOCK)  # type: ignore[no-any-return]
    stream = chunk.filesystem.open_input_file(chunk.path)
    stream.seek(max(chunk.start - 1, 0))
    return stream  # type: ignore[no-any-return]


def _lines(chunk: Chunk) -> Iterator[bytes | BadRow]:
    """Yield the lines that start in the chunk, without their newlines."""
    at, head, length = max(chunk.start - 1, 0), b"", 0  # `at`: where the line began whose first `length` bytes were read
    with _open(chunk) as stream:
        while chunk.end is None or at < chunk.end:
            block = stream.read(_BLOCK)
            if not block:
                if length and at >= chunk.start:
                    yield _line(head, length, at)
                return
            *ended, rest = block.split(b"\n")
            for piece in ended:
                if at >= chunk.start:
                    yield _line(head + piece if length else piece, length + len(piece), at)
                at += length + len(piece) + 1
                head, length = b"", 0
                if chunk.end is not None and at >= chunk.end:
                    return
            length += len(rest)
            head += rest[: max(MAX_LINE_BYTES + 1 - len(head), 0)]


def _is_row(line: bytes | BadRow) -> bool:
    return isinstance(line, BadRow) or (bool(line) and not line.isspace())


def _line(head: bytes, length: int, at: int) -> bytes | BadRow:
    if length > MAX_LINE_BYTES:
        text = head[:8000].decode(errors="replace")
        return BadRow("line_too_long", f"the line has {length} bytes, the limit is {MAX_LINE_BYTES}", text)
    return head[3:] if at == 0 and head.startswith(b"\xef\xbb\xbf") else head


def _parquet_rows(chunk: Chunk) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    number = chunk.first
    with chunk.filesystem.open_input_file(chunk.path) as source, pq.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=1024, row_groups=range(chunk.start, chunk.end or 0)):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_decoded(batch.slice(index, 1)) for index in range(len(batch))]
            for row in rows:
                yield number, row
                number += 1


def _decoded(batch: pa.RecordBatch) -> dict[str, Any] | BadRow:
    """Return the only row of a batch."""
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("invalid_utf8", str(error))
    return row


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"cannot read {name}: {_one_line(error)}")
