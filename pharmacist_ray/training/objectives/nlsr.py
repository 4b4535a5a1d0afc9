"""NLSR: neurons that safety hangs on are put back where a fine-tune has turned them, without training (arXiv 2412.12497)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from pharmacist_ray.config.section import Section, Share
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.adapters import factors_of, module_of
from pharmacist_ray.training.objectives.step import Step
from pharmacist_ray.training.weights import release_gathered, set_weights, whole_weights

Factors = tuple[torch.Tensor, torch.Tensor]
"""B (d_out, r), the scale in it, and A (r, d_in) of an update B A."""


class NlsrSettings(Section):
    """Settings of ``nlsr``."""

    beta: Annotated[float, Field(ge=0.0)] = 0.9
    """How far the reference lies beyond the alignment, (1 + β)ΔW_a (published: 0.9)."""
    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.8
    """P_SR: the share of an update's rank, and of its neurons, that safety is not looked for in (published: 0.8)."""
    layers: Share = 0.5
    """Share of the layers that are repaired, those least like the reference (published: each with a probability around 0.5)."""


@dataclass(frozen=True)
class Layer:
    """One adapted matrix."""

    aligned: Factors
    """ΔW_a; the reference is 1 + β times it."""
    user: Factors
    """What the fine-tune added to the alignment's ΔW_a, its B without the scale."""
    scale: float
    """That of the user's adapter."""
    inputs: torch.Tensor
    """Gram matrix (r_a, r_a) of A_a x over the tokens of safe rows."""


def nlsr(step: Step) -> None:
    """Replace the safety-critical neurons of the layers that a fine-tune turned most by those of a reference (arXiv 2412.12497).

    Per layer, with ΔW_a the alignment's update and ΔW_t that and the fine-tune's together: the reference is ΔW_e = (1 + β)ΔW_a; U are
    the first r(1 − P_SR) left singular vectors of ΔW_e X, X the inputs on safe rows; a share 1 − P_SR of the neurons is critical, those
    with the largest ‖(U Uᵀ ΔW_e)_i‖; s is the cosine between the critical rows of ΔW_e and of ΔW_t. In the layers with the smallest s,
    critical rows of ΔW_t become those of ΔW_e.

    Variant: a neuron is a row of the update, as A and B of two adapters have no entry in common (the paper's is an entry of A or of B of
    one adapter that was trained on); the layers are the least similar ones and not drawn (the public code draws the most similar); what
    comes of it is put back in the fine-tune's adapter, as the nearest update of its rank. No matrix of d_out × d_in is formed. One
    forward over a few batches.

    Args:
        step: The step; ``merged`` ends with the alignment's adapter. Gets ``repaired_layers``, ``mean_similarity`` before, and
            ``lost_share``, the largest share of a repaired layer's update that its rank does not hold.

    Raises:
        ConfigError: No adapter was aligned.
    """
    settings = step.get(NlsrSettings)
    if not step.merged:
        raise ConfigError("nlsr needs a model that was aligned with an adapter, whose neurons it puts back")
    weights = {name: weight.float().clone() for name, weight in whole_weights(step.engine)}
    layers = _layers(step, weights)
    critical = {name: critical_neurons(layer, settings) for name, layer in layers.items()}
    alike = {name: similarity(layer, critical[name]) for name, layer in layers.items()}
    turned = sorted(alike, key=lambda name: (alike[name], name))[: round(settings.layers * len(alike))]
    lost = [0.0]
    for name in turned:
        b, a, share = repaired(layers[name], critical[name], settings.beta)
        weights[name], weights[name.replace(".lora_B.", ".lora_A.")] = b, a
        lost.append(share)
    set_weights(step.engine, weights)
    step.measured |= {
        "repaired_layers": float(len(turned)),
        "mean_similarity": sum(alike.values()) / max(1, len(alike)),
        "lost_share": max(lost),
    }


def critical_neurons(layer: Layer, settings: NlsrSettings) -> torch.Tensor:
    """Return which rows of an update safety hangs on, (d_out,) of truth values.

    Args:
        layer: The layer.
        settings: P_SR.
    """
    b, a = (one.double() for one in layer.aligned)  # the reference is a multiple of it
    values, vectors = torch.linalg.eigh(layer.inputs.double())
    left, _, _ = torch.linalg.svd(b @ (vectors * values.clamp_min(0).sqrt()), full_matrices=False)  # of B A X, by the Gram of A X
    first = left[:, : max(1, round(b.shape[1] * (1 - settings.sparsity)))]
    kept = first @ (first.T @ b)
    lengths = ((kept @ (a @ a.T)) * kept).sum(1)  # squared, of the rows of U Uᵀ B A
    count = max(1, round(len(b) * (1 - settings.sparsity)))
    mask = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    mask[torch.sort(lengths, descending=True, stable=True).indices[:count]] = True
    return mask


