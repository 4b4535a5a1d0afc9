"""The trained weights of a DeepSpeed engine: read, set or moved whole, whatever ZeRO keeps where.

DeepSpeed is not imported here, for it takes seconds: objectives are looked at long before there is an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from pharmacist_ray.models.perturb import perturbed


@contextmanager
def perturbed_weights(engine: Any, direction: Sequence[torch.Tensor], scale: float) -> Iterator[None]:
    """Hold the trained parameters at θ + scale · direction inside the block, and exactly at θ again after it.

    At ZeRO 3 the shards are moved; what was gathered from them is dropped on both sides.

    Args:
        engine: The DeepSpeed engine.
        direction: One whole tensor per trained parameter, the same on every worker.
        scale: The length of the step in units of ``direction``.
    """
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    if engine.zero_optimization_stage() < 3:
        with perturbed(trained, direction, scale):
            yield
        return
    release_gathered(engine)
    shards = [parameter.ds_tensor for parameter in trained]
    pieces = [shard_of(step, shard, dist.get_rank()) for step, shard in zip(direction, shards, strict=True)]
    with perturbed(shards, pieces, scale):
        try:
            yield
        finally:
            release_gathered(engine)


def release_gathered(engine: Any) -> None:
    """Drop what ZeRO 3 has gathered: a gradient taken past the engine leaves modules behind that wait for their turn to be freed.

    Args:
        engine: The DeepSpeed engine.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.empty_partition_cache()


def shard_of(whole: torch.Tensor, shard: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the part of a whole tensor that a worker's ZeRO 3 shard holds, zeros where the last shard is padded.

    Args:
        whole: The tensor.
        shard: The worker's shard of a tensor of that shape.
        rank: The worker.
    """
    flat = whole.flatten()[rank * shard.numel() : (rank + 1) * shard.numel()]
    return torch.nn.functional.pad(flat, (0, shard.numel() - flat.numel()))


def trained_parameters(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters that are trained by name; at ZeRO 3 they are empty outside a pass."""
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def whole_weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every trained weight whole, of bfloat16 ones the float32 master; all workers take part.

    What is yielded may be the weight itself: who keeps it copies it.

    Args:
        engine: The DeepSpeed engine.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in trained_parameters(engine):
        whole = parameter if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(parameter)
        yield name, whole.detach()


def set_weights(engine: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Put whole weights in the place of the trained ones, float32 masters and shards included.

    Args:
        engine: The DeepSpeed engine.
        weights: One whole tensor per trained parameter, the same on every worker.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    stage = engine.zero_optimization_stage()
    release_gathered(engine)
    with torch.no_grad():
        for name, parameter in trained_parameters(engine):
            weight = weights[name].to(parameter.device)
            if stage == 3:
                shard: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                piece = shard_of(weight, shard, dist.get_rank())
                shard.copy_(piece)
                safe_set_local_fp32_param(parameter, piece)
                continue
            parameter.copy_(weight)
            if stage:
                safe_set_full_fp32_param(parameter, weight)


def whole_size(parameter: torch.nn.Parameter) -> int:
    """Return how many numbers a parameter has, wherever ZeRO 3 keeps them."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def step_norm(engine: Any) -> float | None:
    """Return the global gradient norm of the step just taken, before clipping.

    Args:
        engine: The DeepSpeed engine.
    """
    norm = engine.get_global_grad_norm() if engine.clipped_norm is None else engine.clipped_norm
    return None if norm is None else float(norm)
