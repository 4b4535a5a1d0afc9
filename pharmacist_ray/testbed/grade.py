"""Print how well every score finds planted labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
from rich.table import Table

from pharmacist_ray.config.load import located
from pharmacist_ray.config.schema import Config
from pharmacist_ray.config.scoring import CALIBRATED, PlantedConfig
from pharmacist_ray.curation.calibrate import calibrate
from pharmacist_ray.curation.combine import best_rank, rank_sum
from pharmacist_ray.curation.grades import grade_scores
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import calibrated_on
from pharmacist_ray.storage import write_text


def grade(config: Config, column: str | None = None, good: Sequence[str] | None = None) -> None:
    """Print a table of AUROC and precision, of sums of ranks and the calibrated score too, and write it to ``grades.json``.

    Args:
        config: The run's configuration.
        column: Original column with the planted label; default: that of ``scoring.planted``, else ``quality``.
        good: Labels that count as good; default: those of ``scoring.planted``, else ``clean``.
    """
    planted_labels = config.scoring.planted or PlantedConfig(good=["clean"])
    column, good = column or planted_labels.column, good or planted_labels.good
    run = Run(located(config))
    rows = run.ingested("candidates").require() / "rows"
    keep = config.selection.ratio if config.selection.ratio is not None else 0.4
    scores = run.scored.require() / "rows"
    made: dict[str, Any] = {name: partial(_rank_sum, weights=weights) for name, weights in config.selection.sums.items()}
    made |= {name: partial(_best_rank, columns=turns) for name in config.scoring.scorers if (turns := run.turns(name))}
    if (planted := calibrated_on(run)) is not None:
        made[CALIBRATED] = lambda table: calibrate([table], planted).of(table)
    grades = grade_scores(rows, scores, column=column, good=set(good), keep=keep, made=made)
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


def _best_rank(table: pa.Table, columns: Sequence[str]) -> Any:
    return best_rank([table], columns).of(table)


def _rank_sum(table: pa.Table, weights: dict[str, float]) -> Any:
    return rank_sum([table], weights).of(table)
