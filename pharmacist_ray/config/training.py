"""How one training run optimises, and where its curves go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pharmacist_ray.config.section import Count, Positive, Section, Share


class TrainConfig(Section):
    """How one training run optimises."""

    steps: Count = 100
    """Optimiser steps."""
    epochs: Positive | None = None
    """Passes over the rows, in the place of steps, so that fewer rows take less time; for alignment.train and attacks (replay rows
    do not count)."""
    batch_size: Count = 10
    """Rows per optimiser step, over all workers and accumulation (git-disl public code: 10)."""
    accumulation: Count = 1
    """Micro-batches per optimiser step on each worker."""
    lr: Positive = 1e-3
    """Peak learning rate (Vaccine's public code: 1e-3)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning-rate schedule after the warm-up (Booster: constant)."""
    warmup: Share = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled weight decay (public code: 0.1)."""
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Global gradient norm above which a step is scaled down; 0 turns it off."""
    weights: Literal["lora", "full"] = "lora"
    """Train a fresh adapter, or all weights."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards optimiser state, 2 shards gradients too, 3 shards the model too, which is then
    whole on no worker, neither while it loads."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in CPU memory: the optimiser's state (zero_stage 1 to 3), or the sharded model too (zero_stage 3)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    save_every: Annotated[int, Field(ge=0)] = 200
    """Optimiser steps between two saved states that an interrupted run goes on from; 0 keeps none."""

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> TrainConfig:
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload={self.offload} needs zero_stage {needed} or higher, got zero_stage={self.zero_stage}")
        return self


class TrackingConfig(Section):
    """Where training curves go besides the run's own files."""

    to: list[str] = []
    """Any of tensorboard, wandb, mlflow, or a plug-in's; wandb and mlflow must be installed (`pip install 'pharmacist-ray[tracking]'`)."""
    project: str = "pharmacist"
    """Project (W&B) or experiment (MLflow)."""
