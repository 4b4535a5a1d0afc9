"""The section that compares: what each selection was worth, before and after each attack."""

from __future__ import annotations

from typing import Any

from pharmacist_ray.report.blocks import Block, Figure, Note, Plot, Table, interval, number
from pharmacist_ray.report.figures import Arm, Estimate, dots
from pharmacist_ray.report.run_files import RunFiles
from pharmacist_ray.report.table import COLUMNS

NOTE = (
    "Shares from 0 to 1 with 95 % intervals of a bootstrap over training runs and prompts, which are too narrow with few runs. "
    "Read a whole row: a harmful score (HS) means nothing without task accuracy and helpfulness, for a model that refuses "
    "everything has none. Helpful on benign = 1 − over-refusal − answers beside the point."
)
_SERIES = ("HS after", "HS before", "task accuracy", "helpful on benign")


def comparison(run: RunFiles) -> list[Block]:
    """Return the table of all arms and attacks, a panel an attack, and the differences to the baseline arms."""
    records = run.json("evaluation", "table.json") if run.manifest("evaluation") else None
    if not records:
        return []
    several = len({row["defence"] for row in records}) > 1
    before = {(row["selection"], row["defence"]): row["metrics"]["harmful_score"] for row in records if row["attack"] is None}
    attacks = list(dict.fromkeys(row["attack"] for row in records if row["attack"] is not None)) or [None]
    ordered = [row for attack in attacks for row in records if row["attack"] == attack]
    defence = ["defence"] if several else []
    header = ["attack", "aligned on", *defence, "runs", "rows", "align s", "HS before", *COLUMNS.values()]
    body = [
        [
            row["attack"] or "none",
            row["selection"],
            *(row[name] for name in defence),
            str(row["runs"]),
            f"{row['kept']:,}",
            f"{row['align_seconds']:.1f}",
            number(_known(before, row).get("estimate")),
            *(_text(row["metrics"].get(name, {})) for name in COLUMNS),
        ]
        for row in ordered
    ]
    plots = []
    for attack in attacks:
        rows = [row for row in ordered if row["attack"] == attack]
        arms = [_arm(row, _known(before, row), several) for row in rows]
        title = f"attack: {attack}" if attack else "not attacked"
        words = "; ".join(_words(arm) for arm in arms)
        numbers = [(arm.name, *(_one(arm.series.get(name, Estimate(None))) for name in _SERIES)) for arm in arms]
        table = Table(title, ("aligned on", *_SERIES), numbers, summary=f"Numbers: {title}")
        plots.append(Plot(dots(title, arms, f"{words}.", _SERIES), numbers=table))
    blocks: list[Block] = [
        Note(NOTE),
        Table("What each selection was worth" + _defended(records), header, body, words=2 + several, grouped=True),
        Figure("Harmful score (lower is better), task accuracy and helpfulness (higher is better) on one scale.", plots),
    ]
    if differences := _differences(ordered, several):
        names = ["attack", "arm", "minus", "HS after", "refuses well", "task accuracy", "helpful on benign"]
        blocks.append(
            Table(
                "Arm minus baseline, on the same prompts",
                names,
                differences,
                words=3,
                summary="Differences to the baseline arms",
                grouped=True,
            )
        )
    return blocks


def _known(before: dict[tuple[str, str], dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    return before.get((row["selection"], row["defence"]), {})


def _text(metric: dict[str, Any], signed: bool = False) -> str:
    return interval(metric.get("estimate"), metric.get("low"), metric.get("high"), signed)


def _arm(row: dict[str, Any], before: dict[str, Any], several: bool) -> Arm:
    metrics = row["metrics"]
    after = metrics["harmful_score"] if row["attack"] is not None else {}
    sources = (after, before, metrics["accuracy_correct"], metrics["helpfulness"])
    found = {name: Estimate(one["estimate"], one["low"], one["high"]) for name, one in zip(_SERIES, sources, strict=True) if one}
    if "HS before" in found:
        found["HS before"] = Estimate(found["HS before"].value)  # its interval would lie under the other one
    return Arm(_name(row, several), found)


def _name(row: dict[str, Any], several: bool) -> str:
    return str(row["selection"]) + (f" · {row['defence']}" if several else "")


def _words(arm: Arm) -> str:
    parts = [f"{name} {_one(one)}" for name, one in arm.series.items() if one.value is not None]
    return f"{arm.name}: {', '.join(parts)}"


def _one(estimate: Estimate) -> str:
    return interval(estimate.value, estimate.low, estimate.high)


def _defended(records: list[dict[str, Any]]) -> str:
    names = {row["defence"] for row in records}
    return f"; the objective of alignment is {names.pop()}" if len(names) == 1 else ""


def _differences(records: list[dict[str, Any]], several: bool) -> list[list[str]]:
    metrics = ("harmful_score", "coherent_refusal", "accuracy_correct", "helpfulness")
    return [
        [row["attack"] or "none", _name(row, several), other, *(_text(found.get(name, {}), signed=True) for name in metrics)]
        for row in records
        for other, found in row.get("minus", {}).items()
    ]
