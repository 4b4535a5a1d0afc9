"""Antidote: after a fine-tune the weights that matter most for harmful answers are set to zero (arXiv 2408.09600)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from pharmacist_ray.config.section import Section, Share
from pharmacist_ray.data.render import Batch
from pharmacist_ray.training.objectives.step import Step, mixed_seed
from pharmacist_ray.training.weights import release_gathered, set_weights, whole_weights


class AntidoteSettings(Section):
    """Settings of ``antidote``."""

    share: Share = 0.1
    """Share α of every output row that is pruned (published: 0.2; public scripts: 0.1 and, for mathematics, 0.01 to 0.05)."""
    mode: Literal["plain", "contrast", "random"] = "plain"
    """``plain``: the largest importance on harmful answers. ``contrast``: of these, what is not among the largest on the user's own rows
    as well, or the mask is of what language needs (ours). ``random``: as many at random, the control."""


def antidote(step: Step) -> None:
    """Zero the share α of each row's weights with the largest |W_ij| ‖X_j‖ on harmful rows, X_j the j-th input (arXiv 2408.09600).

    A and B of an adapter are pruned each for itself, as published; of full weights every linear layer is. One forward over a few
    batches, through what is not pruned yet.

    Args:
        step: The step. Gets ``pruned_share``.
    """
    settings = step.get(AntidoteSettings)
    modules = {name: module for name, module in step.model.named_modules() if isinstance(module, nn.Linear) and _trained(module)}
    harmful = input_norms(step, modules, step.harmful)
    user = input_norms(step, modules, step.batches) if settings.mode == "contrast" else {}
    weights = {name: weight.float().clone() for name, weight in whole_weights(step.engine)}
    pruned = 0
    for name in (name for name, norms in harmful.items() if norms.any()):  # a head or an expert that saw nothing is left alone
        weight = weights[f"{name}.weight"]
        if settings.mode == "random":
            generator = torch.Generator().manual_seed(mixed_seed(step.seed, "antidote", name))
            mask = largest(torch.rand(weight.shape, generator=generator).to(weight.device), settings.share)
        else:
            mask = largest(weight.abs() * harmful[name], settings.share)
            if settings.mode == "contrast":
                mask &= ~largest(weight.abs() * user[name], settings.share)
        weight[mask] = 0.0
        pruned += int(mask.sum())
    step.measured["pruned_share"] = pruned / sum(weight.numel() for weight in weights.values())
    set_weights(step.engine, weights)


def largest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Return where the share of each row with the largest scores is; of equal ones the first.

    Args:
        scores: (d_out, d_in).
        share: Of d_in, rounded down.
    """
    count = int(share * scores.shape[1])
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def input_norms(step: Step, modules: dict[str, nn.Linear], batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Return ‖X_j‖₂ of every input j over all tokens of all workers' rows, padding left out, by module: (d_in,) each."""
    squares = {name: torch.zeros(module.in_features, device=step.ranks.device) for name, module in modules.items()}
    step.model.eval()
    for batch in batches:
        real = batch.attention_mask.bool()
        with torch.no_grad(), _watched(modules, squares, real):
            step.forwards += 1
            step.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1, use_cache=False)
        release_gathered(step.engine)
    step.model.train()
    return {name: step.ranks.total(square).sqrt() for name, square in squares.items()}


@contextmanager
def _watched(modules: dict[str, nn.Linear], squares: dict[str, torch.Tensor], real: torch.Tensor) -> Iterator[None]:
    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def see(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].shape[:2] == real.shape:
                squares[name] += inputs[0][real].float().square().sum(0)

        return modules[name].register_forward_pre_hook(see)

    handles = [watch(name) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trained(module: nn.Linear) -> bool:
    return module.weight.requires_grad
