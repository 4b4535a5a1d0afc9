from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from pharmacist_ray.report.figures import LINES, Arm, Curve, Estimate, Point, curves, dots, histogram, scatter
from pharmacist_ray.report.scores import BINS, Histogram

HOSTILE = "<b>$x^{$\x1b\u202e</title>&"


def a_histogram(kept=True):
    found = Histogram(low=0.0, high=1.0, rows=BINS * 3, sample=[np.linspace(0, 1, 500)])
    found.all = np.full(BINS, 3)
    found.kept = np.arange(BINS) // 20 if kept else None
    return found


def draw(name, **more):
    points = [
        Point(0.05, Estimate(0.2, 0.1, 0.3), front=True, chosen=True),
        Point(5.0, Estimate(0.4)),
        Point(0.5, Estimate(None)),
    ]
    return {
        "histogram": lambda: histogram(f"{HOSTILE}score", a_histogram(), f"a message {HOSTILE}", cut=0.5125),
        "dots": lambda: dots(
            f"{HOSTILE}attack",
            [Arm(f"{HOSTILE}arm", {"HS after": Estimate(0.3, 0.2, 0.4), "HS before": Estimate(0.1)}), Arm("other", {})],
            "a message", ("HS after", "HS before", "task accuracy"),
        ),
        "curves": lambda: curves("loss", [Curve(f"{HOSTILE}{n}", [1, 2], [2, 1], [1, 1], [3, 1]) for n in range(9)], "a message"),
        "scatter": lambda: scatter(f"{HOSTILE}front", points, "a message", x=f"{HOSTILE}x", y="y", joined=True),
    }[name]()  # fmt: skip


ALL = pytest.mark.parametrize("name", ["histogram", "dots", "curves", "scatter"])


@ALL
def test_a_figure_says_its_message_in_words_and_takes_its_colours_from_the_page(name):
    text = str(draw(name))
    root = ET.fromstring(text)
    assert root.tag == "svg"
    assert root.attrib["role"] == "img"
    title, description = (root.find(f"*[@id='{id}']") for id in root.attrib["aria-labelledby"].split())
    assert (title.tag, description.tag) == ("title", "desc")
    assert title.text
    assert description.text.startswith("a message")
    assert not re.search(r"(fill|stroke): ?#(?!00000)", text)
    assert "#00000" not in text
    assert "var(--accent)" in text
    assert "var(--ink)" in text
    assert "font-family" not in text
    assert not {element.tag for element in root.iter()} & {"style", "script", "metadata", "image", "foreignObject", "a"}
    assert "http" not in text
    assert not re.search(r' d="[^"]*\.\d\d', text)  # a tenth of a pixel is enough


@ALL
def test_names_from_data_are_text_and_nothing_else(name):
    text = str(draw(name))
    assert "<b>" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "&lt;b&gt;$x^{$" in text


@ALL
def test_ids_are_used_unique_and_differ_between_figures(name):
    def ids(text):
        return re.findall(r' id="([^"]+)"', text)

    first, other = str(draw(name)), str(histogram("another", a_histogram(kept=False), "words"))
    assert len(set(ids(first))) == len(ids(first))
    assert not set(ids(first)) & set(ids(other))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', first))
    assert used <= set(ids(first))
    assert str(draw(name)) == first  # the same numbers give the same bytes


def texts(svg):
    return [element.text for element in ET.fromstring(str(svg)).iter("text")]


def test_kept_and_dropped_differ_by_more_than_colour_and_the_cut_is_told_exactly():
    shown = texts(draw("histogram"))
    assert {"kept", "dropped", "cut 0.512"} <= set(shown)
    assert "kept" not in texts(histogram("x", a_histogram(kept=False), "words"))


def test_series_have_their_own_marks_and_lines_their_own_styles():
    svg = str(draw("dots"))
    shapes = re.findall(r'<path id="m[^>]*d="([^"]+)"', svg) or re.findall(r'<path [^>]*id="[^"]*" d="([^"]+)"', svg)
    assert len(set(shapes)) >= 2
    assert "var(--paper)" in svg  # hollow: before the attack
    drawn = str(draw("curves"))
    assert len(set(re.findall(r"stroke-dasharray: ([\d.,]+)", drawn))) >= 3
    assert sum("$x^{$" in text for text in texts(drawn)) == LINES


def test_numbers_in_words_are_not_rounded_away():
    shown = texts(draw("scatter"))
    assert "0.05" in shown  # on a log scale, for the values span a factor of a hundred
    assert {"trial", "Pareto front", "recommended"} <= set(shown)
    assert not any("mathdefault" in text for text in shown)


def test_nothing_to_draw_is_still_a_figure():
    assert "<svg" in scatter("none", [], "no trial", "x", "y")
    assert "<svg" in curves("none", [], "no run")
    assert "<svg" in dots("none", [], "no arm", ("HS after",))
