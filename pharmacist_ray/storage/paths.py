"""Paths in an object store, or any other file system that pyarrow knows, which behave like `pathlib.Path` where we need it.

A `StoragePath` is one or the other. Code that only joins, lists, reads and asks treats both alike; what writes goes through
`storage.files`, for an object store has no rename.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from pharmacist_ray.errors import ConfigError, ResourceError

Result = TypeVar("Result")

PATIENCE_S = 300.0
"""Seconds for which a storage that refuses is asked again; the environment's PHARMACIST_STORAGE_PATIENCE_S overrides it. Ours:
longer than a throttled bucket or a failover takes, shorter than anybody waits for a run that cannot go on."""

_SETTLED = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
# What no waiting mends, in the words of the object stores' clients, which raise a plain OSError for everything.
_REFUSED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_(ACCESS_KEY|CLIENT|SIGNATURE)|SIGNATURE|[Cc]redential|HTTP status 40[13]"
)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or a folder of a file system that is named by a URI.

    It holds names only, so it travels between processes; the connection is made where it is used. Operations that ask the storage
    wait and ask again while it refuses, see `PATIENCE_S`, and then raise a `ResourceError`.
    """

    root: str
    """Scheme, authority and options: ``s3://bucket/?endpoint_override=…``."""
    key: str
    """Path below the root, without slashes at its ends."""

    def __str__(self) -> str:
        """Return the URI, options included."""
        base, mark, query = self.root.partition("?")
        return f"{base}{quote(self.key, safe='/=+,-_.~@:')}{mark}{query}"

    def __truediv__(self, other: str | PurePosixPath) -> RemotePath:
        return RemotePath(self.root, f"{self.key}/{other}".strip("/"))

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        """The suffix of the last part."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder it is in."""
        return RemotePath(self.root, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Return the neighbour of that name."""
        return RemotePath(self.root, f"{self.parent.key}/{name}".strip("/"))

    def with_suffix(self, suffix: str) -> RemotePath:
        """Return the neighbour with another suffix."""
        return self.with_name(PurePosixPath(self.key).with_suffix(suffix).name)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names it is made of."""
        return PurePosixPath(self.key).parts

    def joinpath(self, *names: str) -> RemotePath:
        """Return what lies below, name by name."""
        return RemotePath(self.root, "/".join([self.key, *names]).strip("/"))

    def relative_to(self, other: StoragePath) -> PurePosixPath:
        """Return what is left of the path below another of the same storage.

        Raises:
            ValueError: It is not below it.
        """
        if not isinstance(other, RemotePath) or other.root != self.root:
            raise ValueError(f"{self} is not below {other}")
        return PurePosixPath(self.key).relative_to(other.key)

    def is_absolute(self) -> bool:
        """Whether it names the same on every node: it does."""
        return True

    def resolve(self) -> RemotePath:
        """Return itself."""
        return self

    absolute = resolve

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: folders are there as soon as a file is in them."""

    @property
    def filesystem(self) -> fs.FileSystem:
        """The connection, one a process."""
        return _connect(self.root)[0]

    @property
    def inner(self) -> str:
        """The path within the file system."""
        return f"{_connect(self.root)[1]}/{self.key}" if self.key else _connect(self.root)[1]

    def info(self) -> fs.FileInfo:
        """Return type and size."""
        return patient(self, lambda: self.filesystem.get_file_info(self.inner))

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return bool(self.info().type != fs.FileType.NotFound)

    def is_file(self) -> bool:
        """Whether it is a file."""
        return bool(self.info().type == fs.FileType.File)

    def is_dir(self) -> bool:
        """Whether it is a folder with something in it."""
        return bool(self.info().type == fs.FileType.Directory)

    def listing(self, *, recursive: bool = False) -> list[fs.FileInfo]:
        """Return what is in the folder, by name; nothing if there is no such folder."""
        selector = fs.FileSelector(self.inner, recursive=recursive, allow_not_found=True)
        return sorted(patient(self, lambda: self.filesystem.get_file_info(selector)), key=lambda info: info.path)

    def at(self, info: fs.FileInfo) -> RemotePath:
        """Return the path of something that `listing` found."""
        return self / str(info.path[len(self.inner) :]).strip("/")

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in the folder."""
        return (self.at(info) for info in self.listing())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield what matches a pattern with ``*``, ``?`` and ``[]`` in its parts; there is no ``**``."""
        wanted = pattern.split("/")
        for info in self.listing(recursive=len(wanted) > 1):
            found = self.at(info)
            parts = found.relative_to(self).parts
            if len(parts) == len(wanted) and all(fnmatchcase(part, want) for part, want in zip(parts, wanted, strict=True)):
                yield found

    def read_bytes(self) -> bytes:
        """Return a file's contents."""

        def read() -> bytes:
            with self.filesystem.open_input_file(self.inner) as stream:
                return bytes(stream.read())

        return patient(self, read)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return a text file's contents."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "r", encoding: str = "utf-8") -> IO[Any]:
        """Open a file for reading; its contents are fetched whole."""
        if mode not in ("r", "rb"):
            raise ValueError(f"a file of an object store is opened for reading only, not '{mode}'")
        return io.BytesIO(self.read_bytes()) if mode == "rb" else io.StringIO(self.read_text(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        try:
            patient(self, lambda: self.filesystem.delete_file(self.inner))
        except FileNotFoundError:
            if not missing_ok:
                raise


StoragePath = Path | RemotePath
"""A file or a folder, here or elsewhere."""


def storage_path(text: str | os.PathLike[str] | RemotePath) -> StoragePath:
    """Return a path or a URI as something to work with; ``file://`` URIs are paths.

    Raises:
        ConfigError: A URI has credentials in it, or is not one that pyarrow's file systems know.
    """
    if isinstance(text, RemotePath):
        return text
    text = os.fspath(text)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        return Path(text)
    parts = urlsplit(text, allow_fragments=False)
    if "://" not in text or (parts.scheme != "file" and not parts.netloc):
        raise ConfigError(
            f"'{text}' is not a URI; write it with two slashes and a bucket or host, for example s3://bucket/folder"
        )
    refuse_credentials(text)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    query = f"?{parts.query}" if parts.query else ""
    return RemotePath(f"{parts.scheme}://{parts.netloc}/{query}", unquote(parts.path).strip("/"))


def relative(path: StoragePath, root: StoragePath) -> PurePosixPath:
    """Return what is left of a path below another.

    Raises:
        ValueError: It is not below it.
    """
    if isinstance(path, RemotePath):
        return path.relative_to(root)
    if isinstance(root, RemotePath):
        raise ValueError(f"{path} is not below {root}")
    return PurePosixPath(path.relative_to(root).as_posix())


def refuse_credentials(text: str) -> None:
    """Refuse a URI with credentials in it: it would end up in manifests and logs.

    Raises:
        ConfigError: There are some; they are not repeated.
    """
    parts = urlsplit(text if "://" in text else "", allow_fragments=False)
    user, at, host = parts.netloc.rpartition("@")
    options = {key.lower() for key, _ in parse_qsl(parts.query)}
    secret = any(word in option for option in options for word in ("secret", "password", "token", "credential", "signature"))
    if secret or (at and (":" in user or parts.scheme == "s3")):
        raise ConfigError(
            f"the URI {parts.scheme}://{host}{parts.path} has credentials in it, which would be written into manifests; give them "
            "in the environment of the nodes instead (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an instance role)"
        )


def patient(where: RemotePath, work: Callable[[], Result]) -> Result:
    """Return what ``work`` returns, asking again for a while if the storage refuses or cannot be reached.

    Args:
        where: Named in messages.
        work: Something that can be done again from its beginning.

    Raises:
        FileNotFoundError: There is no such file; nothing is asked again.
        ResourceError: It does not answer for `PATIENCE_S`, or refuses in a way that waiting does not mend.
    """
    limit = float(os.environ.get("PHARMACIST_STORAGE_PATIENCE_S", PATIENCE_S))

    def told(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        _LOG.warning(
            "%s refuses (%s); asked again in %.0f s (attempt %d)",
            where,
            _one_line(error),
            state.upcoming_sleep,
            state.attempt_number + 1,
        )

    asked = Retrying(
        retry=retry_if_exception(_passing),
        wait=wait_exponential_jitter(multiplier=0.5, max=30),
        stop=stop_after_delay(limit),
        before_sleep=told,
        reraise=True,
    )
    try:
        return asked(work)
    except _SETTLED:
        raise
    except OSError as error:
        if _passing(error):
            raise ResourceError(
                f"{where} did not answer for {limit:.0f} s: {_one_line(error)}; what is finished is kept, run the same again to go on"
            ) from error
        raise ResourceError(
            f"cannot use {where}: {_one_line(error)}; check the bucket's name and the credentials in the environment of every node"
        ) from error


def _passing(error: BaseException) -> bool:
    """Whether an error may be gone in a minute."""
    return isinstance(error, OSError) and not isinstance(error, _SETTLED) and not _REFUSED.search(str(error))


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:300]


@cache
def _connect(root: str) -> tuple[fs.FileSystem, str]:
    try:
        found, inner = fs.FileSystem.from_uri(root)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"cannot use {root}: {_one_line(error)}; known are s3://, gs://, abfs:// and hdfs:// URIs") from error
    return found, inner.rstrip("/")
