"""The one training loop: warm-up of the selector, alignment, fine-tunes, repairs and pre-training are all this function on other data."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import PluginError, ResourceError, TrainingError
from pharmacist_ray.models.budget import out_of_memory
from pharmacist_ray.models.load import add_lora
from pharmacist_ray.models.modes import enable_checkpointing
from pharmacist_ray.models.soft_prompt import save_prompt
from pharmacist_ray.plugins import blaming
from pharmacist_ray.runtime.ranks import Ranks, current_ranks
from pharmacist_ray.runtime.usage import peak_bytes
from pharmacist_ray.storage import (
    StoragePath,
    disk_full_errors,
    json_of,
    mirrored,
    move_tree,
    pull_tree,
    push_tree,
    remove_tree,
    storage_path,
    working_folder,
    write_text,
)
from pharmacist_ray.training.blame import rows_that_fail
from pharmacist_ray.training.engine import build_engine, sharded_loading
from pharmacist_ray.training.objectives import FINISH, OBJECTIVES, Step, settings_of
from pharmacist_ray.training.publish import publish_weights
from pharmacist_ray.training.resume import load_state, newest_state, publish_states, read_values, save_state
from pharmacist_ray.training.streams import Stream, alignment_stream, harmful_stream, stream_beside
from pharmacist_ray.training.task import TrainTask, check_task, progress_file
from pharmacist_ray.training.tracking import tracked
from pharmacist_ray.training.verdicts import verdicts_of
from pharmacist_ray.training.watched import watched_loss
from pharmacist_ray.training.weights import step_norm, whole_size

REPORT_EVERY_S = 1.0

TINY = 10_000_000
"""Parameters of a model that nobody waits for to be freed: that takes half a second, as long as its training might (ours)."""


def run_task(task: TrainTask, ranks: Ranks | None = None) -> dict[str, Any]:
    """Train and publish the result; return the contents of ``result.json``.

    A task whose ``result.json`` is there is not run again, and one that was interrupted goes on from its newest saved state, with
    any number of workers, so a restarted worker group only does what is missing.

    Args:
        task: What to train.
        ranks: This worker; by default found from the process group.

    Raises:
        TrainingError: The loss is not finite, or rows make the model raise; names the step and the rows.
        DataError: A set has fewer rows than a batch.
        ConfigError: The objective or its settings are unknown, or it does not fit the model or the weights that are trained.
        ResourceError: The disk is full, or a step does not fit in memory.
    """
    try:
        with disk_full_errors(storage_path(task.out)):
            result = _run_task(task, ranks or current_ranks())
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(_too_large(task, ranks or current_ranks(), error)) from error
    if result.get("parameters", 0) > TINY:
        _free()
    return result


def _run_task(task: TrainTask, ranks: Ranks) -> dict[str, Any]:
    out = storage_path(task.out)
    if (out / "result.json").exists():
        return dict(json_of(out / "result.json"))
    settings = settings_of(task.objective, task.parameters)
    check_task(task)
    objective = OBJECTIVES[task.objective]
    draft = out.with_name(f"{out.name}.partial")
    work = working_folder(draft)
    attempt = _claim(draft, work, task) if ranks.first else 1
    ranks.barrier()
    saved = newest_state(draft)
    values: dict[str, Any] = read_values(saved) if saved else {"step": 0, "tokens": 0, "seconds": 0.0}

    torch.manual_seed(task.seed)
    renderer = task.model.renderer()
    words = objective.guarded(settings) if objective.guarded else 0
    every = bool(words) or objective.harmful == "pairs"  # what asks about rows that no step takes
    stream = alignment_stream(task, renderer, steps=None if every else task.train.steps + FINISH)
    harmful = harmful_stream(task, renderer, objective.harmful, stream) if objective.harmful != "none" else None
    safe = stream_beside(task, renderer, "safe") if objective.safe else None
    asked = objective.ordinary(settings) and not objective.compose
    ordinary = stream_beside(task, renderer, "ordinary") if asked else None
    verdicts = verdicts_of(task, stream.table, renderer, ranks, words) if words else []
    engine = build_engine(
        _trainable_model(task, ranks), task.train, ranks, dtype=task.model.dtype, group=objective.group, done=values["step"]
    )
    engine.train()
    state = load_state(engine, saved, ranks) if saved else {}
    micro_batch = task.train.batch_size // (ranks.workers * task.train.accumulation)

    def watched() -> float | None:
        return watched_loss(engine, task.watched, renderer, ranks, micro_batch)

    before = values.pop("watched", None) if saved else watched()
    ranks.barrier()

    with ExitStack() as stack:
        if ranks.first:
            _cut_history(work / "history.jsonl", values["step"])
            history = stack.enter_context((work / "history.jsonl").open("a"))
            log = stack.enter_context(
                tracked(
                    task.tracking.to,
                    run=task.name,
                    folder=stack.enter_context(mirrored(out.with_name(f"{out.name}.tracking"))),
                    project=task.tracking.project,
                    settings=_described(task),
                    artifact=str(out),
                )
            )
        progress = {"name": task.name, "total": task.train.steps, "attempt": attempt, "resumed": values["step"]}
        if attempt > 1:
            write_text(json.dumps({**progress, **values}), progress_file(out))
        started, reported = time.perf_counter() - values["seconds"], 0.0

        def step_of(number: int, steps: int = 1) -> Step:
            """Return a step, with the rows of so many."""

            def batches_of(rows: Stream | None) -> tuple[list[Batch], list[list[int]]]:
                found = [rows.step(one, ranks, task.train.accumulation) for one in range(number, number + steps)] if rows else []
                return [batch for batches, _ in found for batch in batches], [place for _, places in found for place in places]

            batches, positions = batches_of(stream)
            return Step(
                number=number,
                engine=engine,
                ranks=ranks,
                batches=batches,
                positions=positions,
                seed=task.seed,
                renderer=renderer,
                settings=settings,
                harmful=batches_of(harmful)[0],
                state=state,
                safe=batches_of(safe)[0],
                ordinary=batches_of(ordinary)[0],
                rows=stream.rows(number, ranks, task.train.accumulation),
                verdicts=verdicts,
                set_size=len(stream),
                total=task.train.steps,
                merged=task.model.adapters,
            )

        for number in range(values["step"], task.train.steps):
            step = step_of(number)
            batches = step.batches
            if ranks.first:
                ranks.set_status(f"{task.name}: step {number + 1} of {task.train.steps}, rows {_named(stream.whole(number))}")
            losses = []
            try:
                for loss in objective.run(step):
                    losses.append(loss.detach().float())
                    engine.backward(loss)
            except PluginError:
                raise
            except Exception as error:
                if out_of_memory(error):
                    raise  # no row's fault
                streams = [one for one in (stream, harmful, safe, ordinary) if one]
                if failed := rows_that_fail(engine, streams, number, ranks, task.train.accumulation):
                    raise TrainingError(
                        f"{task.name}: rows {_named(failed)} make the model raise at step {number + 1} of {task.train.steps} "
                        f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); take them out of the data, or mend the "
                        "model or its tokenizer"
                    ) from error
                raise  # a bug, or another worker that is gone
            everyone = ranks.gather(torch.stack(losses))
            _check_finite(task, everyone, stream, number, ranks)
            rate = max(group["lr"] for group in engine.optimizer.param_groups)
            for group in engine.optimizer.param_groups:
                if group["name"] in step.frozen:
                    group["lr"] = 0.0  # the schedule sets it anew after the step
            engine.step()
            tokens = int(ranks.total(torch.stack([batch.attention_mask.sum() for batch in batches]).sum()))
            seconds = time.perf_counter() - started
            values = {
                "step": number + 1,
                "loss": float(everyone.mean()),
                "grad_norm": step_norm(engine),
                "lr": float(rate),
                "tokens": values["tokens"] + tokens,
                "tokens_per_s": (values["tokens"] + tokens) / seconds,
                "passes": step.forwards / len(batches),
                "seconds": seconds,
                **step.measured,
            }
            if number + 1 in task.checkpoints:
                publish_weights(engine, work / f"step-{number + 1:06d}", task.train.weights, ranks)
            if ranks.first:
                history.write(json.dumps(values) + "\n")
                log(number + 1, {key: value for key, value in values.items() if key != "step"})
                if time.perf_counter() - reported > REPORT_EVERY_S or number + 1 == task.train.steps:
                    reported = time.perf_counter()
                    write_text(json.dumps({**progress, **values}), progress_file(out))
            if task.train.save_every and (number + 1) % task.train.save_every == 0 and number + 1 < task.train.steps:
                if ranks.first:
                    history.flush()
                save_state(engine, work, values | {"watched": before}, state, ranks)
                if ranks.first:
                    publish_states(work, draft)
        if objective.finish:
            last = step_of(task.train.steps, FINISH)
            with blaming(OBJECTIVES.plugin(task.objective)):
                objective.finish(last)
            values |= {f"finished_{name}": value for name, value in last.measured.items()}
    if objective.prompt and ranks.first:
        save_prompt(state["prompt"], work / "prompt", engine.module, task.model.path)
    publish_weights(
        engine, work / ("adapter" if task.train.weights == "lora" else "model"), task.train.weights, ranks, renderer.tokenizer
    )
    result = {
        "name": task.name,
        "rows": len(stream),
        "steps": task.train.steps,
        "seconds": values["seconds"],
        "tokens": values["tokens"],
        "tokens_per_s": round(values["tokens"] / max(values["seconds"], 1e-9), 1),
        "peak_bytes": int(ranks.gather(torch.tensor([peak_bytes()], dtype=torch.float64, device=ranks.device)).max()),
        "final_loss": values.get("loss"),  # where nothing is trained there is none
        **{name: value for name, value in values.items() if name.startswith("finished_")},
        "parameters": sum(map(whole_size, engine.module.parameters())),
    }
    if before is not None:
        result["watched_loss"] = [before, watched()]
    engine.destroy()
    if ranks.first:
        for state_folder in work.glob("state*"):
            remove_tree(state_folder)
        (work / "result.json").write_text(json.dumps(result, indent=1))
        move_tree(work, out, last=["result.json"])
        remove_tree(draft)
        progress_file(out).unlink(missing_ok=True)
    ranks.barrier()
    return result


def _free() -> None:
    """Give back the memory of a model that nothing refers to any more but itself: an engine and its model form circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _too_large(task: TrainTask, ranks: Ranks, error: Exception) -> str:
    """Say that a step does not fit in memory, and what to change, from the cheapest on: the doctor's own order."""
    train, workers = task.train, ranks.workers
    rows = train.batch_size // (workers * train.accumulation)
    changes = ["checkpointing=true"] * (not train.checkpointing)
    changes += [f"accumulation={train.accumulation * rows} (micro-batch 1)"] * (rows > 1)
    changes += [f"zero_stage={train.zero_stage + 1} or higher"] * (workers > 1 and train.zero_stage < 3)
    changes += ["model.dtype=bfloat16"] * (task.model.dtype == "float32")
    changes += ["offload=optimizer"] * (workers > 1 and train.offload == "none")
    return (
        f"{task.name}: a step of {rows} rows does not fit in memory ({' '.join(str(error).split())[:160]}); set in its train section "
        f"{', '.join([*changes, 'or a smaller model.max_length'])}; `pharmacist doctor` says what each takes"
    )


