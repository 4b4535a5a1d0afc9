"""What tells input files apart: by content where reading them is cheap, by size and time where it is not, never by where they lie.

A copy of a data folder is the same data. Files up to `HASHED_FILE` bytes are known by a hash of their content, unless a path names
more than `HASHED_TOTAL` bytes of them. The others are known by size and time of change, so a copy must keep the times (``cp -a``,
``rsync -a``). Names within a folder count, for the order of the rows and the type of a file hang on them. What a URI names is known
by its address, sizes and times, and what is on a hub by its name.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pharmacist_ray.data.readers import public_name

HASHED_FILE = 64 << 20
"""Bytes of the largest file that is read for its identity: a twentieth of a second."""
HASHED_TOTAL = 1 << 30
"""Bytes of such files at one path up to which they are read: about a second, each time a command starts."""


def file_identity(path: str) -> Any:
    """Return what identifies the files at a path, as JSON-able values.

    Args:
        path: A file, a folder, a glob, a hub id or a URI; what is neither a file nor a folder is identified by its name.
    """
    if "://" in path:
        return [public_name(path), _remote_files(path)]
    files = set(_local_files(path))  # `**` finds a file twice: by itself and below its folder
    if not files:
        return [path, []]
    named = str(_local(path))
    if Path(named).exists():
        root, pattern = (Path(named) if Path(named).is_dir() else Path(named).parent), ""
    else:  # a pattern: what it reads depends on it, but not on the folder in which it looks
        folder = re.split(r"[*?[]", named, maxsplit=1)[0].rpartition("/")[0]
        root, pattern = Path(folder or ("/" if named.startswith("/") else ".")), named[len(folder) :].lstrip("/")
    small = sum(size for file in files if (size := file.stat().st_size) <= HASHED_FILE)
    known = sorted([os.path.relpath(file, root), *_one(file, small <= HASHED_TOTAL)] for file in files)
    return [f"{'hf:' if path.startswith('hf:') else ''}{pattern}", known]


def _one(file: Path, read: bool) -> list[Any]:
    """Return a file's size and the hash of its content, or its time of change."""
    status = file.stat()
    if read and status.st_size <= HASHED_FILE:
        try:
            with file.open("rb") as stream:
                return [status.st_size, hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()]
        except OSError:
            pass  # whoever reads it will say what is wrong
    return [status.st_size, status.st_mtime_ns]


def dated_identity(path: str) -> Any:
    """Return what identified the files at a path for version 0.1.0: where they lie, their sizes and their times of change.

    For run directories that it made, see `Run`.
    """
    if "://" in path:
        return [public_name(path), _remote_files(path)]
    return [path, [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in _local_files(path)]]


def _local(path: str) -> Path:
    return Path(path.removeprefix("hf:")).expanduser()


def _local_files(path: str) -> list[Path]:
    """Return the files that a local path or pattern names, those in folders below too, sorted."""
    local = _local(path)
    named = [local] if local.exists() else map(Path, glob.glob(str(local), recursive=True, include_hidden=True))
    return sorted(file for place in named for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file())


def _remote_files(path: str) -> list[Any]:
    """Return the files of a URI; for a pattern all those in the folder that it looks through."""
    parts = urlsplit(path, allow_fragments=False)
    folder = re.split(r"[*?[]", parts.path, maxsplit=1)[0]
    if folder != parts.path:
        folder = folder.rpartition("/")[0]
    try:
        filesystem, inner = pafs.FileSystem.from_uri(urlunsplit(parts._replace(path=folder)))
        found = filesystem.get_file_info([inner])
        if found[0].type == pafs.FileType.Directory:
            found = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    except (OSError, ValueError, pa.ArrowException):
        return []  # whoever reads it will say what is wrong
    return sorted([info.path, info.size, str(info.mtime)] for info in found if info.is_file)
