"""RepNoise: alignment that pushes what the model makes of harmful text towards noise (arXiv 2405.14577)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from pharmacist_ray.config.section import Section
from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.models.losses import surrogate
from pharmacist_ray.models.taps import captured, modules_at
from pharmacist_ray.training.objectives.step import Step, mixed_seed

KERNELS = 5
"""Widths in the mixture of Gaussian kernels, each twice the one before (public code: 5)."""


class RepNoiseSettings(Section):
    """Settings of ``repnoise``. The authors warn that α, β and the learning rate always have to be searched."""

    alpha: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight α of the ascent on harmful answers (public code: 1; its ports: 0.1)."""
    beta: Annotated[float, Field(ge=0.0)] = 0.001
    """Weight β of the noise loss (published checkpoint: 0.001)."""
    mmd: Literal["unbiased", "biased"] = "unbiased"
    """The estimator of the squared discrepancy. The public code's biased one has an offset that grows as the batch shrinks (1.5 at
    4 samples of one distribution), so β would have to follow the batch size."""
    ascent: Literal["all_layers", "last"] = "all_layers"
    """Whether the loss that is ascended is read off at every depth through the output head (public code), or at the last only (the
    paper's text)."""


def repnoise(step: Step) -> Iterator[torch.Tensor]:
    """Yield L_stab + β·L_noise − α·log L_asc (arXiv 2405.14577).

    L_stab is the alignment loss f on the step's own rows. On as many harmful answers, in the tokens that differ from the safe answer
    to the same prompt: L_noise is the mean over layers of the squared MMD between the MLPs' outputs and Gaussian noise, one flat
    vector per sample; L_asc is 1 + the mean over depths of the logit lens's token loss, which the logarithm keeps from growing
    without bound. Where the alignment rows answer none of the harmful prompts, all tokens of the answer count (ours).

    L_noise and log L_asc are no means over samples. A first pass without gradients measures both on the whole harmful batch of all
    workers, and the second pass enters with their gradients at that point, so that neither micro-batches nor workers change the
    objective. Three forward passes. Against the public code: labels are never shifted against their mask, each depth counts once,
    and the noise is a function of seed, step, layer and sample.

    Args:
        step: The step; gets ``noise_loss`` and ``ascent_loss``.
    """
    settings = step.get(RepNoiseSettings)
    mlps = modules_at(step.model, "mlp")
    features, losses = [], []
    with torch.no_grad():
        for index, batch in enumerate(step.harmful):
            with step.same_dropout("harmful", index):
                outputs, loss = _harmful_pass(step, step.model, mlps, batch, settings)
            features.append([output.float() * _mask(batch) for output in outputs])
            losses.append(loss)
    ascent = 1 + float(step.ranks.mean([torch.stack(losses).mean()])[0])
    noise, pulls = _noise_loss(step, features, settings) if settings.beta else (0.0, [])
    step.measured |= {"noise_loss": noise, "ascent_loss": ascent}
    constant = settings.beta * noise - settings.alpha * torch.log(torch.tensor(ascent))

    for index, (batch, harmful) in enumerate(zip(step.batches, step.harmful, strict=True)):
        with step.same_dropout("align", index):
            stability = step.loss(batch)
        with step.same_dropout("harmful", index):
            outputs, loss = _harmful_pass(step, step.engine, mlps, harmful, settings)
        total = stability - settings.alpha / ascent * (loss - loss.detach()) + constant.to(stability.device)
        if pulls:
            # The mean over micro-batches and workers that follows must give back the whole gradient.
            share = settings.beta * len(step.batches) * step.ranks.workers
            total = total + surrogate(outputs, [share * pull for pull in pulls[index]])
        yield total


def repnoise_fits(model: nn.Module, settings: Mapping[type[Section], Section]) -> None:
    """Raise a ModelError if a model has no MLPs to tap, or no last normalisation for the lens."""
    modules_at(model, "mlp")
    modules_at(model, "norm")


