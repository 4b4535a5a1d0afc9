"""Open a run: lock nothing, own nothing of the caller's; write down what is run, connect to Ray where a stage needs it, run the stage."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray

from pharmacist_ray.config.finetune import UNREPAIRED
from pharmacist_ray.config.load import dump_config, located
from pharmacist_ray.config.schema import Config, ResourcesConfig
from pharmacist_ray.curation.scorers import SCORERS
from pharmacist_ray.curation.trainers import EXPORTS
from pharmacist_ray.errors import ConfigError, ResourceError
from pharmacist_ray.evaluation.judges import JUDGES, check_judges
from pharmacist_ray.models.hub import with_model_path, with_proxy_path
from pharmacist_ray.pipeline.console import escaped, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import STAGES, check, made_by, reused, run_ingest
from pharmacist_ray.pipeline.standing import leave_standing
from pharmacist_ray.runtime.private_ray import start_ray
from pharmacist_ray.runtime.tasks import MANY
from pharmacist_ray.storage import write_text
from pharmacist_ray.training.objectives import OBJECTIVES

TRIAL_CPUS = 0.1
"""What the process of a search's trial takes for itself: it starts workers and waits for them."""


def run_stage(name: str, config: Config, *, strict: bool = False) -> Run:
    """Run one stage, or ``run`` for all, and return the run.

    Args:
        name: A stage's name or ``run``.
        config: The configuration.
        strict: A broken row is an error.

    Raises:
        PharmacistError: Whatever the stage raises.
    """
    return run_stages((name,), config, strict=strict, headings=False)


def run_stages(names: Sequence[str], config: Config, *, strict: bool = False, headings: bool = True) -> Run:
    """Run stages one after the other, with a heading each that says what is there already; see `run_stage`."""
    config = located(config)
    given = tuple(names)
    run = Run(config)
    check(run)
    if "evaluate" in names:
        run.config.require_evaluation()  # before an attack takes hours
    if config.evaluation is not None and {"evaluate", "run"} & set(names):
        check_judges(config.evaluation.judges, ready=True)
    begin(config, run)
    if names == ("run",):
        left_out = {"evaluate" if config.evaluation is None else "", "attack" if not config.attacks else ""}
        names, headings = [name for name in STAGES if name not in left_out], True
    with ExitStack() as ray_open:

        def connect() -> None:
            ray_open.enter_context(connected(config.resources))

        for name in names:
            started = time.perf_counter()
            if headings:
                say(f"[bold]{name}[/]{reused(run, name)}")
            if needs_ray(run, name):
                connect()
            if name == "ingest":
                run_ingest(run, strict=strict, connect=connect)
            else:
                STAGES[name](run)
            if headings:
                say(f"  [dim]{time.perf_counter() - started:.1f} s[/]")
    if given != ("report",):
        _leave_standing(given, config, run, names)
    return run


def _leave_standing(command: Sequence[str], config: Config, run: Run, stages: Sequence[str]) -> None:
    """Write down what a command left, unless it hangs on more than files: on a hub's newest commit, or on plug-ins' code."""
    own = run.config
    after = [part for name in own.defences for part in name.split("/") if part != UNREPAIRED]
    judges = [judge.kind for judge in own.evaluation.judges] if own.evaluation else []
    plugged = SCORERS.plugged(own.scoring.scorers) | OBJECTIVES.plugged(after) | JUDGES.plugged(judges)
    models = [own.model.path, *([run.proxied.config.model.path] if run.proxied else [])]
    if plugged | EXPORTS.plugged(own.selection.export) or not all(Path(path).exists() for path in models):
        return
    made = [(stage, made_by(run, stage)) for stage in stages if stage != "report"]
    if all(artifact.ready for _, artifacts in made for artifact in artifacts):
        leave_standing(command, config, made, run.known_files)


def begin(config: Config, run: Run) -> None:
    """Write down what is run, with a hub's model at the commit that it now means, and say where.

    Raises:
        ConfigError: The run directory cannot be written to.
    """
    try:
        proxy = run.config.scoring.proxy
        dumped = with_proxy_path(with_model_path(config, run.config.model.path), proxy.path if proxy else None)
        write_text(dump_config(dumped), run.root / "config.yaml")
    except OSError as error:
        raise ConfigError(f"cannot write to run_dir={run.root}: {error.strerror}; choose another folder") from error
    say(f"[dim]run directory: {escaped(run.root)}[/]")


def needs_ray(run: Run, name: str) -> bool:
    """Whether a stage needs Ray, which takes seconds to start: something of it is missing, and other processes are to make it.

    Training is done by ``resources.workers`` and scoring and evaluation by ``resources.actors``, or in this process where those are 0.
    Ingestion connects by itself where a source is large. Selection is made by tasks where there are many shards, and the report here.
    """
    workers, actors = run.config.resources.workers, run.config.resources.actors
    shards = run.ingested("candidates").manifest().get("summary", {}).get("shards", 0)
    processes = {"fit": workers, "score": actors, "select": int(shards >= MANY)}
    processes |= {"align": workers, "attack": workers, "evaluate": actors}
    return processes.get(name, 0) > 0 and not all(artifact.ready for artifact in made_by(run, name))


def needed_by(resources: ResourcesConfig, trials: int) -> dict[str, float]:
    """Return what trials of a search take at the same time, by Ray's names.

    A trial's process, and either the workers of its training runs or its actors, with one CPU for the tasks that read for them.
    """
    training, actors = resources.workers * resources.parallel_runs, resources.actors
    cpus = TRIAL_CPUS + max(training * resources.cpus_per_worker, actors * resources.cpus_per_worker + 1)
    gpus = resources.gpus_per_worker * max(training, actors)
    return {"CPU": trials * cpus} | ({"GPU": trials * gpus} if gpus else {})


@contextmanager
def connected(resources: ResourcesConfig, *, trials: int = 0) -> Iterator[None]:
    """Be connected to Ray: to the cluster that ``RAY_ADDRESS`` names, to a caller's, or to a private one on this machine.

    A private one has as many logical CPUs as the configured workers and actors need, so that a small machine never waits for itself,
    and is stopped afterwards; a cluster of somebody else's is left as it is.

    Args:
        resources: The resources section.
        trials: Trials of a search at the same time.

    Raises:
        ResourceError: ``RAY_ADDRESS`` names a cluster that cannot be reached, or a private Ray does not start.
    """
    _quiet_ray_data()
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError) as error:
            raise ResourceError(
                f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}; start it, or unset RAY_ADDRESS to run here"
            ) from error
        yield
        return
    wanted = resources.cpus_per_worker * max(resources.workers * resources.parallel_runs, resources.actors)
    start_ray(
        cpus=max(os.cpu_count() or 1, int(wanted + 0.999) + 2, math.ceil(needed_by(resources, trials)["CPU"])),
        store_bytes=int(os.environ.get("PHARMACIST_OBJECT_STORE_BYTES", 512 << 20)),
    )
    try:
        yield
    finally:
        ray.shutdown()


def _quiet_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
