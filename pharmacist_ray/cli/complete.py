"""What the shell offers when the tab key is pressed: names of jobs, and the configuration's dotted keys.

The imports wait for the key: the help has to be there at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args, get_origin


def job_names(incomplete: str) -> list[str]:
    """Return the jobs that `submit` knows and that begin like this."""
    from pharmacist_ray.cli.submit import JOBS

    return [name for name in JOBS if name.startswith(incomplete)]


def override_keys(incomplete: str) -> list[str]:
    """Return the keys of a configuration that begin like this, each with its ``=``; a list's first item stands for all."""
    from pharmacist_ray.config import Config

    return [f"{key}=" for key in _keys(Config) if key.startswith(incomplete)]


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    from pydantic import BaseModel

    for name, field in kind.model_fields.items():  # type: ignore[attr-defined]
        inner = [field.annotation, *get_args(field.annotation)]
        section = next((one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if section is None:
            yield f"{prefix}{name}"
        else:
            item = ".0" if any(get_origin(one) is list for one in inner) else ""
            yield from _keys(section, f"{prefix}{name}{item}.")
