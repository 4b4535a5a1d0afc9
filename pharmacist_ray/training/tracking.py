"""Training curves in the tools that people watch them with: TensorBoard, Weights & Biases, MLflow.

They only mirror what a run writes itself, so none is needed. Each library is imported when it is asked for, keeps its files under the
run's own folder, and uses the network only where the user configured it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pharmacist_ray.errors import ConfigError
from pharmacist_ray.plugins import Plugin, Table, blaming

Log = Callable[[int, Mapping[str, float | None]], None]
"""(step counted from 1, curve → value); values that are None are left out."""

FLUSH_S = 10
"""Seconds after which TensorBoard sees a point, and at most what a killed worker loses (ours)."""

PARAM_CHARACTERS = 6000
"""Longest value of a parameter that MLflow takes (MLflow 3: MAX_PARAM_VAL_LENGTH)."""

KEY_CHARACTERS = 250
"""Longest name of a parameter that MLflow takes (MLflow 3: MAX_ENTITY_KEY_LENGTH)."""


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told about a run."""

    run: str
    """Its name, as shown."""
    folder: Path
    """Existing and absolute; the tracker's own files go under it."""
    project: str
    """What W&B calls a project and MLflow an experiment."""
    settings: dict[str, Any]
    """What JSON can hold: strings, numbers, None, lists and dictionaries with string keys."""
    artifact: str = ""
    """Folder or URI where the weights will be when the run has ended well."""

    @property
    def key(self) -> str:
        """The same for every start of this run, so that a run that resumes goes on with its curves."""
        return hashlib.sha256(f"{self.project}\0{self.folder}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Tracker:
    """One tool."""

    open: Callable[[Tracked], AbstractContextManager[Log]]
    """Starts or resumes the run, and ends it; a run that ends by an exception is marked as failed where the tool can."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Module → what to ``pip install`` for it."""


@contextmanager
def tracked(
    names: Sequence[str], *, run: str, folder: Path, project: str, settings: Mapping[str, Any], artifact: str = ""
) -> Iterator[Log]:
    """Yield one function that logs to all named trackers; close them all at the end, also after an exception.

    Called again for the same folder and project, the curves of the earlier call go on. Only the first worker calls it.

    Args:
        names: Keys of ``TRACKERS``, or plug-ins' names; with none, the function does nothing.
        run: The run's name, as shown.
        folder: Where the trackers keep their files; made if missing, and not to be moved while they are open.
        project: Groups runs (a W&B project, an MLflow experiment).
        settings: Shown beside the curves; nested as the configuration is. What JSON cannot hold becomes text.
        artifact: Folder or URI of the weights, to which the tools link.

    Raises:
        ConfigError: A name is unknown, a library is missing, or a tool refuses to start (not logged in, no such server).
        PluginError: A plug-in failed.
    """
    check_trackers(names)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    about = Tracked(run, folder, project, json.loads(json.dumps(dict(settings), default=str)), artifact)
    with ExitStack() as stack:
        logs = [stack.enter_context(TRACKERS[name].open(about)) for name in dict.fromkeys(names)]

        def log(step: int, values: Mapping[str, float | None]) -> None:
            if kept := {name: value for name, value in values.items() if value is not None}:
                for each in logs:
                    each(step, kept)

        yield log


def check_trackers(names: Sequence[str]) -> None:
    """Check that all named trackers are known and installed here, without importing their libraries.

    Raises:
        ConfigError: Names the unknown tracker, or what to install.
        PluginError: A plug-in cannot be imported.
    """
    for name in names:
        if missing := [package for module, package in TRACKERS[name].packages.items() if not _installed(module)]:
            raise ConfigError(f"tracker '{name}' needs packages that are not installed; pip install {' '.join(missing)}")


def _installed(module: str) -> bool:
    # A folder `wandb` in the working directory, which W&B makes, passes as a package without origin.
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


@contextmanager
def _tensorboard(about: Tracked) -> Iterator[Log]:
    """Write event files into ``tensorboard/``, opened at the first logged step.

    A resumed run repeats the steps after its checkpoint. Its new event file starts with ``purge_step``, the first step it logs, and
    TensorBoard then drops the earlier points from that step on.
    """
    from tensorboardX import SummaryWriter

    folder = about.folder / "tensorboard"
    writer: Any = None

    def log(step: int, values: Mapping[str, float | None]) -> None:
        nonlocal writer
        if writer is None:
            fresh = not any(folder.glob("*tfevents*"))
            # Files are named by the second, and a second one of that name would replace the first.
            suffix = f".{time.time_ns()}"
            writer = SummaryWriter(str(folder), purge_step=None if fresh else step, flush_secs=FLUSH_S, filename_suffix=suffix)
            if fresh:
                text = json.dumps(about.settings, indent=1)
                writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()), 0)  # Markdown's code block
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _wandb(about: Tracked) -> Iterator[Log]:
    """Log to Weights & Biases, which finds its key and mode itself (``wandb login``, ``WANDB_MODE=offline``)."""
    import wandb

    try:
        run = wandb.init(
            project=about.project,
            name=about.run,
            dir=str(about.folder),
            id=about.key,
            resume="allow",
            config=about.settings,
            # What a worker prints may quote training rows, which are nobody else's business.
            settings=wandb.Settings(console="off"),
        )
    except wandb.errors.Error as error:
        raise _refused("wandb", error, "without network or account, set WANDB_MODE=offline") from error
    # W&B's own counter only goes up and drops what a resumed run logs again, so the curves are drawn over ours.
    run.define_metric("*", step_metric="step")
    failed = 1
    try:
        yield lambda step, values: run.log({**values, "step": step})
        run.summary["artifact"] = about.artifact
        failed = 0
    finally:
        run.finish(exit_code=failed)


