"""Trials under Ray Tune: what decides which are tried, when, and which are stopped."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune

from pharmacist_ray.pipeline.session import TRIAL_CPUS
from pharmacist_ray.runtime.workers import storage_of
from pharmacist_ray.search.early import LOOKS
from pharmacist_ray.search.space import Space, domains
from pharmacist_ray.search.trial import Record, read_record, record_file, write_record
from pharmacist_ray.storage import StoragePath, remove_tree


def run_trials(
    work: Callable[..., Any], space: dict[str, Any], *, root: StoragePath, kind: str, concurrent: int, **settings: Any
) -> None:
    """Let Ray Tune run trials; return when all have ended, one way or the other.

    Their records are all that is kept: Ray Tune's own files are removed.

    Args:
        work: Runs a trial, from what was drawn for it.
        space: What is drawn, as Ray Tune takes it.
        root: The run directory.
        kind: ``search`` or ``redteam``, whose records the trials write.
        concurrent: Trials at the same time.
        settings: More of Ray Tune's ``TuneConfig``: ``search_alg``, ``num_samples``, ``scheduler``.
    """
    # Ctrl-C ends the trials here as everywhere.
    os.environ |= {"TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    storage = root / kind / ".tune"
    callbacks = [_Stopped(root, kind)] if "scheduler" in settings else []
    tuning = tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=True, **settings)
    run_config = tune.RunConfig(name=uuid.uuid4().hex[:8], **storage_of(storage), verbose=0, callbacks=callbacks)
    try:
        trainable = tune.with_resources(work, {"CPU": TRIAL_CPUS})
        tune.Tuner(trainable, param_space=space, tune_config=tuning, run_config=run_config).fit()
    finally:
        remove_tree(storage)


def optuna_search(search: Space, before: Sequence[Record], objectives: Mapping[str, str]) -> Any:
    """Return Optuna's searcher, told to begin with the points that were tried before, those that have finished first.

    Args:
        search: What is drawn from; algorithm ``tpe`` or ``nsga2``.
        before: Records of what was tried.
        objectives: Number of a trial → ``min`` or ``max``.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = sorted(before, key=lambda record: record["status"] != "finished")
    # A resumed search draws on, it does not draw the same again.
    trials, seed = search.trials or 1, search.seed + len(known)
    sampler = (
        # Both begin with random draws, by default as many as a small search has trials at all (ours: a third, a quarter).
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, min(10, trials // 3)))
        if search.algorithm == "tpe"
        else optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, min(50, trials // 4)))
    )
    one = len(objectives) == 1
    return OptunaSearch(
        space=OptunaSearch.convert_search_space(domains(search)),
        metric=next(iter(objectives)) if one else list(objectives),
        mode=next(iter(objectives.values())) if one else list(objectives.values()),
        sampler=sampler,
        points_to_evaluate=[record["drawn"] for record in known][:trials],
    )


class _Stopped(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Writes down that a trial was stopped: its own process ends where it reported."""

    def __init__(self, root: StoragePath, kind: str) -> None:
        self.root, self.kind = root, kind

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Mark the record of a trial that Ray Tune ended after the early look; one that fails comes to ``on_trial_error``."""
        last = trial.last_result or {}
        if last.get(LOOKS) == 1:
            file = record_file(self.root, last["trial"], self.kind)
            if (record := read_record(file)).get("status") == "running":
                write_record(file, record | {"status": "stopped"})
