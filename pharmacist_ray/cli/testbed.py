"""The commands that make benchmarks and measure: ``benchmark``, ``testbed``, ``plant`` and ``grade``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pharmacist_ray.cli.options import ConfigOption, Overrides


def benchmark(
    objectives: Annotated[list[str] | None, typer.Argument(help="What to measure besides SFT; default: all.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps of each objective, which take turns.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for benchmark.json.")] = Path("runs/benchmark"),
) -> None:
    """Measure what each objective costs here: seconds a step over SFT's, and peak memory.

    `python -m jobs.benchmark` has more options, and `python -m jobs.benchmark gpu` measures a GPU with models of real size.
    """
    from pharmacist_ray.benchmarks.objectives import Load
    from pharmacist_ray.benchmarks.objectives import benchmark as measure
    from pharmacist_ray.training.objectives import ALIGNING

    measure(objectives or list(ALIGNING), Load(rounds=rounds), out)


def testbed(
    folder: Annotated[Path, typer.Argument(help="Folder for the world's data, its base model and config.yaml.")],
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Draws the data; the same seed writes the same files.")] = 0,
    world: Annotated[int, typer.Option(help="Fixes the words, the facts and the base model; no two worlds share any.")] = 0,
    covered: Annotated[int, typer.Option(help="How many of the 6 common hazards the trusted rows are about.")] = 2,
    noise: Annotated[float, typer.Option(help="Share of the candidates that are no good to align on.")] = 0.6,
    base: Annotated[Path | None, typer.Option(help="Take the base model of another testbed instead of training one.")] = None,
) -> None:
    """Make the embedded benchmark: a synthetic language, a tiny base model trained from scratch, and a config to run."""
    from pharmacist_ray.testbed.make import make_testbed
    from pharmacist_ray.testbed.world import World

    make_testbed(folder, World(seed, world, covered, noise), overrides or [], base)


def plant(
    safety: Annotated[Path, typer.Argument(help="JSONL of trusted prompt/response safety pairs.")],
    benign: Annotated[Path, typer.Argument(help="JSONL of ordinary prompt/response pairs.")],
    folder: Annotated[
        Path, typer.Argument(help="Folder for the planted data, a tiny model trained from scratch and config.yaml.")
    ],
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Draws rows and corruptions.")] = 0,
    candidates: Annotated[int, typer.Option(min=1, help="How many candidates to make.")] = 800,
    trusted: Annotated[int, typer.Option(min=1, help="Rows of each of the three trusted sets.")] = 150,
) -> None:
    """Plant known corruption in a data set of yours, and train a tiny base model on it, to see how well the scorers find it."""
    from pharmacist_ray.testbed.make import make_planted

    make_planted(safety, benign, folder, seed, overrides or [], candidates=candidates, trusted=trusted)


def grade(
    config: ConfigOption,
    overrides: Overrides = None,
    column: Annotated[
        str | None,
        typer.Option(help="Column of the candidates with the planted label; default: of scoring.planted, else quality."),
    ] = None,
    good: Annotated[
        list[str] | None,
        typer.Option(help="A label that counts as good; repeat for several. Default: those of scoring.planted, else clean."),
    ] = None,
) -> None:
    """Grade every score against planted labels: AUROC, and precision among as many rows as are kept."""
    from pharmacist_ray.config import load_config
    from pharmacist_ray.testbed.grade import grade as grade_run

    grade_run(load_config(config, overrides or []), column, good)
