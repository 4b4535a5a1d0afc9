"""The files of a run, read with care: what is not there is empty, what cannot be read is an error of one line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pyarrow as pa
import yaml

from pharmacist_ray.config.scoring import arm_of, folder_of
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.storage import StoragePath, json_of, matching


class RunFiles:
    """A run directory; nothing is read before it is asked for, and nothing is written."""

    def __init__(self, root: StoragePath) -> None:
        """Look at a run directory.

        Args:
            root: The run directory.

        Raises:
            ArtifactError: It is not one.
        """
        self.root = root
        if (
            not (root / "config.yaml").is_file()
            and not any(root.glob("*/manifest.json"))
            and not any(root.glob("*/*/manifest.json"))
        ):
            raise ArtifactError(f"{root} is not a run directory: it has neither config.yaml nor any stage's manifest.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; empty if none was written.

        Raises:
            ArtifactError: It is not YAML.
        """
        file = self.root / "config.yaml"
        if not file.is_file():
            return {}
        with readable(file):
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}

    def manifest(self, *place: str) -> dict[str, Any]:
        """Return the manifest of an artifact; empty if it is not finished."""
        found = self.json(*place, "manifest.json")
        return found if isinstance(found, dict) else {}

    def json(self, *place: str) -> Any:
        """Return a JSON file, None if there is none.

        Raises:
            ArtifactError: It is not JSON.
        """
        file = self.root.joinpath(*place)
        if not file.is_file():
            return None
        with readable(file):
            return json_of(file)

    def made(self, stage: str) -> dict[str, dict[str, Any]]:
        """Return the manifests of a stage with several artifacts, by folder, in order of their names."""
        folders = [file.parent.name for file in matching(self.root / stage, "*/manifest.json")]
        return {name: self.manifest(stage, name) for name in folders}

    @cached_property
    def main_arm(self) -> str | None:
        """The selection by the configured scorer; None if it is not made."""
        made = self.made("selections")
        scorer = self.config.get("selection", {}).get("scorer")
        wanted = "random_0" if scorer == "random" else folder_of(arm_of(scorer)) if scorer else None
        others = [name for name in made if name != "all" and not name.startswith("random_")]
        return wanted if wanted in made else others[0] if scorer is None and others else None

    @property
    def command(self) -> str:
        """The configuration as a command takes it."""
        return f"--config {shlex.quote(str(self.root / 'config.yaml'))}"


@contextmanager
def readable(file: StoragePath) -> Iterator[None]:
    """Turn the errors of reading a file into one of ours.

    Raises:
        ArtifactError: The block raised one.
    """
    try:
        yield
    except (OSError, ValueError, yaml.YAMLError, pa.ArrowException) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise ArtifactError(f"cannot read {file}: {' '.join(str(error).split())[:300]}; make it again") from error
