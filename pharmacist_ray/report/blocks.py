"""What a section of the page is made of, and how it becomes HTML: every value is escaped and printable by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pharmacist_ray.data.printable import printable, without_secrets


@dataclass(frozen=True)
class Note:
    """One paragraph."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Lines to copy, or a file; folded away under ``summary`` if it has one."""

    text: str
    summary: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """Columns from the left that hold words; the others hold numbers and are aligned to the right."""
    summary: str = ""
    """The table is folded away under these words."""
    grouped: bool = False
    """Rows with the same first cell belong together."""


@dataclass(frozen=True)
class Plot:
    """One panel of a figure."""

    svg: Markup
    """From `svg.to_svg`."""
    words: str = ""
    """Shown below: what a reader would have to read off otherwise."""
    numbers: Table | None = None


@dataclass(frozen=True)
class Figure:
    """Panels that belong together."""

    caption: str
    plots: Sequence[Plot]
    numbers: Table | None = None
    """Those of all panels, where they have none of their own."""


@dataclass(frozen=True)
class Example:
    """One row of the data."""

    place: str
    """Score, category and source, in one line."""
    prompt: str
    response: str


@dataclass(frozen=True)
class SideBySide:
    """Groups of examples in two columns: (heading, examples) each."""

    left: Sequence[tuple[str, Sequence[Example]]]
    right: Sequence[tuple[str, Sequence[Example]]]
    headings: tuple[str, str]


Block = Note | Facts | Code | Table | Figure | SideBySide


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    command: str
    """What makes its artifacts; shown where there are none."""
    blocks: Sequence[Block] = field(default_factory=list)


def cut(text: str, characters: int = 400) -> str:
    """Return the beginning of a text, and how much is missing."""
    return text if len(text) <= characters else f"{text[:characters]}… ({len(text) - characters:,} more characters)"


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """Return a number as the page shows it; a dash for none."""
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def brief(value: float | None) -> str:
    """Return a number of any size with three digits that matter."""
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def interval(estimate: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    """Return an estimate with its interval; a dash for none."""
    if estimate is None or low is None or high is None:
        return number(estimate, signed=signed)
    return f"{number(estimate, signed=signed)} [{number(low, signed=signed)}, {number(high, signed=signed)}]"


def render(template: str, **values: Any) -> str:
    """Return a template of this folder with its values; whatever is not `Markup` is masked, made printable and escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["kind"] = lambda block: type(block).__name__
    return environment


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) else printable(without_secrets(str(value)), keep="\n\t")
