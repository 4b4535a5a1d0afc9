"""Say in words how a configuration is laid out on a cluster, why, how long it takes and what breaks first; put it into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pharmacist_ray.config import load_config
from pharmacist_ray.config.edit import with_values as edited
from pharmacist_ray.config.load import located
from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.cluster import Cluster
from pharmacist_ray.doctor.estimate import BYTES, memory, setup_of, total
from pharmacist_ray.doctor.examine import print_items, size_in_words
from pharmacist_ray.doctor.frailty import frailties, held_by_stages
from pharmacist_ray.doctor.gpus import GPUS
from pharmacist_ray.doctor.guests import guest_memory, guests_of
from pharmacist_ray.doctor.hours import DISK, REACHED, batch_seconds, step_seconds
from pharmacist_ray.doctor.layout import FILLED, Layout, best_layout, objectives_of, room, with_values
from pharmacist_ray.doctor.pace import UTILISATION
from pharmacist_ray.doctor.passes import score_memory
from pharmacist_ray.doctor.shape import Shape, shape_of
from pharmacist_ray.doctor.workload import INGEST_S, SELECT_S, Work, work_of
from pharmacist_ray.errors import ArtifactError, ConfigError, ResourceError
from pharmacist_ray.pipeline.console import escaped, say
from pharmacist_ray.pipeline.run import Run

PLAIN: dict[str, Any] = {"zero_stage": 0, "offload": "none", "checkpointing": False, "accumulation": 1}
"""Key of a training → the value that needs no reason."""
SCORE_BYTES = 60.0
"""Bytes of a candidate's scores: its id, and a number a column (ours)."""


def plan_for(config: Config, cluster: Cluster, rows: float | None = None) -> tuple[Run, Shape, Work, Layout]:
    """Return the run, its model's shape, what there is to do, and the layout for a cluster.

    Args:
        config: The configuration.
        cluster: The nodes.
        rows: Candidates, where somebody says how many.

    Raises:
        ModelError: The model's config.json cannot be read.
    """
    run = Run(located(config))
    shape = shape_of(run.config.model)
    work = work_of(run, rows)
    return run, shape, work, best_layout(run.config, shape, work, cluster)


def show_plan(config: Config, cluster: Cluster, *, rows: float | None = None, said: list[str] | None = None) -> Layout:
    """Print the plan for a cluster and return the layout.

    Args:
        config: The configuration.
        cluster: The nodes.
        rows: Candidates, where somebody says how many.
        said: What was taken for granted about the cluster.

    Raises:
        ResourceError: Something fits nowhere; all there is to say is printed before.
        ModelError: The model's config.json cannot be read.
    """
    run, shape, work, layout = plan_for(config, cluster, rows)
    _cluster(layout, cluster, said or [])
    weights = shape.parameters * BYTES[run.config.model.dtype]
    say(
        f"[bold]model[/]    {shape.parameters:,} parameters in {shape.layers} layers, {size_in_words(weights)} in "
        f"{run.config.model.dtype}; the adapter has {shape.adapter:,}"
    )
    for line in work.assumed:
        say(f"          assumed: {escaped(line)}")
    _stages(layout, shape, work, list(dict.fromkeys(one.kind for one in cluster)))
    _layout(run.config, layout, shape)
    if layout.group > 1:
        _gathers(layout, shape, work)
    if not layout.problems:
        _hours(layout, work)
        _traffic(layout, shape, work)
        say("[bold]breaks[/]   first, as things grow")
        for line in frailties(run, layout, shape, work, room(layout.pool)):
            say(f"          {escaped(line)}")
    for problem in layout.problems[:-1]:
        say(f"[red]problem[/]  {escaped(problem)}")
    if layout.problems:
        raise ResourceError(layout.problems[-1])
    return layout


