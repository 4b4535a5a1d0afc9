"""The comparison as a plain table: what a person reads at the end of a run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pharmacist_ray.storage import StoragePath, json_of, write_text

COLUMNS: dict[str, str] = {
    "harmful_score": "HS after",
    "coherent_refusal": "refuses well",
    "incoherent": "incoherent",
    "accuracy_correct": "task accuracy",
    "helpfulness": "helpful on benign",
}
"""Metric → heading. The harmful score never stands alone: a model that refuses everything has a harmful score of 0."""


def write_report(evaluation: StoragePath, out: StoragePath, console: Console) -> None:
    """Print one table per attack and write the same as Markdown to ``out/table.md``.

    Args:
        evaluation: Folder with ``table.json``.
        out: Folder to write to.
        console: Where to print.
    """
    rows = json_of(evaluation / "table.json")
    before = {(row["selection"], row["defence"]): row for row in rows if row["attack"] is None}
    markdown = []
    for attack in list(dict.fromkeys(row["attack"] for row in rows if row["attack"] is not None)) or [None]:
        title = f"attack: {attack}" if attack else "not attacked"
        header = ["aligned on", "defence", "runs", "rows", "align s", "HS before", *COLUMNS.values()]
        body = [_cells(row, before[row["selection"], row["defence"]]) for row in rows if row["attack"] == attack]
        table = Table(title=escape(title), title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index < 2 else "right")
        for cells in body:
            table.add_row(*map(escape, cells))
        console.print(table)
        rule = " | ".join(["---"] * 2 + ["---:"] * (len(header) - 2))
        lines = [f"| {' | '.join(header)} |", f"| {rule} |", *(f"| {' | '.join(cells)} |" for cells in body)]
        markdown.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
        for sentence in _gains(rows, attack):
            console.print(f"  {escape(sentence)}")
            markdown.append(f"- {sentence}\n")
    note = (
        "Shares from 0 to 1, with 95 % intervals of a bootstrap over training runs and prompts (too narrow with few runs). "
        "Helpful on benign = 1 − over-refusal − answers beside the point."
    )
    console.print(f"  [dim]{note}[/]")
    write_text("# Comparison\n\n" + "\n".join(markdown) + f"\n{note}\n", out / "table.md")
    console.print(f"  written to {escape(str(out / 'table.md'))} and {escape(str(evaluation / 'summary.json'))}", soft_wrap=True)


def _cells(row: dict[str, Any], before: dict[str, Any]) -> list[str]:
    metrics = row["metrics"]
    return [
        row["selection"],
        row["defence"],
        str(row["runs"]),
        str(row["kept"]),
        f"{row['align_seconds']:.1f}",
        _number(before["metrics"]["harmful_score"]["estimate"]),
        *(_interval(metrics[name]) for name in COLUMNS),
    ]


def _gains(rows: list[dict[str, Any]], attack: str | None) -> list[str]:
    sentences = []
    for row in rows:
        if row["attack"] != attack or row["selection"] in ("all", "random"):
            continue
        for other, differences in row["minus"].items():
            hs, task, helpful = (differences[name] for name in ("harmful_score", "accuracy_correct", "helpfulness"))
            sentences.append(
                f"{row['selection']} by {row['defence']} minus {other}: HS {_interval(hs, signed=True)}, "
                f"task accuracy {_interval(task, signed=True)}, "
                f"helpful {_interval(helpful, signed=True)}"
            )
    return sentences


def _number(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"


def _interval(metric: dict[str, Any], signed: bool = False) -> str:
    if metric["estimate"] is None:
        return "–"
    return f"{_number(metric['estimate'], signed)} [{_number(metric['low'], signed)}, {_number(metric['high'], signed)}]"
