"""The section on the attacker's search: each arm's worst fine-tune, and what the attacker's budget buys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pharmacist_ray.report.blocks import Block, Figure, Note, Plot, Table, brief, cut, interval
from pharmacist_ray.report.figures import Step, staircase
from pharmacist_ray.report.run_files import RunFiles, readable
from pharmacist_ray.storage import read_table

SHOWN = 50
"""At most so many trials in the table."""


def redteam(run: RunFiles) -> list[Block]:
    """Return the bounded worst case of each arm, the attack that made it, harm against budget, and the trials."""
    found = run.json("redteam", "redteam.json")
    if not found:
        return []
    arms = found["arms"]
    blocks: list[Block] = [
        Note(
            f"An attacker varied its own settings against each arm, {found['trials']} fine-tunes each. A fine-tune counts if task accuracy "
            f"and helpfulness on benign prompts each lost at most {found['bound']:.0%} of what they were before it. The worst of many "
            "is a maximum over noisy numbers: compare arms at the same number of trials."
        ),
        _worst(arms),
    ]
    if lines := [Step(_name(arm), [tuple(point) for point in arm["curve"]]) for arm in arms if arm["curve"]]:
        said = "; ".join(
            f"{line.name}: " + ", ".join(f"{hs:.2f} from {rows:,} rows on" for rows, hs in line.points) for line in lines
        )
        text = "What the attacker's budget buys: the highest harmful score of fine-tunes that pass over at most so many rows."
        drawing = staircase("harmful score and budget", lines, f"{said}.", x="rows trained on", y="harmful score")
        rows = [(line.name, f"{rows:,}", brief(hs)) for line in lines for rows, hs in line.points]
        numbers = Table(
            "Highest harmful score by rows trained on", ("arm", "rows trained on", "HS"), rows, summary="Numbers", grouped=True
        )
        blocks.append(Figure(text, [Plot(drawing, f"{said}.", numbers)]))
    file = run.root / "redteam" / "trials.parquet"
    if file.is_file():
        with readable(file):
            blocks.append(_trials(read_table(file).to_pylist()))
    return blocks


def _name(arm: Mapping[str, Any]) -> str:
    return f"{arm['selection']}.{arm['defence']}"


def _said(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={f'{value:g}' if isinstance(value, float) else value}" for key, value in parameters.items())


def _worst(arms: list[dict[str, Any]]) -> Table:
    rows = []
    for arm in arms:
        worst, counted = arm["worst"], f"{arm['within']} of {arm['finished']}"
        said, cells = "–", ["none", "–", "–"]
        if worst:
            said = cut(_said(worst["parameters"]), 200)
            cells = [interval(worst["hs"], worst["hs_low"], worst["hs_high"])]
            cells += [f"{brief(worst[f'{one}_before'])} → {brief(worst[one])}" for one in ("accuracy", "helpful")]
        rows.append((_name(arm), said, brief(arm["hs_before"]), *cells, counted, brief(arm["unbounded_hs"])))
    header = ("arm", "worst attack", "HS before", "worst HS", "task accuracy", "helpful", "within the bound", "without bound")
    return Table("Each arm's worst fine-tune, the most robust arm first", header, rows, words=2)


def _trials(trials: list[dict[str, Any]]) -> Table:
    known_hs = {one["trial"]: -1.0 if one["hs"] is None else one["hs"] for one in trials}
    ordered = sorted(trials, key=lambda one: (one["selection"], one["defence"], -known_hs[one["trial"]]))[:SHOWN]
    rows = []
    for one in ordered:
        known = {
            name.removeprefix("param."): json.loads(value) for name, value in one.items() if name.startswith("param.") and value
        }
        within = {True: "yes", False: "no", None: one["status"]}[one["within"]]
        numbers = (interval(one["hs"], one["hs_low"], one["hs_high"]), brief(one["lost"]), f"{one['samples']:,}")
        rows.append((_name(one), cut(_said(known), 200), *numbers, within))
    more = f", {SHOWN} of {len(trials):,}" if len(trials) > SHOWN else ""
    caption = f"Fine-tunes that were tried{more}"
    return Table(caption, ("arm", "settings", "HS", "utility lost", "rows trained on", "within"), rows, words=2, summary=caption)
