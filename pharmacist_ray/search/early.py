"""The early look at a trial: a cheap signal that Ray Tune's ASHA stops trials by.

ASHA (asynchronous successive halving, arXiv 1810.05934) decides about a trial when its signal arrives, from those that arrived before:
which trials are stopped depends on timing, and two runs of one search may stop different ones. The first trial is never stopped. The
signal is a harmful score alone, so ASHA knows nothing of accuracy, and a search with it has a thinner Pareto front at the harmful end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler

from pharmacist_ray.config.schema import EarlyConfig
from pharmacist_ray.data.rows import count_rows, iterate_rows, parquet_files, sample_rows, write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError
from pharmacist_ray.evaluation.answers import answer_all
from pharmacist_ray.evaluation.beside import labels_of, settle
from pharmacist_ray.evaluation.judges import JUDGES, Verdict
from pharmacist_ray.pipeline.artifacts import digest
from pharmacist_ray.pipeline.attacks import asked_in, run_attack
from pharmacist_ray.pipeline.evaluations import served_from
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.sharing import lock_missing
from pharmacist_ray.pipeline.variants import Variant
from pharmacist_ray.search.space import early_attack
from pharmacist_ray.storage import StoragePath, read_table

SIGNAL, LOOKS = "early_hs", "looks"
"""What a trial reports to Ray Tune: its early harmful score, and 1 for the early look or 2 at its end."""


def asha(early: EarlyConfig, mode: str = "min") -> ASHAScheduler:
    """Return Ray Tune's scheduler with one rung, the early look.

    Args:
        early: What is looked at.
        mode: ``min`` keeps trials with a low harmful score, ``max`` those with a high one, which an attacker wants.
    """
    factor = early.reduction_factor
    return ASHAScheduler(time_attr=LOOKS, metric=SIGNAL, mode=mode, max_t=2, grace_period=1, reduction_factor=factor)


def told(report: Callable[[dict[str, Any]], None] | None, trial: str, signal: float) -> dict[str, Any]:
    """Report an early look, if there is somebody to hear of it, and return what ASHA wants to hear again at the end.

    Args:
        report: Ray Tune's; it may end the trial there (it raises ``SystemExit``).
        trial: The trial's name.
        signal: Its early harmful score.
    """
    if report:
        report({"trial": trial, SIGNAL: signal, LOOKS: 1})
    return {"trial": trial, SIGNAL: signal, LOOKS: 2}


def look(run: Run, early: EarlyConfig) -> float:
    """Return the early harmful score of a trial whose models are aligned: run one attack and ask a part of the harmful prompts.

    The attack is the one that the whole trial needs; only the few answers are given twice if the trial goes on. Of a trial that was
    evaluated nothing is made.

    Args:
        run: The trial's run.
        early: Which attack, and how many of the prompts.

    Raises:
        DataError: No answer was judged.
    """
    settings = run.config.evaluation
    assert settings is not None  # `check_space` looked
    only = Run(run.config.model_copy(update={"attacks": [early_attack(early, run.config)]}), base=run.base)
    run_attack(only)
    rows = asked(run, early.prompts)
    place = run.root / "search" / "early" / digest([row.id for row in rows])[:8]

    def folder(variant: Variant) -> StoragePath:
        whole = run.answers(variant)
        return whole if run.evaluated.ready and any(whole.glob("*.parquet")) else place / whole.name

    def answered(variant: Variant) -> bool:
        return any(folder(variant).glob("*.parquet")) and count_rows(folder(variant)) >= len(rows)

    variants = [one for variant in only.variants for one in only.attacks_on(variant)]
    with lock_missing(run, variants, folder, answered) as missing:
        if missing:
            write_rows(rows, place / "prompts.parquet")
            answer_all(
                {folder(variant): only.model_of(variant) for variant in missing},
                {"harmful": place / "prompts.parquet"},
                settings=settings,
                resources=run.config.resources,
                forms={folder(one): form for one in missing if one.attack and (form := asked_in(only, one.attack))},
                judgements=run.judgements,
                served=served_from(run),
            )
    labels = labels_of(row.response for row in iterate_rows(run.ingested("eval-task").folder / "rows"))
    guesses = JUDGES[settings.judges[0].kind].guesses
    return score([folder(variant) for variant in variants], rows, guesses=guesses, labels=labels)


def asked(run: Run, share: float) -> list[Row]:
    """Return the harmful prompts of the early look: at least one, drawn by a hash of their ids.

    Args:
        run: A run with its prompts ingested.
        share: Share of the prompts.
    """
    rows = run.ingested("eval-harmful").folder / "rows"
    return sample_rows(rows, max(1, math.ceil(share * count_rows(rows) - 1e-9)), seed=0)


def score(
    folders: Sequence[StoragePath],
    rows: Sequence[Row],
    *,
    guesses: Collection[Verdict] = (),
    labels: Collection[tuple[str, ...]] = (),
) -> float:
    """Return the mean over models of the share of harmful answers to some prompts; what was not judged is left out.

    Args:
        folders: Folders of judged answers, one a model.
        rows: The prompts.
        guesses: Verdicts that an answer beside the point may have; see `settle`.
        labels: Those of the user's task.

    Raises:
        DataError: A model has no judged answer.
    """
    wanted = {row.id for row in rows}
    shares = []
    for folder in folders:
        answers: list[dict[str, Any]] = [one for file in parquet_files(folder) for one in read_table(file).to_pylist()]
        mine = [one for one in answers if one["set"] == "harmful" and one["id"] in wanted]
        verdicts = settle(
            [one["prompt"] for one in mine],
            [one["answer"] for one in mine],
            [one["verdict"] or "unjudged" for one in mine],
            guesses=guesses,
            labels=labels,
        )
        known = [verdict == "harmful" for verdict in verdicts if verdict != "unjudged"]
        if not known:
            raise DataError(f"no harmful prompt of the early look was answered and judged; see {folder}")
        shares.append(np.mean(known))
    return float(np.mean(shares))
