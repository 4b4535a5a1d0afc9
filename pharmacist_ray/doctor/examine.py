"""Say in words what this machine, this installation and a configuration can run."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from pharmacist_ray.config import load_config
from pharmacist_ray.config.data import NamedConfig, SourceConfig
from pharmacist_ray.config.finetune import Defence
from pharmacist_ray.config.load import located
from pharmacist_ray.config.schema import Config
from pharmacist_ray.curation.scorers import SCORERS, parts_of
from pharmacist_ray.curation.selector import AT_CHECKPOINTS
from pharmacist_ray.data.readers import plan
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.doctor.cascade import cascade_lines
from pharmacist_ray.doctor.doubts import doubts
from pharmacist_ray.doctor.estimate import EXTRAS, Item, Setup, advice, memory, setup_of, total
from pharmacist_ray.doctor.pace import LINK, UTILISATION, known_gpu, seconds
from pharmacist_ray.doctor.passes import answer_memory, fit_memory, score_memory
from pharmacist_ray.doctor.plugins import TABLES
from pharmacist_ray.doctor.shape import Shape, shape_of
from pharmacist_ray.errors import ConfigError, DataError, ModelError, PharmacistError, ResourceError
from pharmacist_ray.evaluation.judges import JUDGES
from pharmacist_ray.pipeline.artifacts import PACKAGES
from pharmacist_ray.pipeline.console import escaped, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import check
from pharmacist_ray.training.objectives import OBJECTIVES

CHANGES = {
    "fit: directions": "set selector.warmup.checkpointing=true, or a smaller selector.tokens_per_batch",
    "score": "set scoring.checkpointing=true, or a smaller scoring.tokens_per_batch",
    "evaluate": "set a smaller evaluation.batch_size",
}
"""Stage → what makes its batches fit. They are halved by themselves where memory runs out; the weights are not."""

COMMON_GIB = (24, 40, 80, 141)
"""Memory of the GPUs that are common (RTX 4090, A100, H100, H200), for a machine that has none."""


def examine(config_file: Path | None, overrides: Sequence[str] = ()) -> None:
    """Print the machine, the installation, what there is to choose from, and, with a file, what is wrong with it.

    Args:
        config_file: A run's YAML file, or None.
        overrides: ``dotted.key=value`` pairs over the file's.

    Raises:
        PharmacistError: The configuration cannot run; everything that was found is printed before.
    """
    gpus, broken = _gpus()
    memory = psutil.virtual_memory().total / 2**30
    say(f"[bold]machine[/]  {os.cpu_count()} CPU cores, {memory:.0f} GiB memory, Python {platform.python_version()}")
    for index, gpu in enumerate(gpus):
        say(f"          GPU {index}: {escaped(gpu.name)}, {gpu.total_memory / 2**30:.0f} GiB")
    if broken:
        say(f"[yellow]warning[/]  there are GPUs that PyTorch {torch.__version__} cannot use: {escaped(broken)}")
        say(
            f"          its build needs the driver of CUDA {torch.version.cuda} (13.0: version 580 or newer); else install another build"
        )
    if not gpus:
        say("          no GPU: tiny models only; leave resources.gpus_per_worker at 0")
    disk = shutil.disk_usage(Path.cwd())
    say(f"          {disk.free / 2**30:.0f} GiB free here")
    say("[bold]packages[/] " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    say(f"[bold]ray[/]      RAY_ADDRESS={escaped(os.environ.get('RAY_ADDRESS', 'unset: a private Ray on this machine'))}, ")
    say(
        f"          RAY_AUTH_MODE={escaped(os.environ.get('RAY_AUTH_MODE', 'unset'))} (must be the same on both sides of a cluster)"
    )
    say("[bold]scorers[/]  and what each sees besides the rows")
    width = max(map(len, SCORERS)) + 2
    for name, scorer in SCORERS.items():
        say(f"          {name:<{width}}{', '.join(scorer.sees) or 'nothing'}")
    say(f"          {'random':<{width}}nothing")
    for what, names in (("objectives", OBJECTIVES), ("judges", JUDGES)):
        say(f"[bold]{what}[/]  {', '.join(names)}")
    if installed := [plugin.name for table in TABLES for plugin in table.installed()]:
        say(f"[bold]plug-ins[/]  {escaped(', '.join(installed))}; `pharmacist plugins` lists them")
    if config_file is not None:
        _configuration(load_config(config_file, overrides), len(gpus))
    elif overrides:
        raise ConfigError(f"'{overrides[0]}' is over what a file says: give the file by --config")


def _gpus() -> tuple[list[Any], str]:
    """Return the GPUs that can be used, and why there are some that cannot."""
    try:
        return [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())], ""
    except (RuntimeError, AssertionError) as error:  # as PyTorch says that the driver is too old, or a GPU is gone
        return [], " ".join(str(error).split())[:200]


def _configuration(config: Config, gpus: int) -> None:
    run = Run(located(config))
    config = run.config  # whose precision is known
    problems: list[PharmacistError] = []
    renderers: list[Renderer] = []
    probes: list[Callable[[], object]] = [partial(check, run), lambda: renderers.append(run.model.renderer())]
    probes += [partial(_readable, source, path) for source, _ in run.sources.values() for path in source.path]
    for probe in probes:
        try:
            probe()
        except PharmacistError as error:
            problems.append(error)
    resources = config.resources
    if resources.gpus_per_worker and not gpus and not os.environ.get("RAY_ADDRESS"):
        problems.append(ResourceError("resources.gpus_per_worker is set but this machine has no GPU and RAY_ADDRESS is unset"))
    if gpus and not resources.gpus_per_worker:
        say(
            f"[yellow]warning[/]  this machine has {gpus} GPU{'s' * (gpus > 1)} and none is asked for: all is computed on the CPU; set "
            "resources.gpus_per_worker=1 (with workers and actors of at least 1)"
        )
    for line in doubts(config, next(iter(renderers), None)):
        say(f"[yellow]warning[/]  {escaped(line)}")
    shape = None
    if not any(isinstance(problem, ModelError) for problem in problems):
        try:
            shape = shape_of(config.model)
        except ModelError as error:
            problems.append(error)
    variants = len(run.variants)
    say(
        f"[bold]plan[/]     {variants} aligned models ({len(run.arms)} selections × {len(config.comparison.seeds)} seeds), "
        f"{variants * len(config.attacks)} attacked ones; "
        + (
            f"{resources.parallel_runs} training runs of {resources.workers} workers at a time"
            if resources.workers
            else "trained in this process, one by one"
        )
    )
    of_proxy = [run.proxied.fitted, run.proxied.scored] if run.proxied else []
    for artifact in (run.ingested("candidates"), run.fitted, *of_proxy, run.scored, run.main_selection):
        say(f"          {artifact.stage}: {'ready' if artifact.ready else 'to be made'} ({escaped(artifact.folder)})")
    if shape is not None:
        _costs(config, shape)
        if run.proxied and not problems:
            _cascade(run, run.proxied, shape)
    for problem in problems[:-1]:
        say(f"[red]problem[/]  {escaped(problem)}")
    if problems:
        raise problems[-1]
    say("[green]this configuration can run[/]")


def _costs(config: Config, shape: Shape) -> None:
    """Print what the training runs will take: the first alignment and the warm-up item by item, all others in a line each."""
    say(f"[bold]model[/]    {shape.parameters:,} parameters in {shape.layers} layers; the adapter has {shape.adapter:,}")
    runs = [("alignment.train", objective) for objective in config.objectives]
    finetunes = list(dict.fromkeys(Defence.of(name).finetune for name in config.defences))
    for where in config.trainings():
        if where != "alignment.train":
            runs += [(where, objective) for objective in (finetunes if where.startswith("attacks.") else ["sft"])]
    for number, (where, objective) in enumerate(runs):
        setup = setup_of(config, config.trainings()[where], objective)
        _cost(f"{where} ({escaped(objective)})", shape, setup, config, itemised=number == 0 or where == "selector.warmup")
        if objective not in EXTRAS:
            say(f"          what {escaped(objective)} adds is not known here; it is counted as sft")
    stages = {"fit: directions": fit_memory, "score": score_memory} | ({"evaluate": answer_memory} if config.evaluation else {})
    if not {*AT_CHECKPOINTS} & {*parts_of(config.scoring.scorers, config.selector)}:
        del stages["fit: directions"]
    for what, held_by in stages.items():
        if items := held_by(shape, config):
            _pass(what, items, config)


def _cascade(run: Run, proxied: Run, shape: Shape) -> None:
    """Print what a cascade spares."""
    rows = run.ingested("candidates").manifest().get("summary", {}).get("rows_out", 0)
    made = run.scored.manifest().get("summary", {}).get("cascade", {}) if run.scored.ready else {}
    of_proxy = shape_of(proxied.config.model, proxied.model.layers)
    for number, line in enumerate(cascade_lines(run.config, proxied.config, shape, of_proxy, rows, made)):
        say(f"{'[bold]cascade[/] ' if not number else '         '} {escaped(line)}")


def _cost(what: str, shape: Shape, setup: Setup, config: Config, itemised: bool) -> None:
    items = memory(shape, setup)
    held, spared = total(items), total(items, host=True)
    room, name, where = _room(config, held)
    say(f"[bold]memory[/]   {what}, per worker: {size_in_words(held)}; {where}")
    if spared:
        say(f"          and {size_in_words(spared)} of CPU memory, per worker as well")
    if itemised:
        print_items(items, size_in_words)
    if held > room:
        changes, then = advice(shape, setup, room)
        say(f"          [red]too much[/]: {', '.join(changes) or 'no setting'} would bring it to {size_in_words(then)}")
        if then > room:
            say("          and that is still too much: take more or larger GPUs, or a smaller model.max_length")
    if not setup.gpu:
        return
    parts = seconds(shape, setup, name)
    step = total(parts)
    hours = step * setup.steps / 3600
    say(f"[bold]time[/]     {what}: {step:.3g} s a step, {setup.steps} steps in {hours:.2g} h on {known_gpu(name)}s")
    if itemised:
        print_items(parts, lambda value: f"{value:.3g} s")
        say(f"          assumed: {UTILISATION:.0%} of the peak, {LINK / 1e9:g} GB/s between GPUs, every row of full length")


def _pass(what: str, items: list[Item], config: Config) -> None:
    """Print what a stage holds that trains nothing, and what to change if it is too much."""
    held = total(items)
    room, _, where = _room(config, held)
    say(f"[bold]memory[/]   {what}, per {'worker' if what.startswith('fit') else 'actor'}: {size_in_words(held)}; {where}")
    print_items(items, size_in_words)
    if held > room:
        weights = items[0].amount  # all of them, always
        instead = (
            CHANGES[what]
            if weights < room
            else f"all weights are held by one, which takes {size_in_words(weights)}; take larger GPUs"
        )
        say(f"          [red]too much[/]: {instead}")


def print_items(items: list[Item], written: Callable[[float], str]) -> None:
    """Print an estimate item by item, with the arithmetic.

    Args:
        items: Its lines.
        written: An amount in words.
    """
    for item in items:
        say(f"          {item.what:<28}{written(item.amount):>9}  {item.arithmetic}{' (CPU memory)' if item.host else ''}")


def _room(config: Config, held: float) -> tuple[float, str, str]:
    """Return the bytes that a worker may hold, the GPU's name, and both in words."""
    if not config.resources.gpus_per_worker:
        here = float(psutil.virtual_memory().total)
        return here, "", f"this machine has {size_in_words(here)} for all workers"
    if gpus := _gpus()[0]:
        gpu = gpus[0]
        share = min(1.0, config.resources.gpus_per_worker)
        return gpu.total_memory * share, gpu.name, f"of {size_in_words(gpu.total_memory * share)} on {escaped(gpu.name)}"
    size = next((size for size in COMMON_GIB if held <= size * 2**30), max(COMMON_GIB))
    verb = "fits" if held <= size * 2**30 else "does not fit"
    return size * 2.0**30, "H100", f"{verb} a GPU of {size} GiB"


def size_in_words(amount: float) -> str:
    """Return bytes in GiB, MiB or KiB."""
    unit, size = next(((unit, size) for unit, size in (("GiB", 2**30), ("MiB", 2**20)) if amount >= size / 2), ("KiB", 2**10))
    return f"{amount / size:.1f} {unit}"


def _readable(source: SourceConfig, path: str) -> None:
    if isinstance(source, NamedConfig) and source.name:
        if not path.startswith("hf:") and not Path(path).expanduser().exists():
            raise DataError(f"{source.what[1]} '{source.name}': no such folder: {path}")
    elif not path.startswith("hf:") and not (Path(path) / "dataset_info.json").exists():
        plan([path])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
