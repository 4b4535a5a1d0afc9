"""STAR-DSS: a guard says of every few words of an answer whether it is still safe, and only what is safe is learnt (arXiv 2505.17196)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import ConfigDict, Field

from pharmacist_ray.config.section import Count, Section
from pharmacist_ray.models.losses import token_nll
from pharmacist_ray.models.modes import without_dropout
from pharmacist_ray.training.objectives.step import Step, setting
from pharmacist_ray.training.weights import release_gathered


class StarDssSettings(Section):
    """Settings of ``star_dss``."""

    model_config = ConfigDict(populate_by_name=True)

    words: Count = 5
    """M, words of an answer between two verdicts (published: 5)."""
    lambda_: Annotated[float, Field(ge=0.0)] = Field(0.5, alias="lambda")
    """Weight λ of staying where the model was before the fine-tune (published: 0.5)."""
    floor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, exclude_if=lambda floor: floor == 1.0)
    """Probability of safe from which on a token counts as wholly safe. 1 is the paper's; below it a guard that doubts honest rows slows
    them less (ours)."""


def star_dss(step: Step) -> Iterator[torch.Tensor]:
    """Yield mean_i (1/T_i) Σ_t [V_t ℓ_t + (1 − V_t) λ K_t], K_t = ½(log π_θ(y_t) − log π_ref(y_t))² (arXiv 2505.17196, equation 3).

    V_t is the guard's probability that the row is safe up to the M words that token t is in, ℓ_t the token's loss and ref the model
    before the fine-tune, without dropout. K is over answer tokens alone, as on one of the public code's two paths; words are found by
    their places in the text and not by tokenising prefixes. K holds the probability of a harmful token where it was, and teaches no
    refusal. One pass, and one forward; the guard reads every prefix of every row before the first step.

    Args:
        step: The step; gets ``mean_verdict``, the mean of V over rows.
    """
    settings = step.get(StarDssSettings)
    verdicts = []
    for index, (batch, rows) in enumerate(zip(step.batches, step.rows, strict=True)):
        with without_dropout(step.model), torch.no_grad(), step.reference():
            before, _ = token_nll(step.model, batch)
        release_gathered(step.engine)
        step.forwards += 2
        with step.same_dropout("align", index):
            now, mask = token_nll(step.engine, batch)
        safe = _placed([step.verdicts[row] for row in rows], mask)
        safe = torch.where(safe >= settings.floor, torch.ones_like(safe), safe)
        tokens = safe * now + (1 - safe) * settings.lambda_ * 0.5 * (now - before).square()
        counts = mask.sum(1)
        losses = (tokens * mask).sum(1) / counts
        verdicts.append(((safe * mask).sum(1) / counts).mean())
        yield (losses if batch.weights is None else batch.weights * losses).mean()
    step.measured["mean_verdict"] = float(step.ranks.mean([torch.stack(verdicts).mean()])[0])


def prefix_words(settings: Mapping[type[Section], Section]) -> int:
    """Return M."""
    return setting(settings, StarDssSettings).words


def _placed(verdicts: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Return each row's verdicts where its tokens are supervised, zeros elsewhere: (B, S)."""
    found = torch.zeros_like(mask)
    found[mask.bool()] = torch.cat(verdicts).to(mask)  # row after row, as the mask is read
    return found
