"""Try many settings against each other: trials under Ray Tune, their table, the Pareto front, and which setting to take.

Ray Tune decides what is tried, and when; what a trial found is known from its own record (see `trial`), never from Ray Tune's files.
So resuming is doing it again: a finished trial answers from its record at once, which also tells the searcher of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
from ray import tune
from rich.table import Table

from pharmacist_ray.config.load import dump_config, located
from pharmacist_ray.config.schema import Config, ResourcesConfig, SearchConfig
from pharmacist_ray.errors import ArtifactError, ConfigError, ResourceError
from pharmacist_ray.pipeline.console import bar, console, escaped, followed, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.session import connected, needed_by
from pharmacist_ray.pipeline.stages import check, run_fit, run_ingest, run_score, run_select
from pharmacist_ray.search.early import SIGNAL, asha
from pharmacist_ray.search.front import OBJECTIVES, on_front, recommend
from pharmacist_ray.search.space import (
    Point,
    check_space,
    decoded,
    described,
    drawn_from,
    resolved,
    section,
    trial_config,
    trial_name,
)
from pharmacist_ray.search.trial import Record, read_records, record_file, run_trial, write_record
from pharmacist_ray.search.tuning import optuna_search, run_trials
from pharmacist_ray.storage import StoragePath, json_of, write_parquet, write_text

NUMBERS = [f"{name}{end}" for name in ("worst_hs", "mean_hs", "task_accuracy", "over_refusal") for end in ("", "_low", "_high")]
"""A trial's numbers with their intervals."""


def run_search(config: Config, *, resume: bool = False) -> StoragePath:
    """Run the search of a configuration, or what is missing of it, and return the folder with its results.

    ``trials.parquet`` has a row a trial, ``recommendation.json`` and ``recommended.yaml`` have the setting to take. A trial that fails
    is recorded and does not end the search; running the search again tries it again.

    Args:
        config: A configuration with a ``search`` section.
        resume: Go on in a folder that holds the trials of another ``search`` section; those that fit this one are kept.

    Raises:
        PharmacistError: The space has a mistake, the cluster has no room, or no trial finished.
    """
    config = located(config)
    search, run = section(config), Run(config)
    check(run)
    points = check_space(run)
    read, folder = reader(run, points), _claim(run, search, resume)
    say(f"[dim]run directory: {escaped(run.root)}[/]")
    with connected(config.resources, trials=search.concurrent):
        check_trial_room(config.resources, search.concurrent)
        _prepare(run, points)
        total = len(points) or search.trials or 0
        say(f"[bold]search[/] {total} trials, {search.concurrent} at a time: {escaped(', '.join(search.space))}")
        with _watched(read, total, run.root):
            _tune(run, points, read)
    for record in read():
        if record["status"] == "running":  # its process died without a word
            error = "the trial's process died; the memory may have run out"
            write_record(record_file(run.root, record["trial"]), record | {"status": "failed", "error": error})
    _conclude(run, read())
    return folder


def check_trial_room(resources: ResourcesConfig, trials: int) -> None:
    """Fail at once where trials that run at the same time would wait for each other's workers.

    Each trial takes its own share for its process, and at any time either the workers of its training runs or its actors, with one
    CPU for what reads for them.

    Raises:
        ResourceError: Says what is asked for and what there is.
    """
    if os.environ.get("PHARMACIST_AUTOSCALING") == "1":
        return
    total = ray.cluster_resources()
    for kind, amount in needed_by(resources, trials).items():
        if amount > total.get(kind, 0.0) + 1e-9:
            raise ResourceError(
                f"{trials} trials at a time need {amount:g} {kind} but the cluster has {total.get(kind, 0.0):g}; lower "
                "search.concurrent, resources.workers, parallel_runs or actors, or set PHARMACIST_AUTOSCALING=1 if it can grow"
            )


