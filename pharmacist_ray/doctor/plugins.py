"""List what a configuration can name: the package's own parts, and those of installed packages."""

from __future__ import annotations

from typing import Any

import pharmacist_ray
from pharmacist_ray.curation.scorers import SCORERS
from pharmacist_ray.curation.trainers import EXPORTS
from pharmacist_ray.errors import PharmacistError
from pharmacist_ray.evaluation.judges import JUDGES
from pharmacist_ray.pipeline.console import escaped, say
from pharmacist_ray.plugins import Table
from pharmacist_ray.training.objectives import OBJECTIVES
from pharmacist_ray.training.tracking import TRACKERS

TABLES: tuple[Table[Any], ...] = (SCORERS, OBJECTIVES, JUDGES, EXPORTS, TRACKERS)


def show_plugins() -> None:
    """Print kind, name, where it comes from and its package's version, a line each; and why a plug-in cannot be loaded."""
    lines, broken = [("kind", "name", "from", "package")], list[str]()
    for table in TABLES:
        own = f"pharmacist-ray {pharmacist_ray.__version__}"
        lines += [(table.kind, name, "built in", own) for name in (*table, *table.also)]
        for plugin in table.installed():
            lines.append((plugin.kind, plugin.name, plugin.place, f"{plugin.package} {plugin.version}"))
            if why := _why_not(table, plugin.name):
                broken.append(why)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        say(escaped("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()))
    for why in dict.fromkeys(broken):
        say(f"[red]not usable[/]  {escaped(why)}")


def _why_not(table: Table[Any], name: str) -> str:
    if name in table or name in table.also:
        return f"{table.kind} '{name}' of another package: the name is taken by a built-in; its author has to choose another one"
    try:
        table.plugin(name)
    except PharmacistError as error:
        return str(error)
    return ""
