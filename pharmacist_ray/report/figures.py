"""The page's figures, each from plain numbers. What a colour says, a marker, a line style or a label says too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from pharmacist_ray.report.scores import Histogram
from pharmacist_ray.report.svg import ACCENT, INK, LINE, MUTED, PAPER, label, panel, to_svg

LINES = 6
"""At most so many lines in a panel."""
_STYLES = (
    (ACCENT, "-", 2.0),
    (INK, "--", 1.4),
    (MUTED, ":", 2.0),
    (INK, "-.", 1.2),
    (MUTED, "-", 1.0),
    (MUTED, (0, (6, 3)), 1.2),
)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; None is not known."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Arm:
    """One line of the comparison: what is known of it by the name of a series."""

    name: str
    series: dict[str, Estimate]


@dataclass(frozen=True)
class Curve:
    """A mean over runs with their range, at the middles of bins of steps."""

    name: str
    steps: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Point:
    """One trial: where it lies, and what kind it is."""

    x: float
    y: Estimate
    front: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Step:
    """What a budget buys: (budget, value) pairs, each holding until the next."""

    name: str
    points: Sequence[tuple[float, float]]


def histogram(name: str, found: Histogram, description: str, cut: float | None = None) -> Markup:
    """Return the distribution of one score; kept rows are filled, the others hollow, and a line marks the cut.

    Args:
        name: The score.
        found: Its counts.
        description: The message in words.
        cut: The worst score kept.
    """
    with panel(name, 1.9 if found.kept is None else 2.3) as (figure, axes):
        axes.grid(axis="x", visible=False)
        axes.stairs(found.all, found.edges, fill=True, facecolor=LINE, edgecolor=MUTED, linewidth=1.0, label="dropped")
        if found.kept is not None:
            axes.stairs(found.kept, found.edges, fill=True, facecolor=ACCENT, edgecolor=ACCENT, label="kept")
            if cut is not None and found.edges[0] <= cut <= found.edges[-1]:
                axes.axvline(cut, color=INK, linewidth=1.2, linestyle="--", label=f"cut {cut:.3g}")
            _legend(figure, axes)
        axes.set_xlim(found.edges[0], found.edges[-1])
        axes.locator_params(nbins=5)
    return to_svg(figure, f"Distribution of the score {name}", description)


def dots(title: str, arms: Sequence[Arm], description: str, series: Sequence[str]) -> Markup:
    """Return dots with intervals, a line per arm and a mark per series, on a scale from 0 to 1.

    Args:
        title: Above the panel.
        arms: From top to bottom.
        description: The message in words.
        series: At most four names; the first is in the accent colour.
    """
    looks = (("o", ACCENT, ACCENT), ("o", ACCENT, PAPER), ("s", INK, INK), ("^", MUTED, PAPER))
    with panel(title, 1.0 + 0.5 * len(arms)) as (figure, axes):
        places = np.arange(len(arms), dtype=float)
        for at, (name, (marker, colour, fill)) in enumerate(zip(series, looks, strict=False)):
            offset = (0.0, 0.0, 0.22, 0.36)[at] - 0.16
            drawn = [(place + offset, arm.series[name]) for place, arm in zip(places, arms, strict=True) if name in arm.series]
            known = [(y, one) for y, one in drawn if one.value is not None]
            for y, one in known:
                if one.low is not None and one.high is not None:
                    axes.plot([one.low, one.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot(
                [one.value for _, one in known if one.value is not None],
                [y for y, _ in known],
                linestyle="none", marker=marker, markersize=5.5, color=colour, markerfacecolor=fill, label=name,
                zorder=3 - at % 2,
            )  # fmt: skip
        axes.set_yticks(places, [label(arm.name) for arm in arms])
        axes.set_ylim(max(len(arms), 1) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        _legend(figure, axes)
    return to_svg(figure, title, description)


def curves(title: str, lines: Sequence[Curve], description: str) -> Markup:
    """Return means over training steps with the range over runs as a band; at most `LINES` of them."""
    with panel(title, 2.5) as (figure, axes):
        for curve, (colour, style, width) in zip(lines, _STYLES, strict=False):
            axes.plot(curve.steps, curve.mean, color=colour, linestyle=style, linewidth=width, label=label(curve.name))
            if list(curve.low) != list(curve.high):
                axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
        axes.set_xlabel("optimiser step")
        axes.set_ylim(bottom=0)
        axes.locator_params(nbins=5)
        if len(lines) > 1:
            _legend(figure, axes)
    return to_svg(figure, title, description)


def staircase(title: str, lines: Sequence[Step], description: str, x: str, y: str) -> Markup:
    """Return what a budget buys as steps, from 0 to 1; at most `LINES` of them.

    Args:
        title: Above the panel.
        lines: The steps.
        description: The message in words.
        x: Label below.
        y: Label at the left, written above the axis.
    """
    end = max(line.points[-1][0] for line in lines) * 1.05
    with panel(title, 2.8) as (figure, axes):
        for line, (colour, style, width) in zip(lines, _STYLES, strict=False):
            budgets, values = zip(*line.points, (end, line.points[-1][1]), strict=True)
            axes.step(budgets, values, where="post", color=colour, linestyle=style, linewidth=width, label=label(line.name))
        axes.set_xlabel(label(x, 40))
        axes.text(0.0, 1.0, label(y, 40), transform=axes.transAxes, va="bottom", fontsize=10, color=MUTED)
        axes.set_title(label(title, 40), pad=18)
        axes.set_xlim(left=0)
        axes.set_ylim(-0.02, 1.02)
        axes.locator_params(nbins=5)
        if len(lines) > 1:
            _legend(figure, axes)
    return to_svg(figure, title, description)


def scatter(title: str, points: Sequence[Point], description: str, x: str, y: str, joined: bool = False) -> Markup:
    """Return trials as dots with intervals; those on the Pareto front are filled diamonds, the recommended one is ringed.

    Args:
        title: Above the panel.
        points: The trials.
        description: The message in words.
        x: Label below.
        y: Label at the left, written above the axis.
        joined: Join the points of the front by a line.
    """
    with panel(title, 3.0) as (figure, axes):
        kinds = (("trial", False, "o", MUTED, PAPER), ("Pareto front", True, "D", ACCENT, ACCENT))
        for name, front, marker, colour, fill in kinds:
            mine = sorted((one for one in points if one.front is front and one.y.value is not None), key=lambda one: one.x)
            for one in mine:
                if one.y.low is not None and one.y.high is not None:
                    axes.plot([one.x, one.x], [one.y.low, one.y.high], color=colour, linewidth=1.2, alpha=0.55)
            style = "-" if joined and front else "none"
            axes.plot(
                [one.x for one in mine],
                [one.y.value for one in mine if one.y.value is not None],
                linestyle=style, linewidth=1.0, marker=marker, markersize=5.5, color=colour, markerfacecolor=fill,
                label=name if mine else None, zorder=3 + front,
            )  # fmt: skip
        for one in points:
            if one.chosen and one.y.value is not None:
                axes.plot(
                    [one.x], [one.y.value], linestyle="none", marker="o", markersize=13, color=INK, markerfacecolor="none",
                    markeredgewidth=1.4, label="recommended", zorder=5,
                )  # fmt: skip
        axes.set_xlabel(label(x, 40))
        axes.text(0.0, 1.0, label(y, 40), transform=axes.transAxes, va="bottom", fontsize=10, color=MUTED)
        axes.set_title(label(title, 40), pad=18)
        axes.margins(0.08)
        axes.locator_params(nbins=5)
        known = [one.x for one in points]
        if known and min(known) > 0 and max(known) >= 50 * min(known):
            axes.set_xscale("log")
            values = sorted(set(known))
            axes.set_xticks(values if len(values) <= 5 else values[:: len(values) // 4])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _legend(figure, axes)
    return to_svg(figure, title, description)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        columns = max(1, min(len(names), 46 // (max(map(len, names)) + 5)))
        figure.legend(handles, names, loc="outside lower left", ncols=columns, columnspacing=1.2, handlelength=1.8)
