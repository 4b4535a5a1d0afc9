"""T-Vaccine: Vaccine on the layers that a harmful gradient touches most (arXiv 2410.09760)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn

from pharmacist_ray.config.section import Count, Positive, Section
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.taps import decoder_layers, gradients_at, modules_at
from pharmacist_ray.training.objectives.step import Step, mixed_seed
from pharmacist_ray.training.objectives.vaccine import perturbed_embeddings
from pharmacist_ray.training.weights import release_gathered

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_ATTENTION = re.compile(r"\.(?:self_attn|attn|attention|self_attention)\.")


class TVaccineSettings(Section):
    """Settings of ``t_vaccine``."""

    rho: Positive = 3.0
    """Perturbation intensity ρ, the radius of the active layers' joint ball (public code's read-me: 3)."""
    layers: Count = 8
    """S, how many layers are active (public code: 8 of 32)."""
    interval: Count = 20
    """J, optimiser steps for which a set of active layers is kept (public code: 20)."""
    probe_interval: Count = 200
    """K, optimiser steps between two measurements of the layers (public code: 200)."""
    probe_rows: Count = 1
    """Harmful rows in a measurement (public code: 1, which is noisy; 8 is steadier and costs next to nothing)."""
    draw: Literal["proportional", "top", "uniform"] = "proportional"
    """How the active layers are chosen: by the norms' shares (published), the S largest, or blindly (both in the public code)."""
    frozen: Literal["layer", "attention"] = "layer"
    """What an inactive layer keeps: all its weights (the paper's text), or its attention's only (what the public code does)."""


def t_vaccine(step: Step) -> Iterator[torch.Tensor]:
    """Yield Vaccine's loss with only the active layers perturbed and trained.

    Every K steps s_l = mean over probe rows of ‖∂h/∂a_l‖ is measured at the attention outputs a_l with all layers in place; every J
    steps S layers are drawn without replacement with p_l = s_l / Σ s. The draw is a function of the seed, the step and s, so all
    workers draw the same. Inactive layers are left as they are to the bit: their gradients are zeroed and their groups take a step
    of length zero, in which Adam's moments decay rather than go stale (ours; the public code freezes them). Two passes and, every
    K steps, one over the probe rows. With gradient checkpointing on, only the inactive layers recompute (published).

    Args:
        step: The step.

    Raises:
        ConfigError: More active layers are asked for than the model has; see `t_vaccine_fits`.
    """
    settings = step.get(TVaccineSettings)
    model_layers, modules = decoder_layers(step.model), modules_at(step.model, "attention")
    t_vaccine_fits(step.model, {TVaccineSettings: settings})
    if step.number % settings.probe_interval == 0 or "t_vaccine.norms" not in step.state:
        step.state["t_vaccine.norms"] = _norms(step, settings.probe_rows)
    if step.number % settings.interval == 0 or "t_vaccine.active" not in step.state:
        drawn = draw_layers(step.state["t_vaccine.norms"].numpy(), settings, mixed_seed(step.seed, step.number, "layers"))
        step.state["t_vaccine.active"] = torch.tensor(drawn)
    active = step.state["t_vaccine.active"].tolist()

    inactive = {str(layer) for layer in range(len(modules))} - {str(layer) for layer in active}
    names = {group_of(name) for name, _ in step.model.named_parameters()}
    step.frozen = {
        name for name in names if name.split(".")[0] in inactive and (settings.frozen == "layer" or name.endswith(".attention"))
    }
    zeroed = {name: torch.zeros_like for name in step.trained if group_of(name) in step.frozen}
    with step.changed_gradients(zeroed), _not_recomputing([model_layers[layer] for layer in active]):
        yield from perturbed_embeddings(step, [modules[layer] for layer in active], settings.rho)


def t_vaccine_fits(model: nn.Module, settings: Mapping[type[Section], Section]) -> None:
    """Raise an error of ours if a model has no attention to tap, or fewer layers than are to be active."""
    chosen = settings[TVaccineSettings]
    assert isinstance(chosen, TVaccineSettings)
    if chosen.layers > (count := len(modules_at(model, "attention"))):
        raise ConfigError(f"t_vaccine.layers={chosen.layers} but the model has {count} layers; lower it")


def draw_layers(norms: np.ndarray, settings: TVaccineSettings, seed: int) -> list[int]:
    """Return the active layers in ascending order.

    Args:
        norms: s_l, (L,), not negative.
        settings: How many, and how.
        seed: Fixes the draw.
    """
    if settings.draw == "top":
        return sorted(np.argsort(-norms, kind="stable")[: settings.layers].tolist())
    shares = np.ones(len(norms)) if settings.draw == "uniform" else norms.astype(np.float64)
    shares = shares + 1e-9 * max(float(shares.max()), 1e-30)  # so that S layers can be drawn where fewer have a gradient
    drawn = np.random.default_rng(seed).choice(len(norms), settings.layers, replace=False, p=shares / shares.sum())
    return sorted(drawn.tolist())


def group_of(parameter: str) -> str:
    """Return the optimiser group of a parameter: its layer's number with ``attention`` or ``rest``, or ``outside``."""
    if not (found := _LAYER.search(parameter)):
        return "outside"
    return f"{found[1]}.{'attention' if _ATTENTION.search(parameter) else 'rest'}"


def _norms(step: Step, rows: int) -> torch.Tensor:
    """Return s_l (L,) on the CPU, from the first rows of the step's whole harmful batch: the same however it is cut."""
    modules = modules_at(step.model, "attention")
    total = torch.zeros(len(modules), device=step.ranks.device)
    for index, (batch, places) in enumerate(zip(step.harmful, step.positions, strict=True)):
        if index * len(batch) * step.ranks.workers >= rows:
            break  # on every worker at the same micro-batch
        with step.same_dropout("probe", index):
            gradients = gradients_at(modules, partial(step.loss, batch, aside=True))
        release_gathered(step.engine)
        norms = torch.stack([g.float().flatten(1).norm(dim=1) for g in gradients]) * len(batch)  # (L, B), each of its own loss
        total += norms[:, [place < rows for place in places]].sum(1)
    available = sum(map(len, step.positions)) * step.ranks.workers
    return (step.ranks.total(total) / min(rows, available)).cpu()


@contextmanager
def _not_recomputing(layers: list[nn.Module]) -> Iterator[None]:
    """Switch gradient checkpointing off in some layers."""
    before = [getattr(layer, "gradient_checkpointing", False) for layer in layers]
    try:
        for layer in layers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.gradient_checkpointing = flag  # type: ignore[assignment]
