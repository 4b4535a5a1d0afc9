"""Whether several workers hold one model while it scores and answers, sharded by ZeRO 3: the one place that knows how that is said."""

from __future__ import annotations

from pharmacist_ray.config.schema import Config


def may_share(config: Config) -> bool:
    """Whether a configuration's model may be spread over a group: not in few bits, nor where whole weights are moved."""
    return not config.model.quantization and config.scoring.method != "difference"


def group_of(config: Config) -> int:
    """Return how many GPUs hold the model together while it scores and answers."""
    return config.resources.workers_per_actor


def fitting_group(config: Config) -> int:
    """Return how many GPUs hold the model together while directions are taken: those of a warm-up at ZeRO 3."""
    return max(1, config.resources.workers) if config.selector.warmup.zero_stage == 3 else 1


def in_groups(gpus: int) -> dict[str, object]:
    """Return the keys, by dotted names, that have groups of so many GPUs score and answer."""
    return {"resources.workers_per_actor": gpus}
