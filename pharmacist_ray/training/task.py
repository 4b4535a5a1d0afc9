"""One training run as plain data, and what can be said of it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pharmacist_ray.config.schema import LoraConfig, TrackingConfig, TrainConfig
from pharmacist_ray.config.scoring import GuardConfig
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import StoragePath
from pharmacist_ray.training.objectives import OBJECTIVES, settings_of


@dataclass(frozen=True)
class TrainTask:
    """One training run, as plain data that travels to the workers."""

    name: str
    """Shown in progress and errors."""
    out: str
    """Folder to publish: ``adapter/`` or ``model/``, ``history.jsonl``, ``result.json``."""
    model: ModelRef
    """Starting point; its adapters are merged first."""
    rows: tuple[str, ...]
    """Parquet files or folders of canonical rows, together the training set."""
    train: TrainConfig
    seed: int
    """Seeds the adapter's initialisation, dropout and the order of rows."""
    objective: str = "sft"
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of objectives by name."""
    harmful: tuple[str, ...] = ()
    """Harmful rows, for objectives that look at harm."""
    safe: tuple[str, ...] = ()
    """Safe rows, for objectives that train on such beside the rows of a fine-tune."""
    ordinary: tuple[str, ...] = ()
    """Trusted ordinary rows, for objectives that look at such beside the rows of a fine-tune."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    replay: tuple[str, ...] = ()
    """Further rows, of which every batch has the same share."""
    replay_share: float = 0.0
    row_weights: tuple[str, ...] = ()
    """Parquet files with ``id`` and ``weight`` of training rows; those that are in none weigh 1."""
    watched: tuple[str, ...] = ()
    """Parquet files of a few rows whose loss before the first step and after the last is reported."""
    guard: GuardConfig | None = None
    """The guard that an objective asks of the training rows, if it asks one."""
    verdicts: str = ""
    """Folder of what that guard has said of rows, which trainings on the same ones share."""
    start_adapter: str | None = None
    """Go on with this adapter instead of a fresh one."""
    checkpoints: tuple[int, ...] = ()
    """Steps after which the adapter is kept as ``step-000020/`` as well."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def check_task(task: TrainTask) -> None:
    """Find what is wrong with a task without loading anything.

    Raises:
        ConfigError: The objective does not fit the weights that are trained, or lacks its harmful or safe rows.
    """
    objective = OBJECTIVES[task.objective]
    if task.train.weights == "full" and task.start_adapter:
        raise ConfigError(f"{task.name}: an adapter cannot go on training with weights=full; use adapter=fresh")
    if objective.moves_weights and task.train.weights == "full" and task.model.dtype != "float32":
        raise ConfigError(
            f"{task.name}: {task.objective} perturbs the weights by less than {task.model.dtype} can hold; set model.dtype=float32 "
            "or train an adapter"
        )
    if task.train.batch_size < objective.least_batch:
        raise ConfigError(f"{task.name}: {task.objective} compares samples and needs batch_size {objective.least_batch} or more")
    if objective.harmful != "none" and not task.harmful:
        raise ConfigError(f"{task.name}: {task.objective} needs harmful rows; set alignment.harmful or data.harmful")
    if objective.safe and not task.safe:
        raise ConfigError(f"{task.name}: {task.objective} needs safe rows; set finetune.safe or data.validation")
    if objective.guarded and task.guard is None:
        raise ConfigError(f"{task.name}: {task.objective} asks a guard about every few words of an answer; set scoring.guard")
    if not task.ordinary and objective.ordinary(settings_of(task.objective, task.parameters)):
        raise ConfigError(f"{task.name}: {task.objective} needs trusted ordinary rows; set data.benign")
    if objective.prompt and task.train.zero_stage == 3:
        raise ConfigError(
            f"{task.name}: {task.objective} lets the model answer, for which every worker holds the whole of it; use zero_stage 0 to 2"
        )
    if objective.needs_reference and (task.train.weights == "full" or task.start_adapter):
        raise ConfigError(
            f"{task.name}: {task.objective} compares with the model before the fine-tune, which only a fresh adapter leaves in memory; "
            "use adapter=fresh and weights=lora"
        )


def progress_file(out: StoragePath) -> StoragePath:
    """Return where a running task says how far it is: a small JSON file beside its output, replaced about once a second."""
    return out.with_name(f"{out.name}.progress.json")
