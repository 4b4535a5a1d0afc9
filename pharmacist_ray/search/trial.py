"""One trial of a search: a point of the space goes through the stages, and a small file says how far it is and what it was worth."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pharmacist_ray.config.schema import EarlyConfig
from pharmacist_ray.errors import DataError, PharmacistError
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.session import connected
from pharmacist_ray.pipeline.stages import STAGES
from pharmacist_ray.search.early import SIGNAL, look, told
from pharmacist_ray.search.front import OBJECTIVES
from pharmacist_ray.search.space import resolved, section, trial_name
from pharmacist_ray.storage import StoragePath, json_of, matching, write_text

Record = dict[str, Any]
"""What ``search/trials/<trial>.json`` holds: ``trial``, ``status`` (running, finished, failed, stopped), ``stage``, ``error``,
``fingerprint`` (of the evaluation), ``parameters``, ``drawn``, ``started_at``, ``seconds``, for a trial that was looked at early
``early`` and ``early_hs``, and for a finished trial what `measured` returns."""

METRICS = {"task_accuracy": "accuracy_correct", "over_refusal": "over_refusal"}
"""A trial's number → the metric of the evaluation."""


def run_trial(
    base: Run,
    point: Mapping[str, Any],
    drawn: Mapping[str, Any] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Take a point through all stages, and return what it is judged by (`OBJECTIVES`).

    Its record is written as it goes and names the stage it is at. A trial that has finished before, from just these inputs, is not
    run again, nor is one that was stopped after the same early look; one that was interrupted finds its finished artifacts.

    Args:
        base: The search's own run.
        point: What the trial has otherwise.
        drawn: The point as the searcher drew it; kept, so that the searcher can be told of it again.
        report: Told of the early look at the trial, which it may end there (it raises ``SystemExit``); without it there is none.

    Raises:
        PharmacistError: What a stage raised, after it was recorded.
    """
    search = section(base.config)
    point, config = resolved(base.config, point)
    run, file = Run(config, base=base), record_file(base.root, trial_name(point))
    fingerprint, known = run.evaluated.fingerprint, read_record(file)
    how, seen = search.early.model_dump(include={"attack", "prompts"}), dict[str, Any]()
    same, status = known.get("fingerprint") == fingerprint, known.get("status")
    if same and (status == "finished" or (status == "stopped" and report and known["early"] == how)):
        if report:  # those that come later are compared with it
            seen = told(report, file.stem, known[SIGNAL] if known.get("early") == how else look(run, search.early))
        return seen | {name: known[name] for name in OBJECTIVES if name in known}
    record: Record = {"trial": file.stem, "status": "running", "fingerprint": fingerprint, "parameters": point}
    record |= {"drawn": dict(drawn or {}), "started_at": time.time()}

    def before(stage: str) -> None:
        nonlocal seen
        if stage == "attack" and report:
            seen = look_early(run, file, record, search.early, how, report)

    go_through(run, file, record, before, measured)
    return seen | {name: record[name] for name in OBJECTIVES}


def look_early(
    run: Run,
    file: StoragePath,
    record: Record,
    early: EarlyConfig,
    how: Mapping[str, Any],
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Look at a trial early, keep what was seen in its record, and report it; return what ASHA wants to hear again at the end.

    Args:
        run: The trial's run.
        file: Where the record lies.
        record: It, filled in place.
        early: After which attack, and with how many prompts.
        how: What of that a later look must share to be the same.
        report: Told of it; it may end the trial.
    """
    write_record(file, record | {"stage": "early look"})
    record |= {"early": dict(how), SIGNAL: look(run, early)}
    write_record(file, record | {"stage": "early look", "seconds": round(time.time() - record["started_at"], 3)})
    return told(report, record["trial"], record[SIGNAL])


def go_through(
    run: Run,
    file: StoragePath,
    record: Record,
    before: Callable[[str], None],
    measure: Callable[[Sequence[Mapping[str, Any]]], Record],
) -> None:
    """Take a trial through all stages, and keep its record, which ends with its numbers or with what went wrong.

    Args:
        run: The trial's run.
        file: Where the record lies.
        record: It, filled in place.
        before: Called before each stage with its name; what it raises ends the trial.
        measure: Makes the numbers out of the evaluation's ``table.json``.

    Raises:
        PharmacistError: What a stage raised, after it was recorded.
    """
    started = time.perf_counter()
    try:
        with connected(run.config.resources):
            for stage, work in STAGES.items():
                if stage == "report":
                    continue
                before(stage)
                write_record(file, record | {"stage": stage})
                work(run)
        record |= {"status": "finished"} | measure(json_of(run.evaluated.folder / "table.json"))
    except Exception as error:
        # Ours are one line; a bug keeps its traceback, beside the record.
        text = str(error) if isinstance(error, PharmacistError) else f"{type(error).__name__}: {error}; see {file.stem}.log"
        write_text(traceback.format_exc(), file.with_suffix(".log"))
        record |= {"status": "failed", "error": " ".join(text.split())}
        raise
    finally:
        if record["status"] != "running":  # what was stopped from outside is not over
            write_record(file, record | {"seconds": round(time.perf_counter() - started, 3)})


def measured(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a trial's numbers from the table of its evaluation, which has one row an attack with means over all seeds.

    ``attacks`` has each attack's harmful score, ``worst_hs`` is the highest of them, with that attack's interval. ``mean_hs``,
    ``task_accuracy`` and ``over_refusal`` are means over the attacks; their bounds are the means of the attacks' bounds, which is as
    wide as if all attacks erred together.

    Args:
        table: ``table.json`` of an evaluation of one selection and one defence.

    Raises:
        DataError: Nothing was asked, or no answer was judged.
    """
    attacked = [row for row in table if row["attack"] is not None and "over" not in row]
    found: dict[str, Any] = {"attacks": {}, "align_seconds": float(attacked[0]["align_seconds"])}
    bounds = ("estimate", "low", "high")
    for name, metric in {"hs": "harmful_score", **METRICS}.items():
        per_attack = [[row["metrics"].get(metric, {}).get(bound) for bound in bounds] for row in attacked]
        if any(value is None for values in per_attack for value in values):
            raise DataError(f"the evaluation has no {metric}: no prompt of its kind was answered and judged; see its answers")
        mean = dict(zip(bounds, map(float, np.mean(per_attack, axis=0)), strict=True))
        means = {"mean_hs" if name == "hs" else name: mean}
        if name == "hs":
            found["attacks"] = {row["attack"]: values[0] for row, values in zip(attacked, per_attack, strict=True)}
            means["worst_hs"] = dict(zip(bounds, max(per_attack), strict=True))
        for what, values in means.items():
            found |= {what: values["estimate"], f"{what}_low": values["low"], f"{what}_high": values["high"]}
    return found


def record_file(root: StoragePath, trial: str, kind: str = "search") -> StoragePath:
    """Return where the record of a trial of a kind lies, of the ``search`` or of the ``redteam``."""
    return root / kind / "trials" / f"{trial}.json"


def read_record(file: StoragePath) -> Record:
    """Return a record, an empty one if there is none."""
    try:
        return dict(json_of(file))
    except (OSError, ValueError):
        return {}


def read_records(root: StoragePath, kind: str = "search") -> list[Record]:
    """Return all records of a kind, in the order in which the trials started."""
    found = [read_record(file) for file in matching(root / kind / "trials", "*.json")]
    return sorted((record for record in found if record), key=lambda record: record["started_at"])


def write_record(file: StoragePath, record: Record) -> None:
    """Write a record so that it is never lost: whoever reads it finds the old one or the new one."""
    write_text(json.dumps(record, indent=1), file)