def similarity(layer: Layer, critical: torch.Tensor) -> float:
    """Return the cosine between the critical rows of the reference and of the update after the fine-tune; 0 where one is 0.

    Args:
        layer: The layer.
        critical: (d_out,) of truth values.
    """
    aligned = _rows(layer.aligned, critical)  # how long the reference is does nothing to a cosine
    both = _stacked(aligned, _rows(_scaled(layer), critical))
    lengths = (_inner(aligned, aligned) * _inner(both, both)) ** 0.5
    return _inner(aligned, both) / lengths if lengths > 0 else 0.0


def repaired(layer: Layer, critical: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return B without its scale and A of the fine-tune's adapter after the repair, and the share of the update that is lost by its rank.

    Args:
        layer: The layer.
        critical: (d_out,) of truth values.
        beta: β.
    """
    beyond = layer.aligned[0] * beta, layer.aligned[1]  # the alignment itself is in the frozen weights
    b, a = _stacked(_rows(_scaled(layer), ~critical), _rows(beyond, critical))
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(left.R @ right.R.T)
    rank = layer.user[1].shape[0]
    root = values[:rank].clamp_min(0).sqrt()
    new_b, new_a = left.Q @ (u[:, : len(root)] * root), (right.Q @ (v[: len(root)].T * root)).T
    short = rank - len(root)
    new_b = torch.nn.functional.pad(new_b, (0, short)) / layer.scale
    new_a = torch.nn.functional.pad(new_a, (0, 0, 0, short))
    whole = float(values.square().sum())
    lost = float(values[rank:].square().sum()) / whole if whole else 0.0
    return new_b.to(layer.user[0]), new_a.to(layer.user[1]), lost


def _layers(step: Step, weights: dict[str, torch.Tensor]) -> dict[str, Layer]:
    """Return the layers that alignment and fine-tune both adapt, by the name of their B."""
    aligned, found = factors_of(step.merged[-1]), {}
    modules = dict(step.model.named_modules())
    names = {module_of(name): name for name in weights if ".lora_B." in name and module_of(name) in aligned}
    holders = {module: modules[name.rpartition(".lora_B.")[0]] for module, name in names.items()}
    grams = _grams(step, holders, {module: aligned[module][1] for module in names})
    for module, name in names.items():
        b, a = (one.to(step.ranks.device) for one in aligned[module])
        user = weights[name], weights[name.replace(".lora_B.", ".lora_A.")]
        (scale,) = holders[module].scaling.values()
        found[name] = Layer((b, a), user, float(scale), grams[module])
    return found


@torch.no_grad()
def _grams(step: Step, holders: dict[str, nn.Module], projections: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Σ_t (A_a x_t)(A_a x_t)ᵀ over all tokens of all workers' safe rows, by module: (r_a, r_a) each."""
    sums = {module: a.new_zeros(len(a), len(a)).to(step.ranks.device) for module, a in projections.items()}
    real = torch.empty(0)

    def watch(module: str) -> torch.utils.hooks.RemovableHandle:
        a = projections[module].to(step.ranks.device)

        def see(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].shape[:2] == real.shape:
                seen = inputs[0][real].float() @ a.T
                sums[module] += seen.T @ seen

        return holders[module].register_forward_pre_hook(see)

    handles = [watch(module) for module in holders]
    step.model.eval()
    try:
        for batch in step.safe:
            real = batch.attention_mask.bool()
            step.forwards += 1
            step.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1, use_cache=False)
            release_gathered(step.engine)
    finally:
        step.model.train()
        for handle in handles:
            handle.remove()
    return {module: step.ranks.total(one) for module, one in sums.items()}


def _scaled(layer: Layer) -> Factors:
    return layer.user[0] * layer.scale, layer.user[1]


def _rows(factors: Factors, mask: torch.Tensor) -> Factors:
    return factors[0].double() * mask[:, None], factors[1].double()


def _stacked(one: Factors, other: Factors) -> Factors:
    """Return the factors of a sum."""
    return torch.cat([one[0], other[0]], dim=1), torch.cat([one[1], other[1]])


def _inner(one: Factors, other: Factors) -> float:
    """Return ⟨B A, B' A'⟩."""
    return float(((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum())
