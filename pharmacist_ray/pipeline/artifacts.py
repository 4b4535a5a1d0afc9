"""Artifacts: folders with a fingerprint, made at most once.

A fingerprint is a hash of what an artifact was made from: the part of the configuration that matters, the fingerprints of its
inputs, and the stage's revision (not the package's version, see `revisions`). An artifact is ready if its ``manifest.json``, written
last, carries the expected fingerprint. That one rule gives resume, reuse and provenance.
"""

from __future__ import annotations

import glob
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.pipeline.revisions import raised_since, revision, spelled
from pharmacist_ray.storage import StoragePath, json_of, matching, remove_tree, write_text

PACKAGES = ("pharmacist-ray", "ray", "torch", "transformers", "peft", "deepspeed", "datasets", "pyarrow")
PLACES = ("path", "judge_path", "template_file")
"""Keys of a configuration that say where files lie; what they are is for `file_identity` to say."""


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON-able value."""
    data = orjson.dumps(value, option=orjson.OPT_SORT_KEYS, default=str)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def without(values: Any, keys: Sequence[str]) -> Any:
    """Return what a configuration says without some of its keys, however deep they lie."""
    if isinstance(values, list):
        return [without(value, keys) for value in values]
    if isinstance(values, dict):
        return {key: without(value, keys) for key, value in values.items() if key not in keys}
    return values


@dataclass
class Artifact:
    """One stage's output for one set of inputs."""

    folder: StoragePath
    stage: str
    config: Any
    """The part of the configuration that it was made from; JSON-able."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Input name → fingerprint (or another JSON-able identity)."""
    parts: tuple[str, ...] = ()
    """Files that must be in it as well, for an artifact that is made in parts: more of them can be added later."""

    @property
    def fingerprint(self) -> str:
        """The hash of stage, configuration, inputs and the stage's revision."""
        return digest([self.stage, self.config, dict(self.inputs), spelled(self.stage)])

    @property
    def ready(self) -> bool:
        """Whether it is there, complete, and made from just these inputs."""
        return self._begun and all((self.folder / part).exists() for part in self.parts)

    @property
    def _begun(self) -> bool:
        """Whether it is there and made from just these inputs, perhaps without some of the parts."""
        return self.manifest().get("fingerprint") == self.fingerprint

    def manifest(self) -> dict[str, Any]:
        """Return the manifest, or an empty dictionary if there is none."""
        return _manifest(self.folder)

    def difference(self, made: Mapping[str, Any]) -> str:
        """Return in words, that follow "was made", the first thing in which what was made differs from what is wanted.

        Args:
            made: The manifest of what was made.
        """
        if made.get("fingerprint") == self.fingerprint:
            return f"without {next((part for part in self.parts if not (self.folder / part).exists()), 'its parts')}"
        before, now = made.get("revision", 1), revision(self.stage)
        if before != now:
            return f"by revision {before} of {self.stage}, this is {now}; since then: {raised_since(self.stage, before)}"
        if "config" not in made:
            return "with other settings or inputs"
        missing = object()
        old, new = dict(_flat(made.get("config"))), dict(_flat(json.loads(json.dumps(self.config, default=str))))
        for key in old | new:
            if key.rpartition(".")[2] not in PLACES and old.get(key, missing) != new.get(key, missing):
                was, wanted = (f"{key}={_short(values[key])}" if key in values else f"no {key}" for values in (old, new))
                return f"with {was}, wanted is {wanted}"
        inputs = made.get("inputs", {})
        changed = [name for name in inputs | dict(self.inputs) if inputs.get(name, missing) != self.inputs.get(name, missing)]
        if changed and "revision" not in made and self.stage == "ingest":
            return (
                "by version 0.1.0, which knew files by path, size and time; "
                f"the {' and the '.join(changed)} may be the same, but lie elsewhere or have another time, and it kept no hash"
            )
        return f"from other inputs ({', '.join(changed)})" if changed else "with other settings or inputs"

    def outdated(self) -> str:
        """Return in words, that follow "was made", why what was made before will not do; nothing if it does, or if there is none.

        What lies in a folder that carries its fingerprint is compared with the latest one of the same name.
        """
        if self._begun:
            return ""
        made = self.manifest()
        name, dash, mark = self.folder.name.rpartition("-")
        if not made and dash and mark == self.fingerprint[:8]:
            others = map(_manifest, matching(self.folder.parent, f"{glob.escape(name)}-{'?' * len(mark)}"))
            made = max(others, key=lambda one: str(one.get("made_at", "")), default={})
        return self.difference(made) if made else ""

    def require(self) -> StoragePath:
        """Return the folder.

        Raises:
            ArtifactError: It is not there, or was made from other inputs.
        """
        if not self.ready:
            made = self.manifest()
            why = f"was made {self.difference(made)}" if made else "is not there yet"
            raise ArtifactError(
                f"{self.folder} {why}; run `pharmacist {self.stage}` first, or `pharmacist run` for everything that is missing"
            )
        return self.folder

    def begin(self) -> StoragePath:
        """Return the folder to work in: with what was made before from the same inputs, perhaps not to the end, else empty.

        Raises:
            ArtifactError: The folder holds something that is not ours to remove.
        """
        if self.parts and self._begun:
            return self.folder
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
            "revision": revision(self.stage),
            "fingerprint": self.fingerprint,
            "inputs": dict(self.inputs),
            "config": self.config,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in PACKAGES},
        }


def _manifest(folder: StoragePath) -> dict[str, Any]:
    try:
        return dict(json_of(folder / "manifest.json"))
    except (OSError, ValueError, TypeError):  # none, or a broken one
        return {}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested dictionaries with their values."""
    if isinstance(value, dict) and (value or not key):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif value is not None or key:
        yield key or "settings", value