def _claim(run: Run, search: SearchConfig, resume: bool) -> StoragePath:
    """Take the run directory's search folder for this section of the configuration."""
    # What changes no trial may change: a search is also gone on with in more trials at a time, or without ASHA.
    how = {"concurrent", "tolerance", "time_tolerance", "scheduler", "early"}
    folder, asked = run.root / "search", search.model_dump(mode="json", exclude=how)
    file = folder / "search.json"
    try:
        before = json_of(file) if file.exists() else asked
        if before != asked and not resume:
            raise ArtifactError(
                f"{folder} holds the trials of another `search` section; pass --resume to go on with this one and keep what fits, "
                "or choose another run_dir"
            )
        write_text(json.dumps(asked, indent=1), file)
        write_text(dump_config(run.config), run.root / "config.yaml")
    except OSError as error:
        raise ConfigError(f"cannot write to run_dir={run.root}: {error.strerror}; choose another folder") from error
    except ValueError as error:
        raise ArtifactError(f"{file} is broken: {error}; remove it to go on") from error
    return folder


def _prepare(run: Run, points: Sequence[Point]) -> None:
    """Make what trials share before the first one starts: rows always, scores if trials select by the configured ones."""
    own = Run(trial_config(run.config, {}))
    run_ingest(run)
    same = [Run(resolved(run.config, point)[1], base=run).scored.fingerprint == run.scored.fingerprint for point in points]
    varied = any(key.split(".")[0] in ("seed", "model", "data", "selector", "scoring") for key in section(run.config).space)
    if any(same) or (not points and not varied):
        for stage in (run_fit, run_score, run_select):
            stage(own)


def _tune(run: Run, points: Sequence[Point], read: Callable[[], list[Record]]) -> None:
    """Let Ray Tune run the trials; it returns when all have ended, one way or the other."""
    search = section(run.config)
    settings: dict[str, Any] = {}
    if points:
        space: dict[str, Any] = {"number": tune.grid_search(list(range(len(points))))}
    else:
        space = {}
        settings |= {"search_alg": optuna_search(search, read(), OBJECTIVES), "num_samples": search.trials}
    if search.scheduler == "asha":
        settings |= {"scheduler": asha(search.early)}
    work = tune.with_parameters(_trial, base=run, points=list(points))
    run_trials(work, space, root=run.root, kind="search", concurrent=search.concurrent, **settings)


def _trial(drawn: dict[str, Any], base: Run, points: list[Point]) -> dict[str, Any]:
    """Run a trial in the process that Ray Tune gives it."""
    search = section(base.config)
    report = tune.report if search.scheduler == "asha" else None
    if points:
        return run_trial(base, points[drawn["number"]], report=report)
    return run_trial(base, decoded(search, drawn), drawn, report)


def reader(run: Run, points: Sequence[Point]) -> Callable[[], list[Record]]:
    """Return what reads the records of this search: of its points in their order, or of what was drawn from its space."""
    search = section(run.config)
    if not points:
        return lambda: [record for record in read_records(run.root) if drawn_from(search, record["drawn"])]
    places = {trial_name(resolved(run.config, point)[0]): place for place, point in enumerate(points)}
    return lambda: sorted(
        (record for record in read_records(run.root) if record["trial"] in places), key=lambda record: places[record["trial"]]
    )


@contextmanager
def _watched(read: Callable[[], list[Record]], total: int, root: StoragePath) -> Iterator[None]:
    """Show how many trials are done, running and failed, and the best so far."""
    since = time.time()

    def look() -> None:
        done, line = _state(read(), since)
        show(done, total, f" · {escaped(line)}")

    with bar("search (trials)") as show, followed(look, [root]):
        yield


def _state(records: Sequence[Record], since: float) -> tuple[int, str]:
    """Return how many trials are over, and the rest in words; one that ran before ``since`` is not running now."""
    running = [record for record in records if record["status"] == "running" and record["started_at"] >= since]
    finished = [record for record in records if record["status"] == "finished"]
    failed, stopped = (sum(record["status"] == status for record in records) for status in ("failed", "stopped"))
    text = f"{len(running)} running ({', '.join(record['stage'] for record in running)})" if running else "0 running"
    text += f", {failed} failed" + (f", {stopped} stopped" if stopped else "")
    if finished:
        best = min(finished, key=lambda record: (record["worst_hs"], -record["task_accuracy"]))
        text += f", best worst HS {best['worst_hs']:.2f} at task accuracy {best['task_accuracy']:.2f}"
    return len(finished) + failed + stopped, text


