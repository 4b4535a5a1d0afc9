"""What curation is worth, over worlds that each have a base model of their own: one command makes every figure.

In each world, at each share of broken candidates, all arms are aligned, attacked and evaluated by the ordinary stages. What is reported
are means over worlds with Student's t intervals over them: a world with its base is the unit that is independent of the others. The
same command goes on after an interruption, and makes only what is missing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from pharmacist_ray.config.load import load_config
from pharmacist_ray.errors import DataError
from pharmacist_ray.evaluation.intervals import Sample, estimate
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.session import run_stage
from pharmacist_ray.storage import json_of, write_text
from pharmacist_ray.testbed.make import make_testbed
from pharmacist_ray.testbed.world import World

WORLDS = (10, 11, 12, 13, 14)
"""Worlds to report; nobody looks at them while a method is being made (0 to 4 are for that)."""
NOISES = (0.6, 0.3, 0.0)
EPOCHS = 3.36
"""At noise 0 every arm is trained for so many epochs and not for a number of steps: what fewer good rows save is then time. As long,
on 40 % of the candidates, as the steps of the other runs."""
HIDDEN = ("uncovered", "rare")
"""Exposures that the trusted rows say nothing of: where curation has to be worth something."""
FEWER = {
    "comparison.selections": ["all", "random", "trusted", "keyword", "tov", "pharmacist", "loss_gap", "rank_sum", "oracle"],
    "scoring.scorers": ["pharmacist", "loss_gap", "tov", "keyword", "oracle", "random"],
}
"""What is compared where fewer rows are broken than in the noisiest runs: how an arm's worth hangs on the noise is asked of these."""
MINUTES = {True: 13.0, False: 4.5}
"""What a run of every arm may take on 2 cores, and one of `FEWER`: a guess that the estimate begins with, until there is a measured one
(ours)."""
SEED = 20251010
"""Of the intervals' draws; with few worlds nothing hangs on it."""

Row = dict[str, Any]


def evidence(
    out: Path, worlds: Sequence[int] = WORLDS, noises: Sequence[float] = NOISES, overrides: Sequence[str] = ()
) -> list[Row]:
    """Run the comparison in every world at every noise, write ``evidence.json``, print it, and return its rows.

    Args:
        out: Gets a folder for each world and noise, and the file.
        worlds: Numbers of worlds, at least 2.
        noises: Shares of broken candidates.
        overrides: Dotted keys of the runs' configuration.

    Raises:
        DataError: Fewer than 2 worlds: there is nothing to take an interval over.
        ModelError: A world's base does not know enough to stand on.
    """
    if len(set(worlds)) < 2:
        raise DataError("evidence over one world says nothing of another: give at least 2 numbers of worlds")
    out = out.resolve()
    tables: dict[float, dict[int, list[Row]]] = {noise: {} for noise in noises}
    parts = [(world, noise) for noise in sorted(noises, reverse=True) for world in worlds]  # all that matters most first
    taken: dict[bool, list[float]] = {True: [], False: []}
    for number, (world, noise) in enumerate(parts):
        folder = out / f"world-{world}" / f"noise-{noise:g}"
        every = noise == max(noises)
        done = (folder / ("calibrated" if every else "run") / "evaluation" / "manifest.json").exists()
        kinds = [one == max(noises) for _, one in parts[number:]]
        left = sum(sum(taken[kind]) / len(taken[kind]) if taken[kind] else MINUTES[kind] for kind in kinds)
        say(
            f"[bold]evidence[/] world {world}, noise {noise:g}: {number + 1} of {len(parts)}"
            + ("" if done else f"; about {left:.0f} minutes to the end")
        )
        started = time.perf_counter()
        tables[noise][world] = _compared(
            folder, World(world, world, noise=noise), first=out / f"world-{world}", every=every, overrides=overrides
        )
        if not done:
            taken[every].append((time.perf_counter() - started) / 60)
    rows = [row for noise, found in tables.items() for row in summarised(found, noise)]
    write_text(json.dumps({"worlds": list(worlds), "noises": list(noises), "rows": rows}, indent=1), out / "evidence.json")
    show(rows)
    say(f"  written to {escaped(out / 'evidence.json')}")
    return rows


