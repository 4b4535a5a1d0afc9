"""Run a function on a Ray Train worker group. With `network`, the only place that knows Ray Train."""

from __future__ import annotations

import gc
import pickle
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray import cloudpickle
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer

from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.errors import PharmacistError, ResourceError, TrainingError
from pharmacist_ray.runtime.actors import check_room, per_worker
from pharmacist_ray.runtime.cores import use_cores
from pharmacist_ray.runtime.group_store import GroupStore
from pharmacist_ray.runtime.network import GroupConfig
from pharmacist_ray.runtime.ranks import Ranks, current_ranks, stay_on_cpu
from pharmacist_ray.runtime.threads import side_by_side
from pharmacist_ray.storage import RemotePath, StoragePath, disk_full_errors

MAX_PREEMPTIONS = 1000
"""Machines that a training run may lose with notice, which Ray counts apart from failures and by default without bound: more than
weeks on preemptible machines take (ours)."""

_NO_ROOM = ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError", "InsufficientClusterResourcesError")
# Ray Train's names for a group that could not be started; the classes are private.

Work = Callable[[Any, Ranks], Any]
"""What runs on every worker: (payload, this worker) → a small picklable value, of which the first worker's is kept."""


def run_on_workers(work: Work, payload: Any, *, name: str, storage: StoragePath, resources: ResourcesConfig) -> Any:
    """Run ``work(payload, ranks)`` on every worker of a fresh group and return the first worker's value.

    A worker that dies is replaced (with its whole group) up to ``resources.max_failures`` times, and the work starts again; work
    that leaves finished parts on disk therefore only does what is missing. Errors of our own are not retried: they would come again.
    If not all workers meet them, the group starts once more, to be told of it and to end.

    Without workers (``resources.workers=0``) the work is done here and now, and nothing starts it again.

    Args:
        work: A module-level function.
        payload: Its picklable argument.
        name: Names the Ray Train run.
        storage: Folder for Ray Train's own files, reachable by all nodes.
        resources: Workers and what each may use.

    Raises:
        PharmacistError: What the work raised.
        ResourceError: The cluster never had room for the workers, or the disk is full.
        TrainingError: Workers died more often than they are replaced.
    """
    threads = max(1, int(resources.cpus_per_worker))
    if not resources.workers:
        stay_on_cpu()
        use_cores(threads)
        with disk_full_errors(storage):
            return work(payload, current_ranks())
    needed = per_worker(resources)
    check_room(needed, resources.workers)
    attempt = f"{name}-{uuid.uuid4().hex[:8]}"
    store = GroupStore(attempt)
    trainer = TorchTrainer(
        _on_worker,
        # As bytes, which Ray Train's controller passes on unread: else it would import all of this first, and then the workers would.
        train_loop_config={
            "pickled": cloudpickle.dumps((work, payload, threads, store)),
            "on_cpu": not resources.gpus_per_worker,
        },
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=needed
        ),
        torch_config=GroupConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            # A name of its own per attempt: what is finished is known from the artifacts, not from Ray Train's snapshot.
            name=attempt,
            **storage_of(storage),
            failure_config=FailureConfig(
                max_failures=resources.max_failures, controller_failure_limit=3, max_preemption_failures=MAX_PREEMPTIONS
            ),
        ),
    )
    try:
        with disk_full_errors(storage):
            [ended] = side_by_side(lambda one: one.fit(), [trainer])
            value, error = ended.return_value  # the return value: metrics without a checkpoint are not kept
    except TrainingFailedError as failure:
        error = store.error() or _why(failure, name, store, resources)
        if error is failure:
            raise
    finally:
        store.clear()
    if error is not None:
        raise error
    return value


def storage_of(folder: StoragePath) -> dict[str, Any]:
    """Return where Ray Train and Ray Tune keep their own files, as their run configurations take it."""
    if isinstance(folder, RemotePath):
        return {"storage_path": folder.inner, "storage_filesystem": folder.filesystem}
    return {"storage_path": str(folder.resolve())}


def _why(
    failure: TrainingFailedError, name: str, store: GroupStore, resources: ResourcesConfig
) -> TrainingFailedError | PharmacistError:
    """Return what to raise when Ray Train has given up: one line if workers died or there was no room, else the failure itself."""
    status = store.status()
    failures = failure.worker_failures.values() if isinstance(failure, WorkerGroupError) else ()
    if isinstance(failure, ControllerError) and type(failure.controller_failure).__name__ in _NO_ROOM:
        why = " ".join(str(failure.controller_failure).split())[:300]
        return ResourceError(f"{name}: the cluster gave no room for {resources.workers} workers ({why}); see `pharmacist doctor`")
    gone = [one for one in failures if isinstance(getattr(one, "health_check_failure", one), ray.exceptions.RayError)]
    if not gone:
        failure.add_note(f"{name}: {status or 'before the first step'}")
        return failure
    return TrainingError(
        f"{name}: its workers died {resources.max_failures + 1} times (resources.max_failures={resources.max_failures}), the last "
        f"time at {status or 'the start'}; if it is always there, look at these rows, else at the machines' memory; the same command "
        "again goes on from the last saved state"
    )


def _on_worker(config: dict[str, Any]) -> tuple[Any, PharmacistError | None]:
    work: Callable[[Any, Ranks], Any]
    store: GroupStore
    if config["on_cpu"]:
        stay_on_cpu()  # before DeepSpeed is imported with what is unpickled
    work, payload, threads, store = pickle.loads(config["pickled"])  # noqa: S301 - our own
    use_cores(threads)
    gc.freeze()  # the libraries are here to stay: DeepSpeed and we collect after every model, which would walk through them each time
    ranks = replace(current_ranks(), set_status=store.set_status)
    error = store.error()  # of a group before this one
    if error is None:
        try:
            return work(payload, ranks), None
        except PharmacistError as raised:
            error = raised
    store.post_error(ranks.rank, error)
    if not store.all_posted(ranks.workers):
        raise error  # the others may wait for this worker for ever: only a failure ends the group
    return None, error
