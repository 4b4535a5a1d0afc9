"""Read and write files at places, so that no reader ever sees half of one, and keep local copies of what needs a real folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from pyarrow import fs

from pharmacist_ray.errors import PharmacistError, ResourceError
from pharmacist_ray.storage.paths import RemotePath, StoragePath, patient, storage_path

_BLOCK = 8 << 20  # bytes of one part on the way


def read_table(
    file: StoragePath, *, columns: Sequence[str] | None = None, filters: Any = None, schema: pa.Schema | None = None
) -> pa.Table:
    """Return a Parquet file as a table, or what is asked for of it.

    Args:
        file: The file.
        columns: Their names; default all.
        filters: An expression on columns.
        schema: What the file has to be read as.
    """
    options = {"columns": columns, "filters": filters, "schema": schema}
    if isinstance(file, RemotePath):
        return patient(file, lambda: pq.read_table(file.inner, filesystem=file.filesystem, **options))
    return pq.read_table(file, **options)


@contextmanager
def opened_parquet(file: StoragePath) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file to read it piece by piece; one of an object store is fetched whole, so that reading it cannot stall."""
    with pq.ParquetFile(pa.BufferReader(file.read_bytes()) if isinstance(file, RemotePath) else file) as opened:
        yield opened


def parquet_metadata(file: StoragePath) -> pq.FileMetaData:
    """Return the footer of a Parquet file."""
    if isinstance(file, RemotePath):
        return patient(file, lambda: pq.read_metadata(file.inner, filesystem=file.filesystem))
    return pq.read_metadata(file)


def row_count(file: StoragePath) -> int:
    """Return the number of rows of a Parquet file, from its footer."""
    return int(parquet_metadata(file).num_rows)


def rows_of_all(files: Iterable[StoragePath]) -> int:
    """Return the number of rows of Parquet files together, several footers at a time: an object store takes its time for each."""
    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(row_count, files))


def parquet_schema(file: StoragePath) -> pa.Schema:
    """Return the columns of a Parquet file."""
    return parquet_metadata(file).schema.to_arrow_schema()


def matching(folder: StoragePath, pattern: str) -> list[StoragePath]:
    """Return what in a folder matches a pattern such as ``part-*.parquet`` or ``*/manifest.json``, in the order of the names."""
    found: list[StoragePath] = list(folder.glob(pattern))
    return sorted(found, key=str)


def json_of(file: StoragePath) -> Any:
    """Return the contents of a JSON file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not JSON.
    """
    return json.loads(file.read_text(encoding="utf-8"))


def write_parquet(table: pa.Table, path: StoragePath) -> None:
    """Write a table so that no reader ever sees half of it."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def write_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: StoragePath) -> None:
    """Write record batches as an Arrow file, compressed, of which `read_batch` reads them one by one."""
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema, options=options) as file,
    ):
        for batch in batches:
            file.write_batch(batch)


def read_batch(file: StoragePath, number: int) -> pa.RecordBatch:
    """Return a record batch of an Arrow file by its number, and read no other."""

    def read() -> pa.RecordBatch:
        source = file.filesystem.open_input_file(file.inner) if isinstance(file, RemotePath) else pa.OSFile(str(file))
        with source, pa.ipc.open_file(source) as opened:
            return opened.get_batch(number)

    return patient(file, read) if isinstance(file, RemotePath) else read()


def write_text(text: str, path: StoragePath) -> None:
    """Write a small text file so that no reader ever sees half of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: StoragePath) -> Iterator[Path]:
    """Give a local file to write to; it takes the place of ``path`` if the block succeeds, and is removed if it fails.

    In a folder it lies beside ``path`` and is renamed; to an object store it is uploaded, where a file is there as a whole or not
    at all.
    """
    with disk_full_errors(path):
        if isinstance(path, RemotePath):
            temporary = scratch() / f"{uuid.uuid4().hex}.tmp"
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield temporary
            if isinstance(path, RemotePath):
                _upload(temporary, path)
            else:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_full_errors(path: StoragePath) -> Iterator[None]:
    """Say in one line what to do when there is no room to write; whatever library writes.

    Args:
        path: What is written, for the message.

    Raises:
        ResourceError: The disk is full, a quota is used up, or a file may not grow as large.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise ResourceError(
            f"no space is left to write {path}; free some, then run the same command again: it goes on"
        ) from error


def is_disk_full(error: Exception) -> bool:
    """Say whether an error means that a disk is full; Arrow and safetensors have it in their text only."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    known = isinstance(error, OSError) and error.errno in numbers
    return known or (not isinstance(error, PharmacistError) and any(os.strerror(number) in str(error) for number in numbers))


