"""The section on a search: what its trials cost and were worth, which of them are best, and which one to take."""

from __future__ import annotations

import json
from typing import Any

from markupsafe import Markup

from pharmacist_ray.report.blocks import Block, Code, Figure, Note, Plot, Table, brief, cut, interval
from pharmacist_ray.report.figures import Estimate, Point, scatter
from pharmacist_ray.report.run_files import RunFiles, readable
from pharmacist_ray.storage import read_table

SHOWN = 50
"""At most so many trials in a table; all are in the figures."""
_PANELS = 6
_FIRST = ("selection.ratio", "selector.intensity")


def search(run: RunFiles) -> list[Block]:
    """Return harmful score against each varied number, the Pareto front, the trials, the failures and the recommendation."""
    file = run.root / "search" / "trials.parquet"
    if not file.is_file():
        return []
    with readable(file):
        trials = read_table(file).to_pylist()
    recommended = run.json("search", "recommendation.json") or {}
    finished = [trial for trial in trials if trial.get("status") == "finished" and trial.get("worst_hs") is not None]
    failed = [trial for trial in trials if trial.get("status") == "failed"]
    stopped = [trial for trial in trials if trial.get("status") == "stopped"]
    front = [trial for trial in finished if trial.get("front")]
    counts = f"{len(finished):,} finished, {len(failed):,} failed" + (f", {len(stopped):,} stopped early" if stopped else "")
    blocks: list[Block] = [
        Note(
            f"{len(trials):,} trials: {counts}, {len(front):,} on the Pareto front of worst harmful score, task accuracy, "
            "over-refusal and alignment time. The worst harmful score is the highest over the attacks."
        )
    ]
    if recommended:
        blocks.append(Note(f"Recommended: trial {recommended.get('trial')}. {recommended.get('reason', '')}"))
        blocks += [Code(str(recommended[key])) for key in ("command",) if recommended.get(key)]
        if recommended.get("config_path"):
            blocks.append(Note(f"Its configuration: {recommended['config_path']}"))
    if finished:
        chosen = recommended.get("trial")
        plots, left_out = _against_parameters(finished, chosen)
        if plots:
            text = "Worst harmful score against each number that was varied; bars are 95 % intervals."
            blocks.append(Figure(text + (f" {left_out} more are in the table." if left_out else ""), plots))
        text = "Pareto front: no other trial is better in one objective and as good in the others. Best is at the upper left."
        figure = Figure(text, [Plot(_front(finished, chosen))], _numbers(finished, "worst_hs", "task_accuracy"))
        blocks += [figure, _trials(front, finished)]
    if stopped:
        blocks.append(_stopped(stopped))
    if failed:
        rows = [(str(trial["trial"]), cut(str(trial.get("error") or "no message"), 300)) for trial in failed[:SHOWN]]
        caption = f"{len(failed):,} failed trials" + (f", the first {SHOWN}" if len(failed) > SHOWN else "")
        blocks.append(Table(caption, ("trial", "error"), rows, words=2, summary=caption))
    return blocks


def _against_parameters(trials: list[dict[str, Any]], chosen: object) -> tuple[list[Plot], int]:
    """Return a panel for each number that has several values, and how many had no room."""
    names = {name: [_value(trial, name) for trial in trials] for name in trials[0] if name.startswith("param.")}
    numbers = {
        name: [value if isinstance(value, int | float) and not isinstance(value, bool) else None for value in values]
        for name, values in names.items()
    }
    varied = [name for name, values in numbers.items() if len({value for value in values if value is not None}) > 1]
    varied.sort(key=lambda name: _FIRST.index(_key(name)) if _key(name) in _FIRST else len(_FIRST))
    plots = []
    for name in varied[:_PANELS]:
        pairs = [(value, trial) for value, trial in zip(numbers[name], trials, strict=True) if value is not None]
        points = [_point(value, _hs(trial), trial, chosen) for value, trial in pairs]
        best_value, best = min(pairs, key=lambda pair: (pair[1]["worst_hs"], pair[0]))
        text = (
            f"{len(points):,} trials: lowest worst harmful score {brief(best['worst_hs'])} at {_key(name)} = {brief(best_value)}."
        )
        drawing = scatter(f"harmful score and {_key(name)}", points, text, x=_key(name), y="worst harmful score")
        plots.append(Plot(drawing, text, _numbers([trial for _, trial in pairs], name, "worst_hs")))
    return plots, max(0, len(varied) - _PANELS)


