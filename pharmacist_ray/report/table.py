"""The comparison as a plain table: what a person reads at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pharmacist_ray.config.finetune import Defence
from pharmacist_ray.data.printable import printable
from pharmacist_ray.storage import StoragePath, json_of, write_text

Row = Mapping[str, Any]

COLUMNS: tuple[tuple[str, str, bool], ...] = (
    ("harmful_score", "{score}", True),
    ("coherent_refusal", "refuses well", False),
    ("incoherent_harmful", "incoherent", False),
    ("beside_harmful", "beside the point", False),
    ("accuracy_correct", "task", True),
    ("helpfulness", "helpful", True),
    ("incoherent_benign", "incoherent on benign", False),
    ("beside_benign", "beside on benign", False),
)
"""Metric, heading, and whether it stands there before the attack too. The harmful score never stands alone: a model that refuses
everything has a harmful score of 0."""
PLAIN = "harmful_score_plain"
"""Metric of an attack after which harmful prompts are put in a form of the attacker's, or behind a secret: the harmful score on them as
they are."""
ASKED_PLAINLY = "{score} asked plainly"
HARDLY = 0.1
"""An attack that lowers the loss of its own harmful rows by less than this share is called weak (ours)."""
WARNINGS = 5
"""Warnings that are shown; the manifest has all."""
NOTE = (
    "Shares from 0 to 1, with 95 % intervals that draw runs, and whole clusters of prompts for all runs at once; they are wide with "
    "few runs, and blind to training noise with one. Helpful = 1 − over-refusal − incoherent − beside the point, on benign prompts."
)


def score_of(rows: Sequence[Row]) -> str:
    """Return what the judge calls its score; HS where an earlier version made the table."""
    return str(next((row["score"] for row in rows if row.get("score")), "HS"))


def headings(score: str) -> list[str]:
    """Return the headings of `cells`."""
    found: list[str] = []
    for _, name, before in COLUMNS:
        heading = name.format(score=score)
        found += [f"{heading} before", f"{heading} after"] if before else [heading]
    return found


def cells(row: Row, before: Row) -> list[tuple[float | None, float | None, float | None]]:
    """Return estimate, low and high of each column; before the attack the estimate alone."""
    found: list[tuple[float | None, float | None, float | None]] = []
    for name, _, twice in COLUMNS:
        if twice:
            found.append((before.get("metrics", {}).get(name, {}).get("estimate"), None, None))
        metric = row["metrics"].get(name, {})
        found.append((metric.get("estimate"), metric.get("low"), metric.get("high")))
    return found


def title_of(rows: Sequence[Row]) -> str:
    """Return what the rows of one attack, or of several put together, stand for."""
    first = rows[0]
    if first["attack"] is None:
        return "not attacked"
    return f"{first['attack']}: {first['rule']}" if "over" in first else f"attack: {first['attack']}"


def counted(row: Row) -> str:
    """Return how many of the attacks count for a row over several."""
    return f"{len(row['over'])} of {len(row['attacks'])}"


def warnings(rows: Sequence[Row]) -> list[str]:
    """Return what makes figures doubtful, the first `WARNINGS` of it."""
    found = list(dict.fromkeys(warning for row in rows if "over" not in row for warning in row.get("warnings", [])))
    more = [f"and {len(found) - WARNINGS} more models like that; evaluation/manifest.json has all"] * (len(found) > WARNINGS)
    return [*found[:WARNINGS], *more]


def agreements(records: Sequence[Row]) -> list[str]:
    """Return how far judges agree, a sentence a pair and kind of prompts."""
    return [
        f"On {one['n']} answers to {one['prompts']} prompts {one['judge']} and {one['other']} say the same of {one['agreement']:.2f} "
        f"(Cohen's κ {'–' if one['kappa'] is None else format(one['kappa'], '.2f')}); harmful by {one['judge']}: {one['harmful']:.2f}, "
        f"by {one['other']}: {one['harmful_by_other']:.2f}" + (f"; {one['unjudged']} unjudged" if one["unjudged"] else "") + "."
        if one["n"]
        else f"{one['judge']} and {one['other']} have no verdict in common on {one['prompts']} prompts."
        for one in records
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader of the table must know."""
    found = [f"{row['score']} is the {row['score_means']}." for row in rows[:1] if row.get("score_means")]
    gaps = [row["gap_closed"] for row in rows if "gap_closed" in row]
    if gaps:
        found.append("Gap closed = (random − arm) / (random − oracle) of that score: 0 is random, 1 the planted truth.")
    if any(gap.get("reason") for gap in gaps):
        found.append("It has no number where random is not apart from the oracle.")
    if any(PLAIN in row["metrics"] for row in rows):
        plainly = ASKED_PLAINLY.format(score=score_of(rows))
        found.append(
            f"Where there is '{plainly}', the other figures on harmful prompts are of them in the attacker's form, or behind the "
            "service's secret."
        )
    measured = [row["metrics"] for row in rows if "over" not in row]
    lost = [sum(one.get(name, {}).get("unscored", 0) for one in measured) for name in ("harmful_score", "helpfulness")]
    if any(lost):
        found.append(f"Unjudged, and in no share: {lost[0]} answers to harmful prompts and {lost[1]} to benign ones.")
    return [*found, NOTE]


