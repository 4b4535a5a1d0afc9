"""States that an interrupted run goes on from: whole tensors by parameter name, so that neither workers nor ZeRO stages matter.

A state is a folder ``state-000200/`` with ``tensors.safetensors`` and ``state.json``, published by a rename; the newest one is kept.
The order of rows, dropout and the schedule are functions of the step, so there is nothing else to save.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from safetensors.torch import load_file, save_file

from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.storage import StoragePath, local_copy, push_tree, remove_tree
from pharmacist_ray.training.weights import set_weights, shard_of, trained_parameters, whole_weights

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(engine: Any, folder: Path, values: dict[str, Any], state: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """Save what it takes to go on after ``values["step"]`` steps, and drop the older states. All workers take part.

    The trained weights and Adam's moments are gathered one parameter at a time; the first worker holds them all while it writes
    (12 bytes a trained weight).

    Args:
        engine: The engine, just after a step.
        folder: Where states go.
        values: JSON-able; has ``step``.
        state: What the objective carries across steps.
        ranks: This worker.
    """
    tensors = {}
    _link(engine)
    for (name, parameter), (_, weight) in zip(trained_parameters(engine), whole_weights(engine), strict=True):
        for kind, tensor in (("weight", weight), *((key, _moment(engine, parameter, key)) for key in _MOMENTS)):
            if ranks.first:
                tensors[f"{kind}:{name}"] = tensor.detach().cpu().contiguous().clone()
    if ranks.first:
        tensors |= {f"state:{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
        final = folder / f"state-{values['step']:06d}"
        draft = folder / "state.partial"
        remove_tree(draft)
        draft.mkdir()
        save_file(tensors, draft / "tensors.safetensors")
        (draft / "state.json").write_text(json.dumps(values))
        for file in draft.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        draft.rename(final)
        for old in _states(folder):
            if old != final:
                remove_tree(old)
    ranks.barrier()


def publish_states(work: Path, folder: StoragePath) -> None:
    """Publish what `save_state` wrote where ``folder`` lies in an object store, and drop the older states there."""
    push_tree(work, folder, last=["state.json"])
    for old in _states(folder)[:-1]:
        remove_tree(old)


def newest_state(folder: StoragePath) -> Path | None:
    """Return the folder of the newest state, or a local copy of it, if there is one."""
    found = [state for state in _states(folder) if (state / "state.json").exists()]
    return local_copy(found[-1]) if found else None


def read_values(state: Path) -> dict[str, Any]:
    """Return what `save_state` was given as ``values``."""
    return dict(json.loads((state / "state.json").read_text()))


def load_state(engine: Any, folder: Path, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Put a saved state into a fresh engine, and return what the objective carried.

    Args:
        engine: The engine; its model, trained parameters and optimiser groups are those of the run that saved.
        folder: A folder that `newest_state` found.
        ranks: This worker.
    """
    tensors = load_file(folder / "tensors.safetensors", device="cpu")
    steps = float(read_values(folder)["step"])
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    stage = engine.zero_optimization_stage()
    wrapped = optimizer is not engine.optimizer
    for flat in _flat_groups(engine) if wrapped else []:
        optimizer.state[flat] = {"step": torch.tensor(steps), **{key: torch.zeros_like(flat) for key in _MOMENTS}}
    _link(engine)
    set_weights(engine, {name: tensors[f"weight:{name}"] for name, _ in trained_parameters(engine)})
    with torch.no_grad():
        for name, parameter in trained_parameters(engine):
            for key in _MOMENTS:
                moment = tensors[f"{key}:{name}"].to(parameter.device)
                if stage == 3:
                    shard: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                    safe_set_local_optimizer_state(parameter, shard_of(moment, shard, ranks.rank), key)
                elif wrapped:
                    safe_set_full_optimizer_state(parameter, moment, key)
                else:
                    optimizer.state[parameter] |= {"step": torch.tensor(steps), key: moment}
    return {name.removeprefix("state:"): tensor for name, tensor in tensors.items() if name.startswith("state:")}


def _link(engine: Any) -> None:
    """Let parameters find their moments at ZeRO 1 and 2: DeepSpeed links them when only the first optimiser group has any."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _states(folder: StoragePath) -> list[StoragePath]:
    found: list[StoragePath] = list(folder.glob("state-??????*"))
    return sorted(found, key=lambda path: int(path.name.removeprefix("state-")))


def _moment(engine: Any, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
    if engine.zero_optimization_stage() == 0:  # the optimiser is not wrapped, see build_engine
        return torch.as_tensor(engine.optimizer.state[parameter][key])
    whole: torch.Tensor = safe_get_full_optimizer_state(parameter, key)
    return whole


def _flat_groups(engine: Any) -> list[torch.Tensor]:
    """Return the flat float32 shards that DeepSpeed's wrappers give the optimiser in place of the parameters."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    raise AssertionError(f"{type(engine.optimizer).__name__} has no flat groups that are known here")
