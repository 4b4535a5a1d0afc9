"""A matplotlib figure as inline SVG that takes its colours and font from the page.

Figures are drawn in five stand-in colours which become CSS variables, so one drawing serves light, dark and print.
"""

from __future__ import annotations

import hashlib
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pharmacist_ray.data.printable import printable, without_secrets

INK, MUTED, LINE, ACCENT, PAPER = (f"#00000{number}" for number in range(1, 6))
"""Stand-ins for text, secondary lines, rules, the one accent colour, and the background."""

_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", PAPER: "--paper"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and scales with the page's font
    "text.parse_math": False,  # a name with two dollar signs is a name
    "axes.unicode_minus": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 11,
}
_WIDTH = 4.7
"""Inches of 72 units: a panel that fits a narrow telephone with its letters at their natural size."""


@contextmanager
def panel(title: str, height: float = 2.2) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure of one panel in the page's style to draw on, and finish it before the block ends.

    Args:
        title: Above the panel; what does not fit is cut.
        height: Inches.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(label(title, 40))
        yield figure, axes


def label(text: str, characters: int = 22) -> str:
    """Return text for a drawing: printable, on one line, cut."""
    line = printable(without_secrets(text))
    return line if len(line) <= characters else f"{line[: characters - 1]}…"


def to_svg(figure: Figure, title: str, description: str) -> Markup:
    """Return a figure as ``<svg role="img">`` with its message in words.

    Args:
        figure: Drawn within `panel`.
        title: The accessible name.
        description: What the figure shows, as a sentence with its main numbers.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "pharmacist"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    salt = hashlib.blake2b(f"{title}\0{description}".encode(errors="replace") + buffer.getvalue(), digest_size=4).hexdigest()
    _tidy(root, salt)
    width, height = (round(float(size)) for size in root.attrib["viewBox"].split()[2:])
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "width": str(width),
        "height": str(height),
        "role": "img",
        "aria-labelledby": f"t{salt} d{salt}",
    }
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(tag, id=f"{tag[0]}{salt}")
        element.text = label(text, 2000)
        root.insert(place, element)
    text = ET.tostring(root, encoding="unicode")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(text)


def _tidy(root: ET.Element, salt: str) -> None:
    """Drop metadata, style sheets, fonts and idle ids; make the others unique on the page, and names plain HTML."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    links = {text for element in root.iter() for value in element.attrib.values() for text in re.findall(r"#([\w.-]+)", value)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = element.text if element.tag == "text" else None
        element.tail = None
        attributes = {}
        for name, value in element.attrib.items():
            if name == "id" and value not in links:
                continue
            value = f"{value}-{salt}" if name == "id" else re.sub(r"^#([\w.-]+)$", rf"#\1-{salt}", value)
            value = re.sub(r"url\(#([\w.-]+)\)", rf"url(#\1-{salt})", value)
            value = re.sub(r"font-family:[^;]*;? ?|font: ?[^;]*;", "", value) if name == "style" else " ".join(value.split())
            if name in ("d", "x", "y", "width", "height", "transform"):  # a tenth of a pixel will do
                value = re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value)
            attributes[name.rpartition("}")[2]] = value
        element.attrib = attributes
