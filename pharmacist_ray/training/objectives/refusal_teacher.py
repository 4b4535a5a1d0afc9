"""Refusal-Teacher: the model before the fine-tune leaves harmful prompts out of it and teaches refusals (arXiv 2506.07356)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch.nn.functional import cosine_similarity

from pharmacist_ray.config.section import Count, Positive, Section, Share
from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.models.modes import without_dropout
from pharmacist_ray.models.taps import captured, decoder_layers
from pharmacist_ray.training.objectives.step import Step
from pharmacist_ray.training.weights import release_gathered


class RefusalTeacherSettings(Section):
    """Settings of ``refusal_teacher``; the paper gives none of these numbers, so all are ours."""

    beta: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight β of the divergence from the teacher."""
    temperature: Positive = 1.0
    """Of both distributions in the divergence, which is multiplied by its square."""
    threshold: Annotated[float, Field(ge=-1.0, le=1.0)] | None = 0.0
    """Cosine to the refusal feature above which a prompt is left out: 0 asks which kind it is nearer to. None leaves out none."""
    depth: Share = 0.5
    """Where the feature is read, as a share of the decoder's layers."""
    anchors: Count = 256
    """Prompts of either kind that the feature is the mean of, once so many have been seen."""


def refusal_teacher(step: Step) -> Iterator[torch.Tensor]:
    """Yield mean_i k_i ℓ_i(θ) + β·T²·KL(p_T ‖ p_θ), k_i whether row i's prompt is kept, the divergence on answers to safe rows.

    The refusal feature R is the mean state of safe rows' prompts, which are harmful, less that of ordinary ones, at one layer of the
    teacher and each prompt's last token. A row is kept iff cos(f − μ, R) is at most the threshold, f its prompt's state and μ the
    midpoint of the two means; the mean is over all rows of the batch, those left out counted. The teacher is the model before the
    fine-tune, which is also where the student begins (the paper trains a teacher of its own and begins at the base: variant). Prompts
    alone are read: a harmful answer to an ordinary prompt stays. Two passes with a backward and two without, four until the anchors
    have been seen.

    Args:
        step: The step; gets ``left_out_share`` and ``teacher_divergence``, in nats.
    """
    settings = step.get(RefusalTeacherSettings)
    means = None if settings.threshold is None else _means(step, settings)
    gone, divergences = [], []
    for index, (batch, safe) in enumerate(zip(step.batches, step.safe, strict=True)):
        kept = torch.ones(len(batch), device=step.ranks.device)
        if means is not None and settings.threshold is not None:
            harmful, ordinary = means
            centred = _asked(step, batch, settings.depth) - (harmful + ordinary) / 2
            kept = (cosine_similarity(centred, (harmful - ordinary)[None]) <= settings.threshold).float()
        with step.same_dropout("align", index):
            loss = step.loss(replace(batch, weights=kept if batch.weights is None else kept * batch.weights))
        divergence = step.divergence(safe, temperature=settings.temperature)
        gone.append(1 - kept.mean())
        divergences.append(divergence.detach())
        yield loss + settings.beta * divergence
    left_out, taught = step.ranks.mean([torch.stack(gone).mean(), torch.stack(divergences).mean()])
    step.measured |= {"left_out_share": float(left_out), "teacher_divergence": float(taught)}


def _means(step: Step, settings: RefusalTeacherSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean states of harmful prompts and of ordinary ones, over the rows of all workers' steps so far up to the anchors."""
    seen = step.state.setdefault("refusal_teacher:seen", torch.zeros((), dtype=torch.int64))
    if int(seen) < settings.anchors:
        for name, batches in (("harmful", step.safe), ("ordinary", step.ordinary)):
            key, total = f"refusal_teacher:{name}", step.ranks.total(_summed(step, batches, settings.depth)).cpu()
            step.state[key] = step.state[key] + total if key in step.state else total
        seen += sum(map(len, step.safe)) * step.ranks.workers
    both = (step.state[f"refusal_teacher:{name}"] / int(seen) for name in ("harmful", "ordinary"))
    harmful, ordinary = (mean.to(step.ranks.device, torch.float32) for mean in both)
    return harmful, ordinary


def _summed(step: Step, batches: Sequence[Batch], depth: float) -> torch.Tensor:
    return torch.stack([_asked(step, batch, depth).double().sum(0) for batch in batches]).sum(0)


@torch.no_grad()
def _asked(step: Step, batch: Batch, depth: float) -> torch.Tensor:
    """Return the teacher's state at each prompt's last token after the layer at a depth, (B, H) in float32."""
    layers = decoder_layers(step.model)
    place = min(len(layers) - 1, int(depth * len(layers)))
    with step.reference(), without_dropout(step.model), captured([layers[place]]) as states:
        step.forwards += 1
        step.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1, use_cache=False)
    release_gathered(step.engine)
    last = (batch.labels != IGNORE).int().argmax(dim=1) - 1
    return states[0][torch.arange(len(batch), device=last.device), last].float()
