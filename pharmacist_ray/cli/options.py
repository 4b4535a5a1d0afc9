"""What many commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pharmacist_ray.cli.complete import override_keys

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The run's YAML file; `pharmacist init` writes one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides by dotted key, for example selection.ratio=0.4", autocompletion=override_keys
    ),
]
