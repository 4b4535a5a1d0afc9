"""Whether several GPUs hold one model while it scores, sharded by ZeRO 3: the one place that knows how a configuration says so."""

from __future__ import annotations

from pharmacist_ray.config.resources import ResourcesConfig
from pharmacist_ray.config.schema import Config
from pharmacist_ray.config.scoring import ScoringConfig


def can_share() -> bool:
    """Whether this version scores by groups of GPUs, and takes the selector's directions in the engine of its warm-up."""
    return "parallel" in ScoringConfig.model_fields and "gpus_per_actor" in ResourcesConfig.model_fields


def scoring_group(config: Config) -> int:
    """Return how many GPUs hold the model together while it scores."""
    shared = can_share() and getattr(config.scoring, "parallel", "none") == "sharded"
    return max(1, int(getattr(config.resources, "gpus_per_actor", 1))) if shared else 1


def fitting_group(config: Config) -> int:
    """Return how many GPUs hold the model together while directions are taken: those of a warm-up at ZeRO 3."""
    return max(1, config.resources.workers) if can_share() and config.selector.warmup.zero_stage == 3 else 1


def in_groups(gpus: int) -> dict[str, object]:
    """Return the keys, by dotted names, that have groups of so many GPUs score."""
    keys: dict[str, object] = {"scoring.parallel": "sharded" if gpus > 1 else "none", "resources.gpus_per_actor": gpus}
    known = {f"scoring.{name}" for name in ScoringConfig.model_fields} | {
        f"resources.{name}" for name in ResourcesConfig.model_fields
    }
    return {key: value for key, value in keys.items() if key in known}