def write_plan(layout: Layout, given: Config, source: Path, target: Path) -> list[str]:
    """Put a layout into a copy of a configuration file, or into the file itself, and return the keys that changed.

    Args:
        layout: The layout.
        given: The configuration as the file has it.
        source: The file.
        target: Where the copy goes; the file itself is changed in place.

    Raises:
        ArtifactError: Another file is there already, or this one cannot be written.
        ConfigError: The file is written in a way that cannot be changed here.
    """
    if target.exists() and not target.samefile(source):
        raise ArtifactError(f"{target} is there already; choose another name, or {source} itself to change it in place")
    changes = changes_of(layout, given)
    text = source.read_text(encoding="utf-8")
    text = edited(text, _said_before(changes, given, yaml.safe_load(text)) | changes, layout.values, str(source))
    draft = target.with_name(f"{target.name}.partial")
    try:
        draft.write_text(text, encoding="utf-8")
        if load_config(draft) != with_values(given, changes):
            raise ConfigError(
                f"{source} cannot be changed without a change of other keys; set these by hand: {', '.join(changes)}"
            )
        draft.replace(target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror}; choose another file") from error
    finally:
        draft.unlink(missing_ok=True)
    return list(changes)


def changes_of(layout: Layout, given: Config) -> dict[str, Any]:
    """Return those of a layout's keys that a configuration has otherwise."""
    return {key: value for key, value in layout.values.items() if value_of(given, key) != value}


def _said_before(changes: dict[str, Any], given: Config, text: Any) -> dict[str, Any]:
    """Return what a file leaves to the defaults of sections that it does not have and gets now: there are sections with other ones.

    Args:
        changes: Dotted key → value.
        given: The configuration as the file has it.
        text: The file's plain values.
    """
    found: dict[str, Any] = {}
    for section in dict.fromkeys(key.rpartition(".")[0] for key in changes):
        there: Any = text
        for part in section.split("."):
            there = there[int(part)] if isinstance(there, list) else (there or {}).get(part)
        if there is None:
            fields = type(value_of(given, section)).model_fields
            said = value_of(given, section).model_dump(mode="json")
            found |= {f"{section}.{name}": value for name, value in said.items() if value != fields[name].default}
    return found


def value_of(config: Config, key: str) -> Any:
    """Return what a configuration has under a dotted key."""
    found: Any = config
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else getattr(found, part, None)
    return found


def _cluster(layout: Layout, cluster: Cluster, said: list[str]) -> None:
    pool = layout.pool
    for one in cluster:
        used = "" if one in pool.nodes else "  [yellow]left out[/]: with these the rest would have to wait for the least of them"
        memory_ = f"{one.gpu.memory_gib:g} GiB each as PyTorch sees them, {FILLED:.0%} planned with"
        say(f"[bold]cluster[/]  {one.count} node{'s' * (one.count > 1)} of {one.gpus} {one.kind}, {memory_}{used}")
    for line in said:
        say(f"          {escaped(line)}")
    for kind in dict.fromkeys(one.kind for one in pool.nodes if one.gpu.bfloat16 <= one.gpu.float32):
        say(f"          a {kind}'s tensor cores do not know bfloat16: it computes at the rate of float32, and saves memory alone")
    if len(pool.nodes) < len(cluster):
        say("          a worker lands on any GPU of a cluster: start this run's with the others alone")
    elif len(cluster) > 1:
        say(
            f"          a worker lands on any GPU of them, so all is planned for the least: {size_in_words(pool.smallest.memory)}"
        )


def _stages(layout: Layout, shape: Shape, work: Work, kinds: list[str]) -> None:
    """Print what each stage holds on a GPU with the layout, and on which kinds it fits."""
    say("[bold]stages[/]   what each holds on a GPU with the layout below, at most, and where that fits")
    for name, items in held_by_stages(layout, shape, work).items():
        held, spared = total(items), total(items, host=True)
        fits = [kind for kind in kinds if held <= FILLED * GPUS[kind].memory]
        others = [kind for kind in kinds if kind not in fits]
        state = "; ".join(["fits " + ", ".join(fits)] * bool(fits) + ["[red]too much[/] for " + ", ".join(others)] * bool(others))
        largest = sorted((item for item in items if not item.host), key=lambda item: -item.amount)[:2]
        mostly = ", ".join(f"{item.what} {size_in_words(item.amount)}" for item in largest)
        away = f"; and {size_in_words(spared)} of CPU memory" if spared else ""
        say(f"          {name:<28}{size_in_words(held):>10}  {state} ({mostly}{away})")
    _, _, unknown = guest_memory(one for stage in ("score", "evaluate") for one in guests_of(layout.config, stage))
    for line in unknown:
        say(f"          [yellow]{escaped(line)}[/]")


