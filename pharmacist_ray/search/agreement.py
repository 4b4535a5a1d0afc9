"""Whether an early look at a trial says what its end says: evidence for or against stopping trials, from a search without stopping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.tune.schedulers import TrialScheduler
from rich.table import Table

from pharmacist_ray.config.load import located
from pharmacist_ray.config.schema import Config, EarlyConfig, SearchConfig
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.search.early import LOOKS, SIGNAL, asha, asked, score
from pharmacist_ray.search.front import recommend
from pharmacist_ray.search.search import reader
from pharmacist_ray.search.space import check_space, resolved, section
from pharmacist_ray.search.trial import Record
from pharmacist_ray.storage import StoragePath

ORDERS = 1000
"""Orders of arrival that ASHA is tried in; what it stops depends on the order."""


@dataclass(frozen=True)
class Agreement:
    """What an early look after one attack is worth."""

    attack: str
    trials: int
    spearman: float | None
    """Rank correlation of the early harmful score with the worst harmful score at the end; None if either is the same everywhere.
    The end includes the early answers, so the two are not independent."""
    stopped: float
    """Share of the trials that ASHA stops, mean over orders of arrival."""
    lost: float
    """Share of the orders in which it stops the trial that the whole search recommends."""
    regret: float
    """By how much the worst harmful score of what is recommended then is higher, mean over orders; below 0 if it is lower, at the
    price of accuracy or over-refusal."""


def show_agreement(config: Config) -> list[Agreement]:
    """Print how well an early look after each attack of a finished search agrees with its end, and what ASHA would have cost.

    Nothing is run: the answers of the finished trials are there, and the early look is a part of them.

    Args:
        config: The configuration of a search that ran without stopping; ``search.early`` may differ.

    Raises:
        ArtifactError: Too few trials finished, or some were stopped.
    """
    config = located(config)
    run, search = Run(config), section(config)
    records = reader(run, check_space(run))()
    if stopped := sum(record["status"] == "stopped" for record in records):
        raise ArtifactError(
            f"{stopped} trials of this search were stopped, so their final scores are not known; run it with search.scheduler=none"
        )
    finished = [record for record in records if record["status"] == "finished"]
    if len(finished) < 3:
        raise ArtifactError(
            f"{len(finished)} trials of this search have finished, and ranks need 3; run `pharmacist search` first"
        )
    found = [agreement(attack, finished, signals, search) for attack, signals in signals_of(run, finished).items()]
    share = f"{search.early.prompts:.0%} of the harmful prompts"
    table = Table(title=f"Early look ({share}) and the worst harmful score at the end", title_justify="left")
    for heading in ("after attack", "trials", "Spearman", "stopped", "recommended one stopped", "regret in worst HS"):
        table.add_column(heading)
    for one in found:
        rank = "–" if one.spearman is None else f"{one.spearman:.2f}"
        table.add_row(escaped(one.attack), str(one.trials), rank, f"{one.stopped:.0%}", f"{one.lost:.0%}", f"{one.regret:+.3f}")
    console.print(table)
    say(
        f"  ASHA with reduction_factor {search.early.reduction_factor:g}, means over {ORDERS} random orders of arrival. "
        "A dash: all trials have the same score, so it ranks nothing."
    )
    return found


def signals_of(run: Run, finished: Sequence[Record]) -> dict[str, list[float]]:
    """Return the early harmful scores of trials by attack, for attacks that all of them have.

    Args:
        run: The search's own run.
        finished: Records of finished trials.

    Raises:
        ArtifactError: A trial's answers are not there, or were made with other settings.
    """
    share, found = section(run.config).early.prompts, list[dict[str, float]]()
    for record in finished:
        trial = Run(resolved(run.config, record["parameters"])[1], base=run)
        if trial.evaluated.fingerprint != record["fingerprint"]:
            raise ArtifactError(f"trial {record['trial']} was made with other settings or inputs; run `pharmacist search` again")
        rows = asked(trial, share)
        folders: dict[str, list[StoragePath]] = {}
        for attack in trial.config.attacks:
            folders[attack.name] = [trial.answers(replace(variant, attack=attack)) for variant in trial.variants]
        found.append({name: score(some, rows) for name, some in folders.items()})
    return {name: [one[name] for one in found] for name in found[0] if all(name in one for one in found)}


def agreement(attack: str, finished: Sequence[Record], signals: Sequence[float], search: SearchConfig) -> Agreement:
    """Return what an early look is worth, by letting Ray Tune's own scheduler decide about the finished trials.

    Args:
        attack: Name of the attack.
        finished: Records of finished trials.
        signals: Their early harmful scores.
        search: The search section.
    """

    def chosen(trials: Sequence[Record]) -> Mapping[str, Any]:
        return recommend(trials, search.tolerance, search.time_tolerance)[0]

    best, generator = chosen(finished), np.random.default_rng(0)
    after: dict[tuple[int, ...], Mapping[str, Any]] = {}
    stopped, lost, regret = [], [], []
    for _ in range(ORDERS):
        kept = tuple(sorted(_kept(signals, generator.permutation(len(finished)).tolist(), search.early)))
        if kept not in after:
            after[kept] = chosen([finished[place] for place in kept])
        stopped.append(1 - len(kept) / len(finished))
        lost.append(best["trial"] not in {finished[place]["trial"] for place in kept})
        regret.append(after[kept]["worst_hs"] - best["worst_hs"])
    rank = spearman(signals, [record["worst_hs"] for record in finished])
    return Agreement(attack, len(finished), rank, float(np.mean(stopped)), float(np.mean(lost)), float(np.mean(regret)))


def _kept(signals: Sequence[float], order: Sequence[int], early: EarlyConfig) -> list[int]:
    """Return the places of the trials that ASHA lets go on if they arrive in this order."""
    scheduler, kept = asha(early), []
    for place in order:
        trial = SimpleNamespace(trial_id=str(place))
        scheduler.on_trial_add(None, trial)
        if scheduler.on_trial_result(None, trial, {SIGNAL: signals[place], LOOKS: 1}) != TrialScheduler.STOP:
            kept.append(place)
    return kept


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return the rank correlation, equal values sharing their mean rank; None if all of one side are equal."""
    one, other = (_ranks(np.asarray(side)) for side in (a, b))
    return None if np.ptp(one) == 0 or np.ptp(other) == 0 else float(np.corrcoef(one, other)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    below, equal = (values[:, None] > values).sum(axis=1), (values[:, None] == values).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2)
