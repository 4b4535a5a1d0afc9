"""What a command left standing: where nothing has changed since, the next one says so at once, and imports neither torch nor Ray.

A record beside the artifacts has the configuration, the identity of every file that was looked at, and the fingerprints of what was
made. It holds nothing that could not be found again: where anything differs, or the record is missing, the stages look for themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pharmacist_ray import __version__
from pharmacist_ray.config.load import dump_config, located
from pharmacist_ray.config.schema import Config
from pharmacist_ray.pipeline.artifacts import Artifact, digest
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.identity import file_identity
from pharmacist_ray.pipeline.revisions import REASONS
from pharmacist_ray.report.table import write_report
from pharmacist_ray.storage import StoragePath, json_of, storage_path, write_text

SHOWN = 5
"""Folders of a stage that are named at most (ours)."""


def leave_standing(
    command: Sequence[str], config: Config, made: Sequence[tuple[str, Sequence[Artifact]]], files: dict[str, Any]
) -> None:
    """Write down what a command made, or found.

    Args:
        command: The stages that it was asked for.
        config: The located configuration.
        made: Stage → its artifacts, in order; all ready.
        files: Path → identity of every file that was looked at.
    """
    record = {
        "settings": _settings(config),
        "files": files,
        "stages": {
            stage: [[str(one.folder), one.fingerprint, list(one.parts)] for one in artifacts] for stage, artifacts in made
        },
    }
    text, place = json.dumps(record), _place(config, command)
    if not place.exists() or place.read_text() != text:
        write_text(text, place)


def stands(command: Sequence[str], config: Config) -> bool:
    """Return whether all that a command would make is there already; if so, say it, and print the comparison if there is one.

    Args:
        command: The stages that it is asked for, in order; or ``run``.
        config: The configuration.
    """
    config, last = located(config), command[-1]
    compares = last in ("run", "report")
    try:
        record = json_of(_place(config, command))
        same = record["settings"] == _settings(config) and all(
            json.loads(json.dumps(file_identity(path))) == known for path, known in record["files"].items()
        )
        if not same or not all(_ready(*one) for artifacts in record["stages"].values() for one in artifacts):
            return False
        if compares and not (config.run_dir / "report" / "report.html").exists():
            return False
        write_text(dump_config(config), config.run_dir / "config.yaml")
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ):  # none, a broken one, or nowhere to write: the stages will say
        return False
    say(f"[dim]run directory: {escaped(config.run_dir)}[/]")
    say(f"[bold]{', '.join(record['stages'])}[/]: there already")
    if not compares:
        for folder, *_ in record["stages"][last][:SHOWN]:
            say(f"  {escaped(folder)}")
        return True
    report = config.run_dir / "report"
    if config.evaluation is not None:
        write_report(config.run_dir / "evaluation", report, console)
    say(f"  report: {escaped(report / 'report.html')}")
    return True


def _place(config: Config, command: Sequence[str]) -> StoragePath:
    return config.run_dir / "standing" / f"{'-'.join(command)}.json"


def _settings(config: Config) -> str:
    return digest([__version__, REASONS, config.model_dump(mode="json")])


def _ready(folder: str, fingerprint: str, parts: Sequence[str]) -> bool:
    place = storage_path(folder)
    return json_of(place / "manifest.json")["fingerprint"] == fingerprint and all((place / part).exists() for part in parts)
