"""Artifacts: folders with a fingerprint, made at most once.

A fingerprint is a hash of what an artifact was made from: the part of the configuration that matters, the fingerprints of its
inputs, and this package's version. An artifact is ready if its ``manifest.json``, written last, carries the expected fingerprint.
That one rule gives resume, reuse and provenance.
"""

from __future__ import annotations

import glob
import hashlib
import json
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import orjson
import pyarrow as pa
import pyarrow.fs as pafs

from pharmacist_ray import __version__
from pharmacist_ray.data.readers import public_name
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.storage import StoragePath, json_of, remove_tree, write_text

PACKAGES = ("pharmacist-ray", "ray", "torch", "transformers", "peft", "deepspeed", "datasets", "pyarrow")


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON-able value."""
    data = orjson.dumps(value, option=orjson.OPT_SORT_KEYS, default=str)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def file_identity(path: str) -> Any:
    """Return what identifies a file, a folder, a glob or a hub id without reading it: names, sizes and times of change.

    Args:
        path: A path or URI; what is neither a file nor a folder is identified by its name.
    """
    name = public_name(path)
    if "://" in path:
        return [name, _remote_files(path)]
    local = Path(path.removeprefix("hf:")).expanduser()
    named = [local] if local.exists() else map(Path, glob.glob(str(local), recursive=True, include_hidden=True))
    files = sorted(file for place in named for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file())
    return [name, [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


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


@dataclass
class Artifact:
    """One stage's output for one set of inputs."""

    folder: StoragePath
    stage: str
    config: Any
    """The part of the configuration that it was made from; JSON-able."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Input name → fingerprint (or another JSON-able identity)."""

    @property
    def fingerprint(self) -> str:
        """The hash of stage, configuration, inputs and package version."""
        return digest([self.stage, self.config, dict(self.inputs), __version__])

    @property
    def ready(self) -> bool:
        """Whether it is there, complete, and made from just these inputs."""
        return self.manifest().get("fingerprint") == self.fingerprint

    def manifest(self) -> dict[str, Any]:
        """Return the manifest, or an empty dictionary if there is none."""
        try:
            return dict(json_of(self.folder / "manifest.json"))
        except (OSError, ValueError, TypeError):  # none, or a broken one
            return {}

    def require(self) -> StoragePath:
        """Return the folder.

        Raises:
            ArtifactError: It is not there, or was made from other inputs.
        """
        if not self.ready:
            why = "was made with other settings or inputs" if self.manifest() else "is not there yet"
            raise ArtifactError(
                f"{self.folder} {why}; run `pharmacist {self.stage}` first, or `pharmacist run` for everything that is missing"
            )
        return self.folder

    def begin(self) -> StoragePath:
        """Return the folder to work in: with what an interrupted attempt from the same inputs left behind, else empty.

        Raises:
            ArtifactError: The folder holds something that is not ours to remove.
        """
        marker = self.folder / "started.json"
        try:
            same = json_of(marker)["fingerprint"] == self.fingerprint
        except (OSError, ValueError, TypeError, KeyError):
            same = False
        if not same or self.manifest():
            self._clear()
            write_text(json.dumps({"fingerprint": self.fingerprint, "at": time.time()}), marker)
        return self.folder

    def _clear(self) -> None:
        """Remove the folder in one step; one that no stage has made stays, for a run directory may be anybody's folder."""
        if not self.folder.exists():
            return
        ours = any((self.folder / name).exists() for name in ("manifest.json", "started.json"))
        if not ours and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ArtifactError(
                f"{self.folder} is there and was not made by `pharmacist {self.stage}`; move it or choose another run_dir"
            )
        if isinstance(self.folder, Path):
            old = self.folder.with_name(f".{self.folder.name}.old")
            remove_tree(old)
            self.folder.rename(old)
            remove_tree(old)
        else:
            remove_tree(self.folder)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the manifest, on top of what the stage itself wrote into it: from now on the artifact is ready."""
        manifest = self.manifest() | self.record() | {"summary": dict(summary)}
        write_text(json.dumps(manifest, indent=1, default=str), self.folder / "manifest.json")
        (self.folder / "started.json").unlink(missing_ok=True)

    def record(self) -> dict[str, Any]:
        """Return the provenance that goes into manifests."""
        return {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "inputs": dict(self.inputs),
            "config": self.config,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in PACKAGES},
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
