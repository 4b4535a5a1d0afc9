"""How well every score finds known corruption that is planted in real text, over several draws that each have a base model of their own.

`pharmacist plant` with one seed after the other, scored by everything there is, and graded. What is reported are means over seeds with
Student's t intervals over them. Nothing is aligned or attacked: a score that ranks well need not make a model safe, and the other way
round. The same command goes on after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pharmacist_ray.config.load import load_config
from pharmacist_ray.errors import DataError
from pharmacist_ray.evaluation.intervals import Sample, estimate
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.session import run_stage
from pharmacist_ray.storage import json_of, write_text
from pharmacist_ray.testbed.grade import grade
from pharmacist_ray.testbed.make import make_planted

SEEDS = tuple(range(10, 20))
"""Draws to report; others are for making methods."""
SETTINGS = (
    "scoring.scorers=[pharmacist, pharmacist_iterative, coverage, loss_gap, tov, less, seal, representation, guard, dsir, "
    "naive_bayes, keyword, ifd, low_loss, random]",
    "scoring.random_draws=1",
    "selection.combinations={rank_sum: {pharmacist: 1, loss_gap: 1, tov: 1}}",
    "selector.inner_lr=1.0e-3",  # the learnt logits move by it
    "selector.iterations=50",  # of 32 rows: two epochs over 800 candidates
    "selector.seal={steps: 50}",
    "resources={workers: 0, actors: 0}",
)
CALIBRATED = (
    "scoring.scorers=[pharmacist, loss_gap, tov, less, representation, guard, naive_bayes]",
    "selection.scorer=calibrated",
)
"""A run of its own, for half of the trusted rows stay out of its fit."""
STAGES = ("ingest", "fit", "score")

Row = dict[str, Any]


def planted(safety: Path, benign: Path, out: Path, seeds: Sequence[int] = SEEDS, overrides: Sequence[str] = ()) -> list[Row]:
    """Plant, score and grade with every seed, write ``planted.json``, print it, and return its rows.

    Args:
        safety: JSONL of trusted safety pairs.
        benign: JSONL of ordinary pairs.
        out: Gets a folder for each seed, and the file.
        seeds: At least 2; each draws rows, corruptions and the weights that the tiny base begins with.
        overrides: Dotted keys of the runs' configuration.

    Raises:
        DataError: Fewer than 2 seeds, or too few pairs.
    """
    if len(set(seeds)) < 2:
        raise DataError("one draw says nothing of another: give at least 2 seeds")
    out, found = out.resolve(), dict[int, list[Row]]()
    for number, seed in enumerate(seeds, 1):
        say(f"[bold]planted[/] seed {seed}: {number} of {len(seeds)}")
        found[seed] = _graded(safety, benign, out / f"seed-{seed}", seed, overrides)
    rows = summarised(found)
    write_text(json.dumps({"planted": rows, "seeds": list(seeds)}, indent=1), out / "planted.json")
    show(rows)
    say(f"  written to {escaped(out / 'planted.json')}")
    return rows


def _graded(safety: Path, benign: Path, folder: Path, seed: int, overrides: Sequence[str]) -> list[Row]:
    """Return the grades of a seed's draw, those of the calibrated score among them; what is there is not made again."""
    if not (folder / "config.yaml").exists():
        make_planted(safety, benign, folder, seed, [f"pretraining.seed={seed}"])
    rows: list[Row] = []
    for name, settings in {"run": SETTINGS, "calibrated": (*SETTINGS, *CALIBRATED)}.items():
        run_dir = folder / name
        if not (run_dir / "grades.json").exists():
            config = load_config(folder / "config.yaml", [*settings, f"run_dir={run_dir}", *overrides])
            for stage in STAGES:
                run_stage(stage, config)
            grade(config, "quality", ["clean"])
        known = {row["scorer"] for row in rows}
        rows += [row for row in json_of(run_dir / "grades.json") if row["scorer"] not in known]
    return rows


def summarised(found: dict[int, list[Row]]) -> list[Row]:
    """Return a row for each score, the best first: its mean AUROC and precision with their intervals over seeds.

    Args:
        found: Seed → the grades of its draw.
    """
    seeds = sorted(found)
    by_seed = {seed: {row["scorer"]: row for row in found[seed]} for seed in seeds}
    rows = []
    for scorer in by_seed[seeds[0]]:
        row: Row = {"scorer": scorer, "seeds": len(seeds), "base_rate": by_seed[seeds[0]][scorer]["base_rate"]}
        for metric in ("auroc", "precision"):
            values = [by_seed[seed][scorer][metric] for seed in seeds]
            names = [str(seed) for seed in seeds]
            one = estimate(np.asarray, [Sample(values, names, [""] * len(seeds), [0] * len(seeds), [""] * len(seeds))], seed=0)
            row[metric] = [one.estimate, one.low, one.high]
        row["by_seed"] = {str(seed): by_seed[seed][scorer]["auroc"] for seed in seeds}
        labels = by_seed[seeds[0]][scorer]["kept"]
        row["kept"] = {label: float(np.mean([by_seed[seed][scorer]["kept"][label] for seed in seeds])) for label in labels}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["auroc"][0])


def show(rows: Sequence[Row]) -> None:
    """Print a line for each score, the best first."""
    table = Table(title=f"planted corruption, mean over {rows[0]['seeds']} seeds with 95 % t intervals", title_justify="left")
    labels = list(rows[0]["kept"])
    table.add_column("score")
    for heading in ("AUROC", "precision", *(f"kept of {escaped(label)}" for label in labels)):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = ("{:.3f} [{:.3f}, {:.3f}]".format(*row[metric]) for metric in ("auroc", "precision"))
        table.add_row(escaped(row["scorer"]), *cells, *(f"{row['kept'][label]:.2f}" for label in labels))
    console.print(table)