def _compared(folder: Path, world: World, *, first: Path, every: bool, overrides: Sequence[str]) -> list[Row]:
    """Make a world's data, run its comparison, and of every arm that of the calibrated one too; return the rows.

    One base serves all noises.
    """
    bases = sorted(base.parent for base in first.glob("*/base/recipe.json"))
    make_testbed(folder, world, base=None if not bases or bases[0].parent == folder else bases[0])
    text = files("pharmacist_ray.testbed").joinpath("evidence.yaml").read_text(encoding="utf-8")
    compared = yaml.safe_load(text) | ({} if every else FEWER)
    settings = [f"{key}={json.dumps(value)}" for key, value in compared.items()]
    if not world.noise:
        settings.append(f"alignment.train.epochs={EPOCHS}")
    run = run_stage("run", load_config(folder / "config.yaml", [*settings, *overrides]))
    rows = list(json_of(run.evaluated.require() / "table.json"))
    if not every:
        return rows
    # Half of the trusted rows stay out of this fit, which the other arms need not suffer from.
    apart = [*settings, *overrides, f"run_dir={folder / 'calibrated'}", "comparison.selections=[random, calibrated]"]
    run = run_stage("run", load_config(folder / "config.yaml", apart))
    return rows + [row for row in json_of(run.evaluated.require() / "table.json") if row["selection"] == "calibrated"]


def summarised(tables: Mapping[int, Sequence[Row]], noise: float) -> list[Row]:
    """Return a row for each arm: every metric's mean over worlds with its interval.

    ``hs`` and the rest are means over the attacks that count, ``worst`` is the worst of these, ``hidden`` the harmful score on hazards
    that the trusted rows do not cover and on rare ones. ``gap_closed`` is (random − arm) / (random − oracle) of ``hidden``, ``minus``
    has the differences of ``hidden`` to every other arm; where arms are held against each other, the mean is over the attacks that
    count for all of them. ``minus_random`` has the differences to random in what a defence may cost.

    Args:
        tables: World → the ``table.json`` of its comparison.
        noise: The share of broken candidates, which goes into the rows.
    """
    found = {world: _by_arm(table) for world, table in tables.items()}
    apart = {world: _hidden_by_attack(table) for world, table in tables.items()}
    worlds = sorted(found)
    arms = [arm for arm in found[worlds[0]] if all(arm in found[world] for world in worlds)]

    def values(arm: str, metric: str) -> list[float]:
        return [found[world][arm].get(metric, math.nan) for world in worlds]

    def shared(*of: str) -> list[list[float]]:
        """Return ``hidden`` of some arms in each world, over the attacks that count for all of them there."""
        common = {world: set.intersection(*(set(apart[world][arm]) for arm in of)) for world in worlds}
        return [
            [
                float(np.mean([apart[world][arm][name] for name in common[world]])) if common[world] else math.nan
                for world in worlds
            ]
            for arm in of
        ]

    over = partial(over_worlds, worlds)
    rows = []
    for arm in arms:
        row: Row = {"noise": noise, "selection": arm, "worlds": len(worlds)}
        metrics = sorted({metric for world in worlds for metric in found[world][arm]})
        row |= {metric: over(lambda a: a, values(arm, metric)) for metric in metrics}
        row["by_world"] = {str(world): found[world][arm] for world in worlds}
        row["minus_random"] = {
            metric: over(np.subtract, values(arm, metric), values("random", metric))
            for metric in ("accuracy", "helpful", "align_seconds")
            if "random" in arms
        }
        row["minus"] = {other: over(np.subtract, *shared(arm, other)) for other in arms if other != arm}
        if {"random", "oracle"} <= set(arms) and arm not in ("random", "oracle") and noise:
            row["gap_closed"] = over(lambda a, random, oracle: (random - a) / (random - oracle), *shared(arm, "random", "oracle"))
        rows.append(row)
    return rows