def _layout(given: Config, layout: Layout, shape: Shape) -> None:
    """Print every key that the layout decides; trainings that are laid out alike share their lines."""
    say("[bold]layout[/]   every key that it decides, what the file has where that differs, and why")
    trainings = layout.config.trainings()
    alike: dict[tuple[tuple[Any, Any, str], ...], list[str]] = {}
    for key, value in layout.values.items():
        section, _, name = key.rpartition(".")
        if section not in trainings:
            before = value_of(given, key)
            _line(key, value, before, _why(key, value, before, layout, shape))
        elif name == "zero_stage":  # the first of a training's keys
            keys = {one: f"{section}.{one}" for one in PLAIN if f"{section}.{one}" in layout.values}
            pairs = [(one, layout.values[full], value_of(given, full)) for one, full in keys.items()]
            told = tuple((now, then, _why_trained(section, one, now, then, layout, shape)) for one, now, then in pairs)
            alike.setdefault(told, []).append(section)
    for lines, sections in alike.items():
        say(f"          {escaped(', '.join(sections))}")
        for name, (value, before, why) in zip(PLAIN, lines, strict=True):
            _line(f"  {name}", value, before, why)


def _line(key: str, value: Any, before: Any, why: str) -> None:
    notes = [f"[yellow]was {escaped(_plain(before))}[/]"] * (before != value) + [escaped(why)] * bool(why)
    say(f"          {escaped(key):<28}{_plain(value):>9}  {'; '.join(notes)}".rstrip())


def _why(key: str, value: Any, before: Any, layout: Layout, shape: Shape) -> str:
    config, pool, whole = layout.config, layout.pool, layout.group == 1
    weights = size_in_words(shape.parameters * BYTES[config.model.dtype])
    if key in ("scoring.checkpointing", "scoring.tokens_per_batch"):
        return _why_otherwise(key, value, False if key.endswith("checkpointing") else before, layout, shape)
    if key == "resources.parallel_runs":
        return f"{value * config.resources.workers} of {pool.gpus} GPUs train at a time"
    batches = ", ".join(map(str, sorted({one.batch_size for one in config.trainings().values()})))
    return {
        "resources.gpus_per_worker": "a worker of a training has one GPU",
        "resources.workers": f"of a training; they share its batches evenly ({batches} rows)",
        "resources.actors": "one GPU each" if whole else f"groups of {layout.group} GPUs",
        "resources.workers_per_actor": "" if whole else f"hold the weights together, which alone take {weights}; see gathers",
        "model.quantization": f"the weights take {weights} at all their bits, and then not all stages fit; it changes what is scored",
        "resources.cpus_per_worker": "leaves two CPUs of each node free",
    }.get(key, "")


def _why_otherwise(key: str, value: Any, other: Any, layout: Layout, shape: Shape) -> str:
    """Return what scoring would hold with another value of one of its keys."""
    if value == other:
        return ""
    held = total(score_memory(shape, with_values(layout.config, {key: other}), layout.group))
    return f"with {_plain(other)} it would take {size_in_words(held)}" if held > room(layout.pool) else ""


def _why_trained(section: str, name: str, value: Any, before: Any, layout: Layout, shape: Shape) -> str:
    """Return what would be otherwise with the file's value of a key of a training, or with the plain one where that is the file's."""
    other = before if before != value else PLAIN[name]
    if other == value:
        return ""
    config, pool = layout.config, layout.pool
    now = config.trainings()[section]
    change: dict[str, Any] = {name: other}
    if name == "zero_stage" and other < 3 and now.offload != "none":
        change["offload"] = "none" if other == 0 or now.offload == "parameters" else now.offload
    then = now.model_copy(update=change)
    objectives = objectives_of(config, section)
    setups = [setup_of(config, then, one) for one in objectives]
    held = max(total(memory(shape, one)) for one in setups)
    if held > room(pool):
        return f"with {_plain(other)} it would take {size_in_words(held)}"
    seconds = [sum(total(step_seconds(shape, setup_of(config, train, one), pool)) for one in objectives) for train in (then, now)]
    return f"with {_plain(other)} a step would take {seconds[0] / seconds[1]:.2f} times as long"


