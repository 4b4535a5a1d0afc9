"""Safe LoRA: what a fine-tune's adapter does outside the directions of alignment is taken out, without data (arXiv 2405.16833)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from pharmacist_ray.config.section import Count, Section
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.adapters import factors_of, module_of
from pharmacist_ray.training.objectives.step import Step
from pharmacist_ray.training.weights import set_weights, whole_weights


class SafeLoraSettings(Section):
    """Settings of ``safe_lora``."""

    mode: Literal["paper", "normalised", "topk", "drop"] = "paper"
    """What replaces B of a layer that is projected. ``paper``: C B with C = V Vᵀ / ‖V‖_F, no projector: it scales B by what V is long.
    ``normalised``: C over its largest eigenvalue. ``topk``: the projector on V's first left singular vectors. ``drop``: nothing, the
    control that says whether projecting is more than deleting (all but the first: ours)."""
    threshold: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.5
    """A layer is projected where the cosine between Δ and C Δ is at most this (public code: 0.5)."""
    rank: Count = 4
    """Singular vectors of ``topk``."""


def safe_lora(step: Step) -> None:
    """Replace B of every layer whose update points away from alignment (arXiv 2405.16833).

    V = W_aligned − W_base is the alignment's own adapter, s B_a A_a, so no pair of whole models is read and no d × d matrix is formed.
    Of a layer that the alignment did not touch V is 0 and so is its projection.

    Args:
        step: The step; ``merged`` ends with the alignment's adapter. Gets ``projected_layers``, and ``mean_cosine`` before.

    Raises:
        ConfigError: No adapter was aligned.
    """
    settings = step.get(SafeLoraSettings)
    if not step.merged:
        raise ConfigError("safe_lora needs a model that was aligned with an adapter, which says where alignment points")
    aligned = factors_of(step.merged[-1])
    weights = {name: weight.float().clone() for name, weight in whole_weights(step.engine)}
    cosines = []
    for name in [name for name in weights if ".lora_B." in name]:
        module, b = module_of(name), weights[name]
        a = weights[name.replace(".lora_B.", ".lora_A.")]
        left = (
            left_factor(*(one.to(b.device) for one in aligned[module]))
            if module in aligned
            else torch.zeros(len(b), 1).to(b.device)
        )
        projected, cosine = project(left, b, a, settings)
        cosines.append(cosine)
        if cosine <= settings.threshold:
            weights[name] = projected
    set_weights(step.engine, weights)
    step.measured |= {
        "projected_layers": float(sum(cosine <= settings.threshold for cosine in cosines)),
        "mean_cosine": sum(cosines) / len(cosines),
    }


def left_factor(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return L (d_out, r) with L Lᵀ = V Vᵀ for V = B A.

    Args:
        b: (d_out, r), the scale in it.
        a: (r, d_in).
    """
    values, vectors = torch.linalg.eigh(a.double() @ a.double().T)
    left: torch.Tensor = b.double() @ (vectors * values.clamp_min(0).sqrt())
    return left.to(b)


def project(left: torch.Tensor, b: torch.Tensor, a: torch.Tensor, settings: SafeLoraSettings) -> tuple[torch.Tensor, float]:
    """Return what B becomes if its layer is projected, and the cosine between B A and C B A.

    Args:
        left: L (d_out, r') with L Lᵀ = V Vᵀ.
        b: B (d_out, r) of the fine-tune.
        a: A (r, d_in) of the fine-tune.
        settings: How.
    """
    toward = left @ (left.T @ b)  # V Vᵀ B; that C is scaled does nothing to a cosine
    gram = a.double() @ a.double().T

    def inner(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(((x.double().T @ y.double()) * gram).sum())

    lengths = (inner(b, b) * inner(toward, toward)) ** 0.5
    cosine = inner(b, toward) / lengths if lengths else 0.0
    squares = left.double().T @ left.double()  # its eigenvalues are the squared singular values of V
    norm = float(squares.diagonal().sum()) ** 0.5
    if settings.mode == "drop" or not norm:
        return torch.zeros_like(b), cosine
    if settings.mode == "topk":
        vectors, _, _ = torch.linalg.svd(left.double(), full_matrices=False)
        first = vectors[:, : settings.rank].to(b)
        return first @ (first.T @ b), cosine
    scale = norm if settings.mode == "paper" else float(torch.linalg.eigvalsh(squares)[-1])
    return toward / scale, cosine