def _check_finite(task: TrainTask, losses: torch.Tensor, stream: Stream, number: int, ranks: Ranks) -> None:
    """Stop every worker at the same step if any worker's loss is not finite, naming the rows of that micro-batch."""
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if not bad:
        return
    rank, micro = divmod(bad[0], task.train.accumulation)
    ids = stream.ids(number, rank, ranks.workers, task.train.accumulation, micro)
    own = "".join(
        f", {name}={dict(values)}" for name, values in task.parameters.items() if name in OBJECTIVES[task.objective].settings
    )
    raise TrainingError(
        f"{task.name}: the loss is {float(losses[bad[0]])} at step {number + 1} of {task.train.steps}, rows {_named(ids)}; "
        f"lower the learning rate ({task.train.lr:g}) or the perturbation ({task.objective}{own}), or look at these rows"
    )


def _named(ids: list[str]) -> str:
    return ", ".join(ids[:4]) + (f" … ({len(ids)} in all)" if len(ids) > 4 else "")


def _claim(draft: StoragePath, work: Path, task: TrainTask) -> int:
    """Keep what an interrupted attempt at the same task left behind, remove anything else, and return the number of this attempt."""
    identity = hashlib.sha256(json.dumps(_described(task), sort_keys=True, default=str).encode()).hexdigest()
    marker = draft / "task.sha256"
    if marker.exists() and marker.read_text() == identity:
        pull_tree(draft, work)
    else:
        remove_tree(draft)
        remove_tree(work)
        write_text(identity, work / marker.name)
        push_tree(work, draft)
    attempts = draft / "attempts"
    number = 1 + (int(attempts.read_text()) if attempts.exists() else 0)
    write_text(str(number), attempts)
    return number


def _described(task: TrainTask) -> dict[str, Any]:
    plain = {key: value for key, value in vars(task).items() if key not in ("out", "train", "lora", "tracking", "model")}
    return {**plain, "train": task.train.model_dump(), "lora": task.lora.model_dump(), "model": asdict(task.model)}


def _cut_history(file: Path, steps: int) -> None:
    """Drop the lines that an interrupted attempt wrote after its last saved state."""
    lines = file.read_text().splitlines()[:steps] if file.exists() else []
    file.write_text("".join(f"{line}\n" for line in lines))


def _trainable_model(task: TrainTask, ranks: Ranks) -> Any:
    with sharded_loading(task.train, ranks.workers, task.model.dtype):
        start = storage_path(task.start_adapter) if task.start_adapter else None
        model = task.model.load(str(ranks.device), adapter=start)
    if task.train.weights == "full":
        model.requires_grad_(True)
    elif not task.start_adapter:
        model = add_lora(model, task.lora, seed=task.seed)
    if task.train.checkpointing:
        enable_checkpointing(model)
    return model