def _gathers(layout: Layout, shape: Shape, work: Work) -> None:
    """Print the seconds of a batch that a group scores, with the arithmetic: what gathering weights costs beside the passes."""
    config, pool = layout.config, layout.pool
    _, over = pool.link(layout.group)
    batch = f"a batch of {config.scoring.tokens_per_batch:,} tokens on each of {layout.group} GPUs at ZeRO 3"
    say(f"[bold]gathers[/]  score: {batch}, over {over}")
    items = batch_seconds(shape, config, work, pool, layout.group)
    print_items(items, lambda value: f"{value:.3g} s")
    gathered = sum(item.amount for item in items if item.what == "gathering weights")
    say(
        f"          gathers are {gathered / total(items):.0%} of a batch; at a quarter of its tokens they would be "
        f"{gathered / (gathered + (total(items) - gathered) / 4):.0%}"
    )


def _hours(layout: Layout, work: Work) -> None:
    pool = layout.pool
    say(f"[bold]time[/]     on {escaped(pool.name)}, {sum(layout.seconds.values()) / 3600:,.3g} h in all")
    about = {
        "fit": f"{_several(_runs(work, 'fit'), 'training')}, directions at {_several(work.checkpoints, 'checkpoint')}",
        "score": f"{work.rows:,.0f} rows of {work.tokens:g} tokens, {work.checkpoints} × with gradients and {work.forwards} × without",
        "align": _several(_runs(work, "align"), "model"),
        "attack": _several(_runs(work, "attack"), "model"),
        "evaluate": f"{_several(work.models, 'model')}, {work.prompts:,} prompts each",
        "ingest": f"{work.rows:,.0f} rows on {pool.cpus or 0:g} CPUs",
        "select": f"{work.rows:,.0f} rows on {pool.cpus or 0:g} CPUs",
    }
    for stage, seconds in layout.seconds.items():
        say(f"          {stage:<10}{seconds / 3600:>9.3g} h  {seconds / 3600 * pool.gpus:>9,.4g} GPU h  {about[stage]}")
    if layout.config.evaluation is not None and layout.config.evaluation.engine is not None:
        say("          evaluate: an endpoint answers, whose pace is not known here")
    if pool.cpus is None:
        ingest, select = (work.rows * each / 3600 for each in (INGEST_S, SELECT_S))
        say(f"          ingest and select take CPUs, whose number is not known: {ingest:,.2g} and {select:,.2g} CPU hours")
    reached = f"GPUs at {UTILISATION:.0%} of their peak in {layout.config.model.dtype}, links at {REACHED:.0%} of their speed"
    say(f"          assumed: {reached}, training rows of full length, nothing overlapped")
    if layout.config.model.quantization:
        say(
            "          weights in few bits are taken to multiply as fast as others; they take longer, by how much was not measured"
        )


def _runs(work: Work, stage: str) -> int:
    return sum(one.runs for one in work.trainings if one.stage == stage)


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _traffic(layout: Layout, shape: Shape, work: Work) -> None:
    pool, config = layout.pool, layout.config
    width = BYTES[config.model.dtype]
    weights = shape.parameters * width
    workers = config.resources.workers
    link, over = pool.link(max(workers, layout.group))
    outside = min(one.network for one in pool.nodes)
    shares = [one for one in work.trainings if config.trainings()[one.section].zero_stage == 3]
    nodes = sum(one.count for one in pool.nodes)
    size = max(workers, layout.group)
    if size == 1:
        say("[bold]network[/]  a training and an actor have one GPU each, and nothing passes between them")
    else:
        say(
            f"[bold]network[/]  groups of {size} GPUs exchange over {over}, {link / 1e9:,.3g} GB/s each (its speed × {REACHED:g})"
        )
        if nodes > 1:
            say(f"          between nodes {outside / 1e9:,.4g} Gbit/s each are taken for granted; --network says what there is")
        if shares:
            received = size_in_words(weights * (workers - 1) / workers)
            say(f"          ZeRO 3: every GPU of a training receives {received} each time the weights are gathered")
    read = f"{size_in_words(weights)} in {weights / DISK / 60:.2g} minutes at {DISK / 1e9:g} GB/s (assumed)"
    say(f"[bold]disk[/]     every node reads the weights when a training or a stage starts: {read}")
    adapters = shape.adapter * 4 * (sum(one.runs for one in work.trainings))
    rows = work.rows * (work.row_bytes + SCORE_BYTES)
    say(f"          run directory: rows and scores about {size_in_words(rows)}, adapters about {size_in_words(adapters)}")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