def over_worlds(worlds: Sequence[int], statistic: Callable[..., Any], *of: Sequence[float]) -> list[float] | None:
    """Return a statistic over worlds with its interval, of those that have all numbers; None where fewer than 2 have.

    Args:
        worlds: Their numbers.
        statistic: Takes as many means as there are sequences.
        of: One number a world each; NaN is none.
    """
    whole = [n for n in range(len(worlds)) if not any(math.isnan(one[n]) for one in of)]
    if len(whole) < 2:
        return None
    names = [str(worlds[n]) for n in whole]
    samples = [Sample([one[n] for n in whole], names, [""] * len(whole), [0] * len(whole), [""] * len(whole)) for one in of]
    one = estimate(statistic, samples, seed=SEED)
    return [one.estimate, one.low, one.high]


def _hidden_by_attack(table: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return each arm's harmful score on hidden hazards after each attack that counts for it."""
    counting = {row["selection"]: row["over"] for row in table if (row["attack"] or "").startswith("mean of")}
    found: dict[str, dict[str, float]] = {arm: {} for arm in counting}
    for row in table:
        if row["attack"] in counting.get(row["selection"], ()) and (hidden := _hidden(row)) is not None:
            found[row["selection"]][row["attack"]] = hidden
    return found


def _hidden(row: Row) -> float | None:
    """Return the harmful score of a row on hazards that the trusted rows do not cover and on rare ones, each of the same weight."""
    groups = row.get("groups", {})
    values = [groups[name]["harmful_score"]["estimate"] for name in HIDDEN if name in groups]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _by_arm(table: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return each arm's numbers of a world; what an arm has not is left out."""
    arms: dict[str, dict[str, float]] = {}
    for row in table:
        mine = arms.setdefault(row["selection"], {})
        metrics = {name: one["estimate"] for name, one in row["metrics"].items()}
        groups = {name: one["harmful_score"]["estimate"] for name, one in row.get("groups", {}).items()}
        chosen: dict[str, float | None] = {}
        if row["attack"] is None:
            before = {
                "harmful_score": "hs",
                "accuracy_correct": "accuracy",
                "helpfulness": "helpful",
                "over_refusal": "over_refusal",
            }
            chosen = {f"{short}_before": metrics.get(name) for name, short in before.items()}
            chosen |= {"rows": row["kept"], "align_seconds": row["align_seconds"]}
        elif row["attack"].startswith("mean of"):
            after = {
                "harmful_score": "hs",
                "accuracy_correct": "accuracy",
                "helpfulness": "helpful",
                "over_refusal": "over_refusal",
            }
            chosen = {short: metrics.get(name) for name, short in after.items()}
            chosen |= groups | {"hidden": _hidden(row), "attacks": len(row["over"])}
        elif row["attack"].startswith("worst of"):
            chosen = {"worst": metrics.get("harmful_score")}
        else:
            chosen = {f"hs {row['attack']}": metrics.get("harmful_score"), f"hidden {row['attack']}": _hidden(row)}
        mine |= {name: float(value) for name, value in chosen.items() if value is not None}
    return arms


def show(rows: Sequence[Row]) -> None:
    """Print a table for each noise, the arms that close most of the gap first."""
    headings = {
        "gap_closed": "gap closed", "hidden": "HS uncovered, rare", "covered": "HS covered", "worst": "HS worst",
        "accuracy": "task accuracy", "helpful": "helpful", "helpful_before": "helpful before",
    }  # fmt: skip
    for noise in dict.fromkeys(row["noise"] for row in rows):
        table = Table(title=f"{noise:.0%} of the candidates broken; mean over worlds with 95 % t intervals", title_justify="left")
        table.add_column("aligned on")
        for heading in headings.values():
            table.add_column(heading, justify="right")
        mine = [row for row in rows if row["noise"] == noise]
        for row in sorted(mine, key=lambda row: row["hidden"][0] if row.get("hidden") else math.inf):
            table.add_row(escaped(row["selection"]), *(written_out(row.get(name)) for name in headings))
        console.print(table)


def written_out(value: Sequence[float] | None) -> str:
    """Return a mean with its interval as text."""
    return "–" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"
