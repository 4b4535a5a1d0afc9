"""Pictures of the results: each is drawn from a file in ``docs/results``, and says in its description what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

METRICS = {
    "harmful_score": "HS after",
    "accuracy_correct": "task accuracy",
    "over_refusal": "over-refusal",
    "helpfulness": "helpful on benign",
}
"""Metric → heading. A harmful score never stands without the others: a model that refuses everything has none."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pharmacist",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
GROUPS = ("covered", "uncovered", "rare")
"""What is asked for, by what the trusted rows say of it."""
SHOWN = ("oracle", "rank_sum", "calibrated", "tov", "loss_gap", "pharmacist", "keyword", "trusted", "random", "all")
"""Arms in README's table and in the curves: with every one of them nobody would see anything. The page has all."""
MARKERS, LINES = "os^Dv<>PX*hd", ("-", "--", ":", "-.")

Row = dict[str, Any]


def draw(name: str, result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what there is to see of a result, and return the SVG files.

    Args:
        name: The result's; its pictures are called after it.
        result: The content of its file.
        folder: Gets the pictures.
    """
    written = []
    with matplotlib.rc_context(STYLE):
        for ending, (title, figure, said) in PICTURES.get(result["kind"], lambda _: {})(result).items():
            written.append(folder / f"{name}{ending}.svg")
            about = {"Date": None, "Title": title, "Description": said}
            figure.savefig(written[-1], format="svg", facecolor="white", metadata=about)
    return written


def words(result: dict[str, Any]) -> str:
    """Return a comparison in words, for who does not see its picture."""
    said = (
        f"{row['selection']} by {row['defence']} after {row['attack']}: "
        + ", ".join(f"{heading} {interval(row[name])}" for name, heading in METRICS.items())
        for row in result["rows"]
    )
    return "; ".join(said) + "."


def comparison(result: dict[str, Any]) -> dict[str, tuple[str, Figure, str]]:
    """Return a panel a metric, a line an arm, with intervals, over the attacks."""
    attacks = [one["name"] for one in result["attacks"]]
    arms = list(dict.fromkeys((row["selection"], row["defence"]) for row in result["rows"]))
    several = len({defence for _, defence in arms}) > 1
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    shown = {
        "harmful_score": "harmful score (low is good)",
        "accuracy_correct": "task accuracy",
        "helpfulness": "helpful on benign",
    }
    for axes, (metric, title) in zip(figure.subplots(1, 3, sharey=True), shown.items(), strict=True):
        for number, arm in enumerate(arms):
            rows = [row for row in result["rows"] if (row["selection"], row["defence"]) == arm]
            places = [attacks.index(row["attack"]) + 0.6 / len(arms) * (number - (len(arms) - 1) / 2) for row in rows]
            _line(axes, places, [row[metric] for row in rows], number, " · ".join(arm) if several else arm[0])
        axes.set_xticks(range(len(attacks)), attacks)
        _finish(axes, title, "attack")
    _legend(figure, axes)
    return {"": ("After the attack", figure, words(result))}


def evidence(result: dict[str, Any]) -> dict[str, tuple[str, Figure, str]]:
    """Return what each arm closes of the gap, by what was asked; how that hangs on the noise, and on the attack's strength."""
    noises = sorted({row["noise"] for row in result["rows"]})
    found = {noise: {row["selection"]: row for row in result["rows"] if row["noise"] == noise} for noise in noises}
    noisiest = found[noises[-1]]
    drawn = {"": ("What each arm is worth", *_arms(noisiest))}
    if len(noises) > 1:
        drawn["-noise"] = ("By the share of broken candidates", *_by_noise(found))
    strengths = sorted({key for row in noisiest.values() for key in row if key.startswith("hidden ")})
    if len(strengths) > 1:
        drawn["-strength"] = ("By the strength of the attack", *_by_strength(noisiest, strengths))
    return drawn


def _arms(rows: dict[str, Row]) -> tuple[Figure, str]:
    ranked = sorted((arm for arm in rows if rows[arm].get("gap_closed")), key=lambda arm: rows[arm]["gap_closed"][0])
    figure = Figure(figsize=(9.6, 0.27 * (len(ranked) + 2) + 1.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, arm in enumerate(ranked):
        middle, low, high = rows[arm]["gap_closed"]
        left.errorbar(middle, place, xerr=[[middle - low], [high - middle]], marker="o", capsize=2, color="C0")
    left.set_yticks(range(len(ranked)), ranked)
    left.set_xlim(-1.05, 1.3)
    for level in (0, 1):
        left.axvline(level, color="black", linewidth=0.8, linestyle=":")
    left.set_title("gap closed (0 is random, 1 the oracle)", loc="left", fontsize=10)
    everyone = ["random", *ranked, "oracle"]
    for number, group in enumerate(GROUPS):
        right.plot(
            [rows[arm][group][0] for arm in everyone], range(len(everyone)), MARKERS[number], label=group, color=f"C{number}"
        )
    right.set_yticks(range(len(everyone)), everyone)
    right.set_xlim(-0.03, 1.03)
    right.set_title("harmful score (low is good)", loc="left", fontsize=10)
    right.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08), handletextpad=0.2, columnspacing=1.2)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    said = (
        f"{arm}: gap closed {interval(rows[arm].get('gap_closed') or [None] * 3)}, "
        + ", ".join(f"HS {group} {interval(rows[arm][group])}" for group in GROUPS)
        for arm in reversed(everyone)
    )
    return figure, "; ".join(said) + "."


def _by_noise(found: dict[float, dict[str, Row]]) -> tuple[Figure, str]:
    noises = list(found)
    arms = [arm for arm in found[noises[-1]] if all(arm in rows for rows in found.values())]
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    shown = {"hidden": "harmful score, uncovered and rare (low is good)", "helpful": "helpful on benign"}
    for axes, (metric, title) in zip(figure.subplots(1, 2, sharey=True), shown.items(), strict=True):
        for number, arm in enumerate(arms):
            places = [place + 0.6 / len(arms) * (number - (len(arms) - 1) / 2) for place in range(len(noises))]
            _line(axes, places, [found[noise][arm][metric] for noise in noises], number, arm)
        axes.set_xticks(range(len(noises)), [f"{noise:.0%}" for noise in noises])
        _finish(axes, title, "candidates that are broken")
    _legend(figure, axes)
    said = (
        f"{arm} at {noise:.0%}: HS uncovered, rare {interval(found[noise][arm]['hidden'])}, "
        f"helpful {interval(found[noise][arm]['helpful'])}"
        for arm in arms
        for noise in noises
    )
    return figure, "; ".join(said) + "."


def _by_strength(rows: dict[str, Row], strengths: Sequence[str]) -> tuple[Figure, str]:
    ranked = sorted((arm for arm in SHOWN if rows.get(arm, {}).get("hidden")), key=lambda arm: rows[arm]["hidden"][0])
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(ranked):  # without intervals, which would hide each other; the description has them
        there = [(place, rows[arm][key][0]) for place, key in enumerate(strengths) if rows[arm].get(key)]
        axes.plot(
            *zip(*there, strict=True), marker=MARKERS[number], linestyle=LINES[number % len(LINES)], linewidth=1.3, label=arm
        )
    axes.set_xticks(range(len(strengths)), [key.removeprefix("hidden ") for key in strengths])
    _finish(axes, "harmful score, uncovered and rare (low is good)", "attack")
    _legend(figure, axes)
    said = (
        f"{arm} after {key.removeprefix('hidden ')}: HS uncovered, rare {interval(rows[arm][key])}"
        for arm in ranked
        for key in strengths
        if rows[arm].get(key)
    )
    return figure, "; ".join(said) + "."


def peers(result: dict[str, Any]) -> dict[str, tuple[str, Figure, str]]:
    """Return what each method costs over a forward pass, a mark a load."""
    cost: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        load = f"{row['shape']}, {row['weights']}, {row['length']} tokens"
        cost.setdefault(row["method"], {})[load] = row["ratio"]
    ranked = sorted(
        (method for method in cost if method != "forward"), key=lambda method: max(cost[method].values()), reverse=True
    )
    figure = Figure(figsize=(9.6, 0.27 * len(ranked) + 1.3), layout="constrained")
    axes = figure.subplots()
    for number, load in enumerate(dict.fromkeys(load for method in ranked for load in cost[method])):
        there = [(cost[method][load], place) for place, method in enumerate(ranked) if load in cost[method]]
        axes.plot(*zip(*there, strict=True), MARKERS[number], label=load, color=f"C{number}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(ranked)), ranked)
    axes.set_title("cost of a score for every row, over a forward pass", loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="upper right")
    said = (
        f"{method}: " + ", ".join(f"{ratio:.2f} at {load}" for load, ratio in cost[method].items()) for method in reversed(ranked)
    )
    return {"": ("What a score for every row costs", figure, "; ".join(said) + ".")}


def growth(result: dict[str, Any]) -> dict[str, tuple[str, Figure, str]]:
    """Return the CPU seconds of each stage and the memory of its largest process, over the number of rows."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    stages = list(dict.fromkeys(row["stage"] for row in result["rows"]))
    spent, held = figure.subplots(1, 2)
    for number, stage in enumerate(stages):
        rows = [row for row in result["rows"] if row["stage"] == stage]
        how = {"marker": MARKERS[number], "linestyle": LINES[number % len(LINES)], "label": stage}
        places = [row["rows"] for row in rows]
        spent.plot(places, [row["cpu_seconds"] for row in rows], **how)
        held.plot(places, [max(row["driver_mib"], row["worker_mib"]) for row in rows], **how)
    for axes, title in ((spent, "CPU seconds"), (held, "private memory of the largest process, MiB")):
        axes.set_xscale("log")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("rows")
        axes.grid(axis="y", alpha=0.3)
    spent.set_yscale("log", base=2)  # of which more than one label is in sight
    spent.yaxis.set_major_formatter("{x:g}")
    held.margins(y=0.1)
    held.set_ylim(bottom=0)
    spent.legend(frameon=False)
    said = (
        f"{row['stage']} of {row['rows']:,} rows: {row['cpu_seconds']:.0f} CPU s, driver {row['driver_mib']:.0f} MiB, "
        f"largest worker {row['worker_mib']:.0f} MiB"
        for row in result["rows"]
    )
    return {"": ("How curation grows with the rows", figure, "; ".join(said) + ".")}


def _line(axes: Any, places: Sequence[float], values: Sequence[Sequence[float]], number: int, label: str) -> None:
    middle, low, high = zip(*values, strict=True)
    axes.errorbar(
        places,
        middle,
        yerr=[[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]],
        marker=MARKERS[number % len(MARKERS)], linestyle=LINES[number % len(LINES)], capsize=2, linewidth=1.3, label=label,
    )  # fmt: skip


def _finish(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(below)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", alpha=0.3)


def _legend(figure: Figure, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower left", ncols=5, frameon=False, title="aligned on", title_fontsize=10, alignment="left"
    )


def number(value: float | None) -> str:
    """Return a share as text."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"  # no minus before a zero


def interval(value: Sequence[float | None]) -> str:
    """Return an estimate with its interval as text."""
    return "–" if value[0] is None else f"{number(value[0])} [{number(value[1])}, {number(value[2])}]"


PICTURES = {"comparison": comparison, "evidence": evidence, "peers": peers, "growth": growth}
"""Kind of a result → what makes its pictures: ending of the file's name → title, figure, and the same in words."""