def weak_attacks(rows: Sequence[Row]) -> list[str]:
    """Return a warning for each attack that hardly lowered the loss of its own harmful rows on some arm.

    Where the fine-tune itself is defended or repaired, that it did not is the defence's work, and no arm to tell the attack's strength by.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        before, after = row.get("attack_loss") or (0.0, 0.0)
        stages = Defence.of(row["defence"])
        if "over" not in row and stages == Defence(stages.alignment) and after > (1 - HARDLY) * before:
            found.setdefault(row["attack"], []).append(f"{row['selection']} by {row['defence']} from {before:.2f} to {after:.2f}")
    return [
        f"Attack {attack} hardly lowered the loss of its own harmful rows ({'; '.join(arms)}): its scores there say little of the "
        "defence. A higher learning rate, more steps or a larger share of harm make it stronger."
        for attack, arms in found.items()
    ]


def write_report(evaluation: StoragePath, out: StoragePath, console: Console) -> None:
    """Print one table per attack and write the same as Markdown to ``out/table.md``.

    Args:
        evaluation: Folder with ``table.json``.
        out: Folder to write to.
        console: Where to print.
    """
    rows = json_of(evaluation / "table.json")
    score = score_of(rows)
    before = {(row["selection"], row["defence"]): row for row in rows if row["attack"] is None}
    markdown = []
    for attack in list(dict.fromkeys(row["attack"] for row in rows if row["attack"] is not None)) or [None]:
        mine = [row for row in rows if row["attack"] == attack]
        title = title_of(mine)
        over, gap, plain = (
            "over" in mine[0],
            any("gap_closed" in row for row in mine),
            any(PLAIN in row["metrics"] for row in mine),
        )
        header = ["aligned on", "defence", "runs", "rows", "align s", *headings(score)]
        header += [ASKED_PLAINLY.format(score=score)] * plain + ["gap closed"] * gap + ["attacks"] * over
        body = [
            [
                *_start(row),
                *(_interval(*cell) for cell in cells(row, before.get((row["selection"], row["defence"]), {}))),
                *([_metric(row["metrics"].get(PLAIN))] if plain else []),
                *([_metric(row.get("gap_closed"))] if gap else []),
                *([counted(row)] if over else []),
            ]
            for row in mine
        ]
        markdown.append(_show(title, header, body, console))
        if groups := list(dict.fromkeys(group for row in mine for group in row.get("groups", {}))):
            names = ["aligned on", "defence", *(f"{score}, {group}" for group in groups)]
            apart = [
                [
                    row["selection"],
                    row["defence"],
                    *(_metric(row["groups"].get(group, {}).get("harmful_score")) for group in groups),
                ]
                for row in mine
            ]
            markdown.append(_show(f"{score} by group of prompts, {title}", names, apart, console))
        for sentence in _gains(mine, score):
            console.print(f"  {escape(sentence)}")
            markdown.append(f"- {sentence}\n")
    said = [*notes(rows), *agreements(judges_in(evaluation))]
    for note in said:
        console.print(f"  [dim]{escape(printable(note))}[/]")
    for warning in warnings(rows):
        console.print(f"  [yellow]warning[/]: {escape(printable(warning))}", soft_wrap=True)
        said.append(f"\nWarning: {printable(warning)}")
    for weak in weak_attacks(rows):
        console.print(f"  [yellow]{escape(printable(weak))}[/]")
        said.append(printable(weak))
    text = "# Comparison\n\n" + "\n".join(markdown) + "\n" + "\n".join(said) + "\n"
    write_text(text, out / "table.md")
    console.print(f"  written to {escape(str(out / 'table.md'))} and {escape(str(evaluation / 'summary.json'))}", soft_wrap=True)


def judges_in(evaluation: StoragePath) -> list[Row]:
    """Return how far several judges agree; nothing where there is one, or where an earlier version evaluated."""
    file = evaluation / "judges.json"
    return json_of(file) if file.exists() else []


def _start(row: Row) -> list[str]:
    return [row["selection"], row["defence"], str(row["runs"]), str(row["kept"]), f"{row['align_seconds']:.1f}"]


def _show(title: str, header: Sequence[str], body: Sequence[Sequence[str]], console: Console) -> str:
    """Print a table whose first two columns are words, and return it as Markdown."""
    title, header, *lines = printable(title), *([printable(cell) for cell in line] for line in (header, *body))
    table = Table(title=escape(title), title_justify="left")
    for index, name in enumerate(header):
        table.add_column(escape(name), justify="left" if index < 2 else "right")
    for line in lines:
        table.add_row(*map(escape, line))
    console.print(table)
    rule = ["---"] * 2 + ["---:"] * (len(header) - 2)
    text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in (header, rule, *lines))
    return f"## {title}\n\n{text}\n"


def _gains(rows: Sequence[Row], score: str) -> list[str]:
    sentences = []
    for row in rows:
        if row["selection"] in ("all", "random"):
            continue
        for other, differences in row["minus"].items():
            hs, task, helpful = (differences[name] for name in ("harmful_score", "accuracy_correct", "helpfulness"))
            sentences.append(
                f"{row['selection']} by {row['defence']} minus {other}: {score} {_metric(hs, signed=True)}, "
                f"task accuracy {_metric(task, signed=True)}, "
                f"helpful {_metric(helpful, signed=True)}"
            )
    return sentences


def _metric(metric: Row | None, signed: bool = False) -> str:
    return _interval(metric["estimate"], metric["low"], metric["high"], signed) if metric else "–"


def _number(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"


def _interval(estimate: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    if estimate is None or low is None or high is None:
        return _number(estimate, signed)
    return f"{_number(estimate, signed)} [{_number(low, signed)}, {_number(high, signed)}]"