def _numbers(trials: list[dict[str, Any]], x: str, y: str) -> Table:
    """Return the numbers behind a panel, those with the lowest harmful score first."""
    ordered = sorted(trials, key=lambda trial: trial["worst_hs"])[:SHOWN]
    rows = [(str(trial["trial"]), _cell(trial, x), _cell(trial, y)) for trial in ordered]
    more = f", {SHOWN} of {len(trials):,}" if len(trials) > SHOWN else ""
    names = [{"worst_hs": "worst HS", "task_accuracy": "task accuracy"}.get(name, _key(name)) for name in (x, y)]
    return Table(f"{names[1]} and {names[0]}{more}", ("trial", *names), rows, summary=f"Numbers: {names[1]} and {names[0]}")


def _cell(trial: dict[str, Any], name: str) -> str:
    if name.startswith("param."):
        return "–" if (value := _value(trial, name)) is None else str(value)
    return _text(trial, name)


def _front(trials: list[dict[str, Any]], chosen: object) -> Markup:
    points = [_point(trial["worst_hs"], _estimate(trial, "task_accuracy"), trial, chosen) for trial in trials]
    front = sorted((trial for trial in trials if trial.get("front")), key=lambda trial: trial["worst_hs"])
    text = "On the front: " + "; ".join(
        f"trial {trial['trial']} with worst harmful score {brief(trial['worst_hs'])} and task accuracy {brief(trial['task_accuracy'])}"
        for trial in front[:10]
    )
    return scatter("task accuracy and harmful score", points, f"{text}.", x="worst harmful score", y="task accuracy", joined=True)


def _trials(front: list[dict[str, Any]], finished: list[dict[str, Any]]) -> Table:
    ordered = sorted(finished, key=lambda trial: (trial not in front, trial["worst_hs"]))[:SHOWN]
    varied = [
        name for name in finished[0] if name.startswith("param.") and len({trial.get(name) for trial in finished}) > 1
    ]  # what all trials share is in the configuration
    rows = [
        [
            str(trial["trial"]) + (" (front)" if trial.get("front") else ""),
            *(_cell(trial, name) for name in varied),
            _text(trial, "worst_hs"),
            brief(trial.get("mean_hs")),
            _text(trial, "task_accuracy"),
            _text(trial, "over_refusal"),
            brief(trial.get("align_seconds")),
            _attacks(trial),
        ]
        for trial in ordered
    ]
    header = ["trial", *map(_key, varied), "worst HS", "mean HS", "task accuracy", "over-refusal", "align s", "HS by attack"]
    more = f", {SHOWN} of {len(finished):,}" if len(finished) > SHOWN else ""
    return Table(f"Finished trials, those on the front first{more}", header, rows)


def _stopped(trials: list[dict[str, Any]]) -> Table:
    varied = [name for name in trials[0] if name.startswith("param.")]
    ordered = sorted(trials, key=lambda trial: (trial["early_hs"], trial["trial"]))[:SHOWN]
    rows = [[str(trial["trial"]), *(_cell(trial, name) for name in varied), brief(trial["early_hs"])] for trial in ordered]
    more = f", {SHOWN} of {len(trials):,}" if len(trials) > SHOWN else ""
    caption = f"Trials that were stopped after an early look at their harmful score; they stand for no choice{more}"
    return Table(caption, ["trial", *map(_key, varied), "early HS"], rows)


def _key(name: str) -> str:
    return name.removeprefix("param.")


def _value(trial: dict[str, Any], name: str) -> Any:
    """Return a parameter's value, as text if it is not JSON."""
    try:
        return json.loads(trial[name]) if trial.get(name) is not None else None
    except ValueError:
        return trial[name]


def _estimate(trial: dict[str, Any], name: str) -> Estimate:
    return Estimate(trial.get(name), trial.get(f"{name}_low"), trial.get(f"{name}_high"))


def _hs(trial: dict[str, Any]) -> Estimate:
    return _estimate(trial, "worst_hs")


def _text(trial: dict[str, Any], name: str) -> str:
    one = _estimate(trial, name)
    return interval(one.value, one.low, one.high)


def _point(x: float, y: Estimate, trial: dict[str, Any], chosen: object) -> Point:
    return Point(float(x), y, bool(trial.get("front")), trial["trial"] == chosen)


def _attacks(trial: dict[str, Any]) -> str:
    try:
        found = json.loads(trial.get("attacks") or "{}")
    except ValueError:
        return "–"
    return ", ".join(f"{name} {brief(value)}" for name, value in found.items()) if isinstance(found, dict) else "–"
