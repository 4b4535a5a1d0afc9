"""Print how well every score finds planted labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from pharmacist_ray.config.load import located
from pharmacist_ray.config.schema import Config
from pharmacist_ray.curation.grades import grade_scores
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.storage import write_text


def grade(config: Config, column: str, good: Sequence[str]) -> None:
    """Print a table of AUROC and precision and write it to ``grades.json`` in the run directory.

    Args:
        config: The run's configuration.
        column: Original column with the planted label.
        good: Labels that count as good.
    """
    run = Run(located(config))
    rows = run.ingested("candidates").require() / "rows"
    keep = config.selection.ratio if config.selection.ratio is not None else 0.4
    grades = grade_scores(rows, run.scored.require() / "rows", column=column, good=set(good), keep=keep)
    labels = list(grades[0].kept)
    table = Table(
        title=f"good: {escaped(', '.join(good))} (base rate {grades[0].base_rate:.2f}); kept: {keep:.0%}", title_justify="left"
    )
    table.add_column("score")
    for heading in ("AUROC", "precision", "× base rate", *(f"kept of {escaped(label)}" for label in labels)):
        table.add_column(heading, justify="right")
    for one in sorted(grades, key=lambda one: -one.precision):
        shares = [f"{one.kept[label]:.2f}" for label in labels]
        table.add_row(one.scorer, f"{one.auroc:.3f}", f"{one.precision:.3f}", f"{one.precision / one.base_rate:.2f}", *shares)
    console.print(table)
    write_text(json.dumps([asdict(one) for one in grades], indent=1), run.root / "grades.json")
    say(f"  written to {escaped(run.root / 'grades.json')}")
