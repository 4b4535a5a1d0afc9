"""Per-sample first-order influence ⟨∇l_i(θ), v_k⟩ for many directions v_k at once (arXiv 2510.10085, Algorithm 1, the s_i).

Three ways to the same number:

    hooks        one batched forward and backward; the per-sample gradients of one matrix at a time, dotted with v and freed.
                 Exact. The default: right for adapters, whose matrices are small. Also gives the gradient norms.
    ghost        the same pass, but ⟨Σ_t g_t x_tᵀ, V⟩ = Σ_t g_tᵀ V x_t, so that no per-sample gradient is ever formed. Exact.
                 For full weights, whose per-sample gradients would fill the memory.
    difference   (l_i(θ + εv̂) − l_i(θ − εv̂)) / 2ε · ‖v‖ from two forwards per direction. Least memory, works for any parameter.

The first two never build a weight's gradient: every parameter is frozen, and autograd runs back to the first module that has one of
them and no further; see `sample_grads`. Over many batches at the same weights they are cheaper with the adapter `folded` in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import ConfigError, ModelError, unknown_name
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.modes import stand_still
from pharmacist_ray.models.perturb import dot, global_norm, perturbed
from pharmacist_ray.models.sample_grads import Part, tapped_losses

Directions = Mapping[str, torch.Tensor]
"""Parameter name → (K, *shape of the parameter), float32, best on the model's device. A tied weight goes by either name."""

EPSILON = 0.05
"""The step of the central difference along the unit direction [ours]: 1e-3 relative error in float32; smaller steps are worse."""

CHUNK = 2**26
"""How many numbers of per-sample gradients `hooks` holds at once (256 MiB): it splits the batch where a matrix is larger."""


@dataclass(frozen=True, eq=False)
class Influence:
    """What one pass over a batch says about its B samples; all float32 on the model's device."""

    losses: torch.Tensor
    """(B,) mean NLL over the answer's tokens."""
    dots: torch.Tensor
    """(B, K) ⟨∇l_i, v_k⟩ over the parameters named in the directions."""
    grad_norms: torch.Tensor | None = None
    """(B,) ‖∇l_i‖ over the same parameters, if asked for; it turns dots into cosines."""


def influence(model: Any, batch: Batch, directions: Directions, *, method: str = "hooks", norms: bool = False) -> Influence:
    """Return the influence of every sample of a batch along every direction.

    Dropout is off during the pass. Weights, ``requires_grad`` flags and train/eval modes are the same afterwards.

    Args:
        model: A causal language model (Hugging Face or PEFT; of a DeepSpeed engine its ``module``). Gradient checkpointing, if
            enabled and non-reentrant, stays on.
        batch: Right-padded batch on the model's device.
        directions: The K directions, parameter by parameter; parameters left out count as zero.
        method: A key of `METHODS`.
        norms: Also return the gradient norms; only with ``hooks``.

    Raises:
        ConfigError: The method is unknown, or cannot give norms.
        ModelError: A direction names no parameter, has a wrong shape, or belongs to a parameter that the method cannot cover.
    """
    if method not in METHODS:
        raise unknown_name("influence method", method, list(METHODS))
    if norms and method != "hooks":
        raise ConfigError(f"influence method '{method}' forms no per-sample gradient and so has no norms; use 'hooks'")
    _check(model, directions)
    with _still(model):
        return METHODS[method](model, batch, directions, norms)