def remove_tree(folder: StoragePath) -> None:
    """Remove a folder with all that is in it; its manifest first, so that nobody takes the rest for complete."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    (folder / "manifest.json").unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        patient(folder, lambda: folder.filesystem.delete_dir(folder.inner))


def working_folder(target: StoragePath) -> Path:
    """Return where to work on a folder that libraries write files into: itself, or a local stand-in for one of an object store.

    `pull_tree` fills a stand-in with what is there, `push_tree` publishes it.
    """
    if isinstance(target, Path):
        return target
    return scratch() / "work" / _digest(str(target))


@contextmanager
def mirrored(target: StoragePath) -> Iterator[Path]:
    """Give a folder to work in that holds what ``target`` holds, and publish it at the end, also after an exception."""
    folder = working_folder(target)
    pull_tree(target, folder)
    try:
        yield folder
    finally:
        push_tree(folder, target)


def push_tree(folder: Path, target: StoragePath, *, last: Sequence[str] = ()) -> None:
    """Publish a stand-in: upload the files that the target lacks or has with another size. A target that is a folder is itself.

    Args:
        folder: What `working_folder` returned.
        target: What it stands for.
        last: Names of files that go up after all others, such as a manifest.
    """
    if isinstance(target, Path):
        return
    there = {str(target.at(info).relative_to(target)): info.size for info in target.listing(recursive=True) if info.is_file}
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file.name in last):
        name = file.relative_to(folder).as_posix()
        if there.get(name) != file.stat().st_size:
            _upload(file, target / name)


def move_tree(folder: StoragePath, target: StoragePath, *, last: Sequence[str] = ()) -> None:
    """Let a finished folder take the place of ``target``, which readers see complete, or not complete, never mixed.

    Args:
        folder: A folder beside the target, or a stand-in for it; it is gone afterwards.
        target: The final name; what is there is replaced.
        last: Names of the files that tell readers it is complete.
    """
    if isinstance(target, RemotePath):
        for name in last:
            (target / name).unlink(missing_ok=True)
        remove_tree(target)
        if isinstance(folder, RemotePath):
            _move_objects(folder, target, last)
        else:
            push_tree(folder, target, last=last)
        remove_tree(folder)
        return
    assert isinstance(folder, Path)
    old = target.with_name(f".{target.name}.old")
    remove_tree(old)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    remove_tree(old)


def _move_objects(folder: RemotePath, target: RemotePath, last: Sequence[str]) -> None:
    """Give the objects of a prefix another one; the storage does it, none is fetched."""
    files = [folder.at(info) for info in folder.listing(recursive=True) if info.is_file]
    for source in sorted(files, key=lambda file: (file.name in last, str(file))):
        _renamed(source, target / source.relative_to(folder))


def _renamed(source: RemotePath, target: RemotePath) -> None:
    def move() -> None:
        if source.exists() or not target.exists():  # asked again, it may have been done
            target.filesystem.move(source.inner, target.inner)

    patient(target, move)


def pull_tree(target: StoragePath, folder: Path) -> None:
    """Make a stand-in hold what its target holds, and nothing else. A target that is a folder is itself."""
    if isinstance(target, RemotePath):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _download(target, folder)


def local_copy(source: StoragePath | str) -> Path:
    """Return a local file or folder with the contents of one that may lie elsewhere, for libraries that read only such.

    Copies lie in `scratch` under the names, sizes and times of what they are copies of; all processes of a node share them.

    Raises:
        FileNotFoundError: There is nothing there.
    """
    found = storage_path(source)
    if isinstance(found, Path):
        return found
    info = found.info()
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"there is nothing at {found}")
    files = [info] if info.is_file else [one for one in found.listing(recursive=True) if one.is_file]
    kept = scratch() / "copies" / _digest(json.dumps([str(found), [[one.path, one.size, str(one.mtime)] for one in files]]))
    target = kept / found.name
    if target.exists():
        return target
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):  # of many actors on a node one fetches
        if not target.exists():
            draft = kept.with_name(f"{kept.name}.partial")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            if info.is_file:
                _fetch(found, draft / found.name)
            else:
                (draft / found.name).mkdir()
                _download(found, draft / found.name)
            shutil.rmtree(kept, ignore_errors=True)
            draft.rename(kept)
    return target


def scratch() -> Path:
    """Return this node's folder for stand-ins and copies: ``PHARMACIST_SCRATCH``, or one of this user's in the temporary folder.

    Raises:
        ResourceError: It belongs to somebody else.
    """
    folder = Path(os.environ.get("PHARMACIST_SCRATCH") or Path(tempfile.gettempdir()) / f"pharmacist-{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ResourceError(f"{folder} belongs to somebody else; set PHARMACIST_SCRATCH to a folder of your own")
    return folder


def _download(source: RemotePath, folder: Path) -> None:
    for info in source.listing(recursive=True):
        if info.is_file:
            inside = source.at(info).relative_to(source)
            if ".." in inside.parts:  # an object store takes any name; a file must not leave the folder
                raise ResourceError(f"{source} has a file named {inside}, which leads out of the folder; remove it")
            _fetch(source.at(info), folder / inside)


def _fetch(source: RemotePath, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)

    def fetch() -> None:
        with source.filesystem.open_input_stream(source.inner) as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file, _BLOCK)

    patient(source, fetch)


def _upload(file: Path, target: RemotePath) -> None:
    size = file.stat().st_size

    def upload() -> None:
        with file.open("rb") as source, target.filesystem.open_output_stream(target.inner) as stream:
            shutil.copyfileobj(source, stream, _BLOCK)
        if (arrived := target.filesystem.get_file_info(target.inner).size) != size:
            raise OSError(f"{arrived} of {size} bytes arrived")

    patient(target, upload)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