def _conclude(run: Run, records: Sequence[Record]) -> None:
    """Write the table of trials and the recommendation, and print the front."""
    folder, search = run.root / "search", section(run.config)
    finished = [record for record in records if record["status"] == "finished"]
    best = {record["trial"] for record, front in zip(finished, on_front(finished, search.time_tolerance), strict=True) if front}
    write_parquet(trials_table(records, best), folder / "trials.parquet")
    failed = [record for record in records if record["status"] == "failed"]
    for record in failed:
        say(f"  [red]trial {record['trial']} failed[/] ({escaped(described(record['parameters']))}): {escaped(record['error'])}")
    if stopped := [record for record in records if record["status"] == "stopped"]:
        say(f"  stopped after the early look: {len(stopped)} of {len(records)} trials; they stand for no choice")
    if not finished:
        (folder / "recommendation.json").unlink(missing_ok=True)
        raise ArtifactError(f"none of the {len(records)} trials finished; their errors are in {folder / 'trials'}")
    chosen, reason = recommend(finished, search.tolerance, search.time_tolerance)
    file = folder / "recommended.yaml"
    # A folder of its own: running it does not touch the search's.
    again = trial_config(run.config, chosen["parameters"]).model_copy(update={"run_dir": run.root / "recommended"})
    write_text(f"# Trial {chosen['trial']} of a search as a plain run.\n{dump_config(again)}", file)
    found: Record = {"trial": chosen["trial"], "reason": reason, "config_path": str(file)}
    found |= {"command": f"pharmacist run --config {file}", "parameters": chosen["parameters"]}
    found |= {name: chosen[name] for name in (*NUMBERS, "align_seconds", "attacks")}
    write_text(json.dumps(found, indent=1), folder / "recommendation.json")
    console.print(_front_table([record for record in finished if record["trial"] in best], chosen["trial"], len(records)))
    say(f"  recommended: trial {chosen['trial']} ({escaped(described(chosen['parameters']))}). {escaped(reason)}")
    say(f"  all trials: {escaped(folder / 'trials.parquet')}; to reproduce: {escaped(found['command'])}")


def trials_table(records: Sequence[Record], front: set[str]) -> pa.Table:
    """Return the table of all trials: parameters as JSON text, numbers with intervals, whether each is on the front.

    Args:
        records: The records, also of failed trials and of those that were stopped.
        front: Names of the trials on the Pareto front.
    """
    keys = list(dict.fromkeys(key for record in records for key in record["parameters"]))
    columns: dict[str, pa.Array] = {
        "trial": pa.array([record["trial"] for record in records], pa.string()),
        "status": pa.array([record["status"] for record in records], pa.string()),
        "error": pa.array([record.get("error", "") for record in records], pa.string()),
        "fingerprint": pa.array([record["fingerprint"] for record in records], pa.string()),
    }
    for key in keys:
        columns[f"param.{key}"] = pa.array([json.dumps(record["parameters"].get(key)) for record in records], pa.string())
    for name in (*NUMBERS, "align_seconds", "seconds", SIGNAL):
        columns[name] = pa.array([record.get(name) for record in records], pa.float64())
    columns["front"] = pa.array([record["trial"] in front for record in records], pa.bool_())
    columns["attacks"] = pa.array([json.dumps(record.get("attacks", {})) for record in records], pa.string())
    return pa.table(columns)


def _front_table(front: Sequence[Record], chosen: str, of: int) -> Table:
    keys = list(front[0]["parameters"])
    table = Table(title=f"Pareto front: {len(front)} of {of} trials, in brackets 95 % intervals", title_justify="left")
    for heading in ("", "trial", *keys):
        table.add_column(escaped(heading), overflow="fold")
    for heading in ("worst HS", "mean HS", "task accuracy", "over-refusal", "align s"):
        table.add_column(heading, no_wrap=True)
    for record in sorted(front, key=lambda one: one["worst_hs"]):
        numbers = [
            f"{record[name]:.2f} \\[{record[f'{name}_low']:.2f}, {record[f'{name}_high']:.2f}]"
            for name in ("worst_hs", "mean_hs", "task_accuracy", "over_refusal")
        ]
        values = [escaped(record["parameters"].get(key)) for key in keys]
        table.add_row(
            "→" if record["trial"] == chosen else "", record["trial"], *values, *numbers, f"{record['align_seconds']:.1f}"
        )
    return table
