"""The section that compares: what each selection was worth, before and after each attack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pharmacist_ray.report.blocks import Block, Figure, Note, Plot, Table, interval
from pharmacist_ray.report.figures import Arm, Estimate, dots
from pharmacist_ray.report.run_files import RunFiles
from pharmacist_ray.report.table import (
    ASKED_PLAINLY,
    PLAIN,
    agreements,
    cells,
    counted,
    headings,
    judges_in,
    notes,
    score_of,
    title_of,
    warnings,
    weak_attacks,
)

READ = (
    "Read a whole row: a harmful score means nothing without task accuracy and helpfulness, before the attack and after it, for a "
    "model that refuses everything has none."
)


def comparison(run: RunFiles) -> list[Block]:
    """Return the table of all arms and attacks, a panel an attack, and the differences to the baseline arms."""
    records = run.json("evaluation", "table.json") if run.manifest("evaluation") else None
    if not records:
        return []
    score = score_of(records)
    several = len({row["defence"] for row in records}) > 1
    before = {(row["selection"], row["defence"]): row for row in records if row["attack"] is None}
    attacks = list(dict.fromkeys(row["attack"] for row in records if row["attack"] is not None)) or [None]
    ordered = [row for attack in attacks for row in records if row["attack"] == attack]
    gap, over = (any(name in row for row in ordered) for name in ("gap_closed", "over"))
    plain = any(PLAIN in row["metrics"] for row in ordered)
    defence = ["defence"] if several else []
    header = ["attack", "aligned on", *defence, "runs", "rows", "align s", *headings(score)]
    header += [ASKED_PLAINLY.format(score=score)] * plain + ["gap closed"] * gap + ["attacks that count"] * over
    body = [
        [
            row["attack"] or "none",
            row["selection"],
            *(row[name] for name in defence),
            str(row["runs"]),
            f"{row['kept']:,}",
            f"{row['align_seconds']:.1f}",
            *(interval(*cell) for cell in cells(row, _known(before, row))),
            *([_text(row["metrics"].get(PLAIN, {}))] if plain else []),
            *([_text(row.get("gap_closed", {}))] if gap else []),
            *([counted(row) if "over" in row else ""] if over else []),
        ]
        for row in ordered
    ]
    series = (f"{score} after", f"{score} before", "task accuracy", "helpful on benign")
    plots = []
    for attack in attacks:
        rows = [row for row in ordered if row["attack"] == attack]
        arms = [_arm(row, _known(before, row), several, series) for row in rows]
        title = title_of(rows)
        words = "; ".join(_words(arm) for arm in arms)
        numbers = [(arm.name, *(_one(arm.series.get(name, Estimate(None))) for name in series)) for arm in arms]
        table = Table(title, ("aligned on", *series), numbers, summary=f"Numbers: {title}")
        plots.append(Plot(dots(title, arms, f"{words}.", series), numbers=table))
    blocks: list[Block] = [
        Note(" ".join([READ, *notes(records), *agreements(judges_in(run.root / "evaluation"))])),
        *(Note(warning, warning=True) for warning in warnings(records)),
        *(Note(line, warning=True) for line in weak_attacks(records)),
        Table("What each selection was worth" + _defended(records), header, body, words=2 + several, grouped=True),
        Figure(f"{score} (lower is better), task accuracy and helpfulness (higher is better) on one scale.", plots),
    ]
    if groups := list(dict.fromkeys(group for row in ordered for group in row.get("groups", {}))):
        names = ["attack", "arm", *(f"{name}, {group}" for name in (score, "refuses well") for group in groups)]
        apart = [
            [row["attack"] or "none", _name(row, several)]
            + [_text(row["groups"].get(g, {}).get(name, {})) for name in ("harmful_score", "coherent_refusal") for g in groups]
            for row in (*before.values(), *(row for row in ordered if row["attack"] is not None))
        ]
        blocks.append(Table("Harmful prompts by group", names, apart, words=2, grouped=True))
    if differences := _differences(ordered, several):
        names = ["attack", "arm", "minus", score, "refuses well", "task accuracy", "helpful on benign"]
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


def _arm(row: dict[str, Any], before: dict[str, Any], several: bool, series: Sequence[str]) -> Arm:
    metrics = row["metrics"]
    after = metrics["harmful_score"] if row["attack"] is not None else {}
    first = before.get("metrics", {}).get("harmful_score", {})
    sources = (after, first, metrics["accuracy_correct"], metrics["helpfulness"])
    found = {name: Estimate(one["estimate"], one["low"], one["high"]) for name, one in zip(series, sources, strict=True) if one}
    if first:
        found[series[1]] = Estimate(first["estimate"])  # its interval would lie under the other one
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
