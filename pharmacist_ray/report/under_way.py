"""The section on what is being made at the moment, from the small files that stages leave while they work."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.report.blocks import Block, Table, brief
from pharmacist_ray.report.run_files import RunFiles, readable
from pharmacist_ray.storage import StoragePath, json_of, matching

STARTED, PROGRESS = "started.json", ".progress.json"


def under_way(run: RunFiles) -> list[Block]:
    """Return a table of the artifacts that are begun and not finished; nothing where there are none."""
    begun = [file for pattern in (f"*/{STARTED}", f"*/*/{STARTED}") for file in matching(run.root, pattern)]
    rows = [row for file in begun if not (file.parent / "manifest.json").is_file() for row in _artifact(run, file)]
    header = ("artifact", "begun at (UTC)", "what", "done", "loss", "tokens per second")
    return [Table("Begun and not finished", header, rows, words=4)] if rows else []


def _artifact(run: RunFiles, started: StoragePath) -> Iterator[tuple[str, ...]]:
    """Yield a row a training that reports its steps; for scores the shards; else that the artifact is begun."""
    folder = started.parent
    try:
        at = datetime.fromtimestamp(float(json_of(started)["at"]), UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OSError, ValueError, KeyError, TypeError):  # finished a moment ago
        return
    place = str(folder).removeprefix(str(run.root)).strip("/")
    trainings = matching(folder, f"*{PROGRESS}")
    for file in trainings:
        try:
            with readable(file):
                now = json_of(file)
        except ArtifactError:  # finished a moment ago
            continue
        name = file.name.removesuffix(PROGRESS)
        done = f"step {now.get('step', 0):,} of {now.get('total', 0):,}"
        again = f" (attempt {now['attempt']})" if now.get("attempt", 1) > 1 else ""
        yield place, at, f"{name}{again}", done, brief(now.get("loss")), brief(now.get("tokens_per_s"))
    if folder.name == "scores":
        there, of = (len(matching(where, "*.parquet")) for where in (folder / "rows", run.root / "ingest/candidates/rows"))
        yield place, at, "shards", f"{there:,} of {of:,}", "", ""
    elif not trainings:
        yield place, at, "", "", "", ""
