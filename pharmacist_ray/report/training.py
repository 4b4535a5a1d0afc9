"""The section on training: loss and gradient norm over the optimiser steps, as means over the runs of an arm."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pharmacist_ray.report.blocks import Block, Figure, Plot, Table, brief
from pharmacist_ray.report.figures import LINES, Curve, curves
from pharmacist_ray.report.run_files import RunFiles, readable
from pharmacist_ray.storage import StoragePath

POINTS = 40
"""At most so many points in a line; each is a mean over the same number of steps."""
METRICS = {"loss": "loss", "grad_norm": "gradient norm"}

_NAME = re.compile(r"(?P<arm>[^.]+)(?:\.(?P<defence>.+?))?\.s\d+(?:\.(?P<attack>.+))?")
_Binned = NDArray[np.float64]


def training(run: RunFiles) -> list[Block]:
    """Return a figure a kind of training: warm-up, reference, alignment, and each attack."""
    blocks: list[Block] = []
    for name in ("warmup", "reference"):
        file = run.root / "fit" / name / "history.jsonl"
        if run.manifest("fit") and file.is_file():
            blocks.append(
                _figure({"warmup": "Warm-up of the selector", "reference": "The loss gap's reference"}[name], {name: [file]})
            )
    cells = _cells(run)
    several = len({cell.defence for cell in cells}) > 1
    first = [arm for arm in (run.main_arm, "all", "random") if arm]
    for attack in dict.fromkeys(cell.attack for cell in cells):
        arms: dict[tuple[str, str], list[StoragePath]] = {}
        for cell in cells:
            if cell.attack == attack:
                arms.setdefault((cell.arm, cell.defence), []).append(cell.history)
        order = sorted(arms, key=lambda arm: (first.index(arm[0]) if arm[0] in first else len(first), arm))
        title = "Alignment" if attack is None else f"Attack {attack}"
        blocks.append(_figure(title, {f"{arm} · {defence}" if several else arm: arms[arm, defence] for arm, defence in order}))
    return blocks


@dataclass(frozen=True)
class _Cell:
    """A trained model: `pipeline.run.Cell` as its folder's name tells it."""

    arm: str
    """The selection; ``random`` for each of its draws."""
    defence: str
    attack: str | None
    history: StoragePath


def _cells(run: RunFiles) -> list[_Cell]:
    """Return the trained models, of each name the one that was trained with the run's settings, else the newest.

    A run directory keeps models that were trained with other settings or on earlier selections; they are not shown.
    """
    config = run.config
    selections = {one.get("fingerprint") for one in run.made("selections").values()}
    aligned = {folder: one for folder, one in run.made("align").items() if one.get("inputs", {}).get("selection") in selections}
    known = {one.get("fingerprint") for one in aligned.values()}
    attacked = {folder: one for folder, one in run.made("attack").items() if one.get("inputs", {}).get("aligned") in known}
    wanted = {"align": [config.get("alignment", {}).get("train")], "attack": config.get("attacks", [])}
    best: dict[tuple[str, str], tuple[bool, str, str]] = {}
    for stage, made in (("align", aligned), ("attack", attacked)):
        for folder, manifest in made.items():
            settings = manifest.get("config", {})
            mine = settings.get("alignment", {}).get("train") if stage == "align" else settings.get("attack")
            rank = (mine is not None and mine in wanted[stage], str(manifest.get("made_at", "")), folder)
            key = stage, folder.rpartition("-")[0]
            best[key] = max(best.get(key, rank), rank)
    cells = []
    for (stage, name), (_, _, folder) in best.items():
        file = run.root / stage / folder / "run" / "history.jsonl"
        parts = _NAME.fullmatch(name)
        if parts is not None and file.is_file():
            arm = "random" if parts["arm"].startswith("random_") else parts["arm"]
            cells.append(_Cell(arm, parts["defence"] or "", parts["attack"], file))
    return cells


def _figure(title: str, arms: Mapping[str, Iterable[StoragePath]]) -> Figure:
    histories = {arm: [_history(file) for file in files] for arm, files in arms.items()}
    last = max((int(one[:, 0].max()) for runs in histories.values() for one in runs if len(one)), default=1)
    width = -(-last // POINTS) or 1
    edges = 0.5 + np.minimum(width * np.arange(-(-last // width) + 1, dtype=np.float64), last)
    middles = (edges[:-1] + edges[1:]) / 2
    plots, columns = [], {}
    for at, (metric, words) in enumerate(METRICS.items(), 1):
        lines = []
        for arm, runs in histories.items():
            binned = np.stack([_binned(one[:, 0], one[:, at], edges) for one in runs])
            known = ~np.isnan(binned).all(axis=0)
            columns[arm, metric] = binned
            if known.any():
                inside = binned[:, known]
                ranges = [np.nanmean(inside, 0), np.nanmin(inside, 0), np.nanmax(inside, 0)]
                lines.append(Curve(arm, middles[known].tolist(), *(values.tolist() for values in ranges)))
        message = f"{title}, {words}: " + "; ".join(
            f"{curve.name} from {brief(curve.mean[0])} to {brief(curve.mean[-1])}" for curve in lines
        )
        plots.append(Plot(curves(f"{title}: {words}", lines, f"{message} in {last} steps.")))
    count = sum(map(len, histories.values()))
    caption = (
        f"{title}: {count} runs, the mean of each arm and the range over its runs as a band."
        if count > 1
        else f"{title}: one run."
    )
    if len(arms) > LINES:
        caption += f" {LINES} of {len(arms)} arms are drawn; the table has all."
    return Figure(caption, plots, _table(title, edges, columns))


def _history(file: StoragePath) -> NDArray[np.float64]:
    """Return step, loss and gradient norm, (n, 3); NaN where a number is missing or not finite."""
    rows: list[tuple[float, ...]] = []
    with readable(file), file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                one = json.loads(line)
                rows.append((float(one["step"]), *(_finite(one.get(metric)) for metric in METRICS)))
    return np.array(rows, np.float64).reshape(-1, 1 + len(METRICS))


def _finite(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _binned(steps: _Binned, values: _Binned, edges: _Binned) -> _Binned:
    """Return the mean of the values in each bin of steps, (bins,); NaN where there are none."""
    known = ~np.isnan(values)
    counts = np.histogram(steps[known], edges)[0]
    sums = np.histogram(steps[known], edges, weights=values[known])[0]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _table(title: str, edges: _Binned, columns: Mapping[tuple[str, str], _Binned]) -> Table:
    rows = []
    for place in range(len(edges) - 1):
        first, last = int(edges[place] + 0.5), int(edges[place + 1] - 0.5)
        cells = [binned[:, place][~np.isnan(binned[:, place])] for binned in columns.values()]
        means = [brief(float(values.mean())) if len(values) else "–" for values in cells]
        rows.append([str(first) if first >= last else f"{first}–{last}", *means])
    header = ["steps", *(f"{arm}, {METRICS[metric]}" for arm, metric in columns)]
    return Table(f"{title}: means over runs", header, rows, summary=f"Numbers: {title.lower()}")