@contextmanager
def _mlflow(about: Tracked) -> Iterator[Log]:
    """Log to the MLflow server or store of ``MLFLOW_TRACKING_URI``; without one, to ``mlflow.db`` in the run's folder."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it calls home from the import on
    import mlflow

    local = not os.environ.get("MLFLOW_TRACKING_URI")
    try:
        if local:
            mlflow.set_tracking_uri(f"sqlite:///{about.folder / 'mlflow.db'}")  # MLflow 3 refuses new file stores
        try:
            experiment = mlflow.set_experiment(about.project)
            found = mlflow.search_runs(
                [experiment.experiment_id], f"tags.pharmacist_run = '{about.key}'", max_results=1, output_format="list"
            )
            if found:
                run = mlflow.start_run(run_id=found[0].info.run_id)
            else:
                run = mlflow.start_run(run_name=about.run, tags={"pharmacist_run": about.key})
        except mlflow.MlflowException as error:
            raise _refused("mlflow", error, "look at MLFLOW_TRACKING_URI, or unset it to log to a local file") from error
        with run:
            if not found:
                mlflow.log_params(dict(_params(about.settings)))  # a run's parameters can be set only once
            yield lambda step, values: mlflow.log_metrics(values, step=step)
            mlflow.set_tag("artifact", about.artifact)
    finally:
        if local:
            # MLflow keeps the address in the process and its environment, where the next run would take it for the user's.
            mlflow.set_tracking_uri(None)


def _params(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every leaf as (dotted name, text), both cut to what MLflow takes; a list of plain values is one leaf."""
    children: list[tuple[object, object]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        children = list(enumerate(value))
    for key, child in children:
        yield from _params(child, f"{name}.{key}" if name else str(key))
    if name and not children:
        yield re.sub(r"[^\w.\-]", "_", name, flags=re.ASCII)[:KEY_CHARACTERS], str(value)[:PARAM_CHARACTERS]


def _refused(name: str, error: Exception, what_to_do: str) -> ConfigError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return ConfigError(f"tracker '{name}' cannot start: {reason}; {what_to_do}")


def _watched(tracker: Tracker, plugin: Plugin) -> Tracker:
    @contextmanager
    def opened(about: Tracked) -> Iterator[Log]:
        with blaming(plugin):
            context = tracker.open(about)
            log = context.__enter__()

        def blamed(step: int, values: Mapping[str, float | None]) -> None:
            with blaming(plugin):
                log(step, values)

        try:
            yield blamed
        except BaseException as error:
            with blaming(plugin):
                context.__exit__(type(error), error, error.__traceback__)
            raise  # a tracker does not decide whether a run has failed
        with blaming(plugin):
            context.__exit__(None, None, None)

    return replace(tracker, open=opened)


_OWN = {
    "tensorboard": Tracker(_tensorboard, {"tensorboardX": "tensorboardX"}),
    "wandb": Tracker(_wandb, {"wandb": "wandb"}),
    "mlflow": Tracker(_mlflow, {"mlflow": "mlflow-skinny", "sqlalchemy": "SQLAlchemy", "alembic": "alembic"}),
}

TRACKERS = Table("tracker", Tracker, _OWN, watched=_watched)
"""Every tracker by its name in the configuration."""