def squared_mmd(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Return the squared maximum mean discrepancy of two samples under a mixture of Gaussian kernels.

    k(a, b) = Σ_i exp(−‖a − b‖² / (σ 2^i)), i = 0 … 4, with σ a quarter of the mean squared distance of the pooled points (RepNoise's
    public code), taken as a constant. The unbiased estimator leaves the pairs of a point with itself out; its mean is 0 for two
    samples of one distribution, whatever their size (Gretton et al. 2012, Lemma 6).

    Args:
        x: Points (n, D).
        y: Points (m, D).
        unbiased: Which estimator; the biased one keeps those pairs.

    Returns:
        A scalar in float64.
    """
    points = torch.cat([x, y]).double()
    products = points @ points.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0)
    n, total = len(x), len(points)
    sigma = (distances.detach().sum() / (total * (total - 1)) / 4).clamp_min(torch.finfo(torch.float32).tiny)
    kernel = torch.stack([torch.exp(-distances / (sigma * 2**power)) for power in range(KERNELS)]).sum(0)
    if not unbiased:
        return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    inner = [
        (block.sum() - block.diagonal().sum()) / (len(block) * (len(block) - 1)) for block in (kernel[:n, :n], kernel[n:, n:])
    ]
    return inner[0] + inner[1] - 2 * kernel[:n, n:].mean()


def _harmful_pass(
    step: Step, model: Any, mlps: Sequence[nn.Module], batch: Batch, settings: RepNoiseSettings
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the MLPs' outputs (B, T, H) and the logit lens's loss, averaged over depths and samples."""
    step.forwards += 1
    layers = modules_at(step.model, "layer")
    embeddings = step.model.get_input_embeddings()
    with captured(mlps) as outputs, captured([embeddings, *layers]) as depths:
        # The decoder's own head is asked for one position only: the lens does the rest.
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1, use_cache=False)
        hidden = list(depths) if settings.ascent == "all_layers" else [depths[-1]]
        return list(outputs), _lens_loss(step, hidden, batch)


def _lens_loss(step: Step, hidden: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
    """Return the mean over depths and samples of each sample's mean token loss, read off the hidden states by norm and head."""
    (norm,), head = modules_at(step.model, "norm"), step.model.get_output_embeddings()
    rows, columns = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    labels = batch.labels[rows, columns + 1]
    weights = 1 / torch.bincount(rows, minlength=len(batch)).to(labels.device)[rows] / len(batch)

    def at(depth: torch.Tensor) -> torch.Tensor:
        logits = head(norm(depth[rows, columns]))
        return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()

    recompute = torch.is_grad_enabled() and any(
        getattr(m, "gradient_checkpointing", False) for m in modules_at(step.model, "layer")
    )
    losses = [checkpoint(at, depth, use_reentrant=False) if recompute else at(depth) for depth in hidden]
    return torch.stack(losses).mean()


def _mask(batch: Batch) -> torch.Tensor:
    return (batch.labels != IGNORE).float()[:, :, None]


def _noise_loss(
    step: Step, features: list[list[torch.Tensor]], settings: RepNoiseSettings
) -> tuple[float, list[list[torch.Tensor]]]:
    """Return the mean over layers of the squared MMD, and its gradients with respect to this worker's features.

    Layer by layer, so that the whole batch of one layer is all that a worker ever holds of the others' features.
    """
    layers = len(features[0])
    longest = torch.stack([batch.attention_mask.sum(1).max() for batch in step.harmful]).max()
    width = int(step.ranks.gather(longest[None]).max())  # of the whole batch's longest row, whatever the padding
    positions = [place for micro in step.positions for place in micro]
    total = 0.0
    pulls: list[list[torch.Tensor]] = [[] for _ in features]
    for layer in range(layers):
        own = torch.cat([F.pad(micro[layer], (0, 0, 0, width - micro[layer].shape[1])) for micro in features])
        masks = torch.cat([F.pad(_mask(batch), (0, 0, 0, width - batch.labels.shape[1])) for batch in step.harmful])
        noise = torch.stack([_noise(step, layer, place, own.shape[1:]) for place in positions]).to(own) * masks
        x = step.ranks.gather(own.flatten(1)).requires_grad_(True)
        z = step.ranks.gather(noise.flatten(1))
        value = squared_mmd(x, z, settings.mmd == "unbiased") / layers
        (gradient,) = torch.autograd.grad(value, x)
        total += float(value.detach())
        mine = gradient.view(step.ranks.workers, *own.shape)[step.ranks.rank] * masks
        start = 0
        for index, micro in enumerate(features):
            size, length, _ = micro[layer].shape
            pulls[index].append(F.pad(mine[start : start + size], (0, 0, 0, length - width)))
            start += size
    return total, pulls


def _noise(step: Step, layer: int, place: int, shape: torch.Size) -> torch.Tensor:
    """Return one sample's noise (T, H): the same however the batch is cut, and padded."""
    generator = torch.Generator(step.ranks.device).manual_seed(mixed_seed(step.seed, step.number, "noise", layer, place))
    return torch.randn(shape, generator=generator, device=step.ranks.device)