def influence_terms(model: Any, batch: Batch, directions: Directions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each parameter adds to the influences and to the squared gradient norms, by ``hooks``.

    Args:
        model: As for `influence`.
        batch: As for `influence`.
        directions: As for `influence`.

    Returns:
        (B, K, P) and (B, P), float32, the parameters in the order of the directions.

    Raises:
        ModelError: As for `influence`.
    """
    _check(model, directions)
    with _still(model):
        return _terms(model, batch, directions, norms=True)[1:]


def loop_influence(model: Any, batch: Batch, directions: Directions) -> Influence:
    """Return the same by one backward per sample, unpadded: the plain, slow reference that tests compare with."""
    params = _check(model, directions)
    losses, dots, grad_norms = [], [], []
    with _still(model), torch.enable_grad():
        for param in params.values():
            param.requires_grad_(True)
        for index in range(len(batch)):
            length = int(batch.attention_mask[index].sum())
            tensors = (batch.input_ids, batch.attention_mask, batch.labels)
            loss = per_sample_nll(model, Batch(*(tensor[index : index + 1, :length] for tensor in tensors)))
            grads = torch.autograd.grad(loss.sum(), list(params.values()), allow_unused=True, materialize_grads=True)
            losses.append(loss.detach()[0])
            dots.append(torch.stack([dot(grads, step) for step in _split(directions)]))
            grad_norms.append(global_norm(grads))
    return Influence(torch.stack(losses), torch.stack(dots).float(), torch.stack(grad_norms).float())


def _hooks(model: Any, batch: Batch, directions: Directions, norms: bool) -> Influence:
    losses, dots, squares = _terms(model, batch, directions, norms)
    return Influence(losses, dots.sum(-1), squares.sum(-1).sqrt() if norms else None)


def _terms(model: Any, batch: Batch, directions: Directions, norms: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses (B,) and, parameter by parameter, products (B, K, P) and squared norms (B, P), zeros unless asked for."""
    places = {name: place for place, name in enumerate(directions)}
    dots = _zeros(batch, directions)[..., None].repeat(1, 1, len(places))
    squares = torch.zeros(len(batch), len(places), device=batch.labels.device)

    def use(name: str, parts: list[Part]) -> None:
        steps = directions[name].to(dots).flatten(1)
        for rows in _slices(len(batch), CHUNK // steps.shape[1]):
            grad = reduce(torch.add, [part.gradient(rows) for part in parts]).flatten(1)  # several parts: a tied weight
            dots[rows, :, places[name]] = grad @ steps.T
            if norms:
                squares[rows, places[name]] = grad.square().sum(1)

    return tapped_losses(model, batch, directions, use), dots, squares


def _ghost(model: Any, batch: Batch, directions: Directions, norms: bool) -> Influence:
    dots = _zeros(batch, directions)

    def use(name: str, parts: list[Part]) -> None:
        for part in parts:
            dots.add_(part.product(directions[name].to(dots)))

    return Influence(tapped_losses(model, batch, directions, use), dots)


def _difference(model: Any, batch: Batch, directions: Directions, norms: bool) -> Influence:
    params = _check(model, directions)
    for name, param in params.items():
        if param.dtype != torch.float32:
            raise ModelError(f"'{name}' is {param.dtype}, too coarse for influence method 'difference': use 'hooks', or float32")
        if param.shape != directions[name].shape[1:]:
            raise ModelError(f"'{name}' is sharded over the ranks (ZeRO-3), which method 'difference' cannot move: use 'hooks'")
    dots, losses = _zeros(batch, directions), []
    for k, step in enumerate(_split(directions)):
        length = float(global_norm(step))
        sides = []
        for sign in (1.0, -1.0):
            with (
                torch.no_grad(),
                _in_full_precision(),
                perturbed(list(params.values()), step, sign * EPSILON / length if length else 0.0),
            ):
                sides.append(per_sample_nll(model, batch))
        dots[:, k] = (sides[0] - sides[1]) * (length / (2 * EPSILON))
        losses.append((sides[0] + sides[1]) / 2)  # l_i(θ) up to O(ε²), without a third forward
    return Influence(torch.stack(losses).mean(0), dots)


METHODS: dict[str, Callable[[Any, Batch, Directions, bool], Influence]] = {
    "hooks": _hooks,
    "ghost": _ghost,
    "difference": _difference,
}


def _check(model: Any, directions: Directions) -> dict[str, torch.nn.Parameter]:
    """Return the parameters the directions name, or raise for a name, a shape or a number of directions that is wrong."""
    known = dict(model.named_parameters(remove_duplicate=False))
    counts = {int(direction.shape[0]) for direction in directions.values()}
    if len(counts) != 1 or counts == {0}:
        raise ModelError(f"directions need the same number K ≥ 1 of vectors for every parameter, not {sorted(counts) or 'none'}")
    for name, direction in directions.items():
        if name not in known:
            raise ModelError(f"direction '{name}' names no parameter of this model; was it made for another model or adapter?")
        shape = getattr(known[name], "ds_shape", known[name].shape)  # under ZeRO-3 the tensor itself is empty
        if direction.shape[1:] != shape:
            raise ModelError(f"direction '{name}' has shape {tuple(direction.shape[1:])}, the parameter {tuple(shape)}")
    params = {name: known[name] for name in directions}
    if len({id(param) for param in params.values()}) < len(params):
        raise ModelError("two directions name the same tied weight; give one direction for both names")
    return params


@contextmanager
def _still(model: Any) -> Iterator[None]:
    """Switch dropout and all parameter gradients off inside the block, but keep gradient checkpointing on."""
    modes = {module: module.training for module in model.modules()}
    flags = {param: param.requires_grad for param in model.parameters()}
    try:
        model.requires_grad_(False)
        stand_still(model)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for param, flag in flags.items():
            param.requires_grad_(flag)


@contextmanager
def _in_full_precision() -> Iterator[None]:
    """Multiply float32 in float32 inside the block: TF32 would round away a difference of two losses that are nearly equal."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _split(directions: Directions) -> list[list[torch.Tensor]]:
    """Return the K directions one by one, each as a list over the parameters."""
    return [list(step) for step in zip(*directions.values(), strict=True)]


def _zeros(batch: Batch, directions: Directions) -> torch.Tensor:
    return torch.zeros(len(batch), len(next(iter(directions.values()))), device=batch.labels.device)


def _slices(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, start + step) for start in range(0, size, step)]
