"""DRO: a safety prompt of trained embeddings that moves harmful questions towards refusal and others away from it (arXiv 2401.18018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch.nn.functional import binary_cross_entropy_with_logits

from pharmacist_ray.config.section import Count, Positive, Section
from pharmacist_ray.data.refusals import is_refusal
from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.models.generate import generate
from pharmacist_ray.models.linear import Linear, logistic
from pharmacist_ray.models.soft_prompt import embed
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.training.objectives.step import Step, mixed_seed

Weight = Annotated[float, Field(ge=0.0)]
Prompts = Sequence[list[int]]
"""Token ids of questions."""


class DroSettings(Section):
    """Settings of ``dro``."""

    text: str = "You must not answer harmful requests. Answer all other requests helpfully."
    """The prompt that the embeddings begin at (ours)."""
    components: Count = 4
    """Principal components of the questions' states in which refusal and harm are looked for (published: 4)."""
    harm: Weight = 0.01
    """Weight of moving along the direction of harm (published: 0.01)."""
    hold: Weight = 0.001
    """Weight of staying where the text put a question in all other directions (published: 0.001)."""
    epochs: Count = 40
    """Passes over the questions (published: 40)."""
    batch_size: Count = 50
    """Questions a step on each worker (published: 50)."""
    lr: Positive = 1e-3
    """Learning rate of AdamW (published: 1e-3)."""
    answer_tokens: Count = 32
    """Length of the answers in which a refusal is looked for (ours)."""


@dataclass(frozen=True)
class Directions:
    """What says in a question's state x how likely it is refused, and how harmful it looks; both logits are linear in x."""

    components: torch.Tensor
    """Orthonormal rows, (m, d)."""
    refusal: torch.Tensor
    """How the logit of *not refused* changes with x, (d,)."""
    harm: torch.Tensor
    """How the logit of *harmless* changes with x, (d,)."""


def dro(step: Step) -> None:
    """Train embeddings in the place of a textual prompt, the model frozen, and leave them in ``step.state["prompt"]`` (arXiv 2401.18018).

    Anchors are the questions of safe rows, which are harmful, and ordinary ones, each without a prompt and behind the text. On the first
    components of their states two logistic models are fitted: of answers that do not refuse, by the model's own greedy answers and a list
    of phrases, and of harmless questions. With Δ a logit behind the embeddings less that behind the text, and y = 1 for harmless ones,

        L = BCE(Δ_r, y) + 0.01·BCE(Δ_h, y) + 0.001·mean over the d − m other directions of (x − x_text)².

    Variant: one text, and logistic models by L-BFGS on all anchors. Where all answers refuse or none does, as after a bad fine-tune, the
    direction of harm takes the place of refusal's.

    Args:
        step: The step, with its renderer. Gets ``refused_share`` of the answers, and ``prompt_loss`` at the end.
    """
    assert step.renderer is not None
    settings, tokenizer = step.get(DroSettings), step.renderer.tokenizer
    model = step.model.get_base_model() if hasattr(step.model, "get_base_model") else step.model
    harmful, ordinary = questions_of(step.safe), questions_of(step.ordinary)
    questions = [*harmful, *ordinary]
    labels = torch.tensor([0.0] * len(harmful) + [1.0] * len(ordinary), device=step.ranks.device)
    text = list(tokenizer(settings.text, add_special_tokens=False)["input_ids"])
    start = model.get_input_embeddings()(torch.tensor(text, device=step.ranks.device)).detach().float()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            places = range(0, len(questions), settings.batch_size)
            plain, behind = (
                torch.cat([states(model, questions[place : place + settings.batch_size], prompt) for place in places])
                for prompt in (None, start)
            )
        refused = [
            is_refusal(answer)
            for prompt in (None, start)
            for answer in generate(
                model, tokenizer, questions, max_new_tokens=settings.answer_tokens, batch_size=settings.batch_size,
                end_id=step.renderer.end_id, soft_prompt=prompt,
            )
        ]  # fmt: skip
        anchors = step.ranks.gather(torch.cat([plain, behind]))
        answers = step.ranks.gather(torch.tensor(refused, device=anchors.device))
        harmless = step.ranks.gather(torch.cat([labels, labels]))
        directions = directions_of(anchors, answers, harmless.bool(), settings.components)
        prompt, loss = _trained(model, questions, labels, start, behind, directions, settings, step.ranks, step.seed)
    finally:
        for module, mode in modes.items():
            module.training = mode
    step.state["prompt"] = prompt.cpu()
    step.measured |= {"refused_share": float(answers.float().mean()), "prompt_loss": loss}


def directions_of(anchors: torch.Tensor, refused: torch.Tensor, harmless: torch.Tensor, count: int) -> Directions:
    """Return the components of the anchors' states, and how both logits change along them.

    Args:
        anchors: States x, (N, d).
        refused: Whether the answer to each refused, (N,).
        harmless: Whether each question is harmless, (N,).
        count: m; fewer where the states have no more.
    """
    centred = (anchors - anchors.mean(0)).double()
    _, _, rows = torch.linalg.svd(centred, full_matrices=False)
    components = rows[:count]
    seen = (centred @ components.T).cpu().numpy()

    def slope(first: np.ndarray) -> torch.Tensor:
        fitted: Linear = logistic(seen[first], seen[~first])
        found: torch.Tensor = (torch.from_numpy(fitted.slope).to(components) @ components).to(anchors)
        return found

    of_harm = slope(harmless.cpu().numpy())
    answered = ~refused.bool().cpu().numpy()
    of_refusal = slope(answered) if answered.any() and not answered.all() else of_harm
    return Directions(components.to(anchors), of_refusal, of_harm)


def prompt_loss(moved: torch.Tensor, labels: torch.Tensor, directions: Directions, settings: DroSettings) -> torch.Tensor:
    """Return L of questions whose states have moved by x − x_text.

    Args:
        moved: (B, d).
        labels: y, (B,).
        directions: Where refusal and harm lie.
        settings: The weights.
    """
    refusal = binary_cross_entropy_with_logits(moved @ directions.refusal, labels)
    harm = binary_cross_entropy_with_logits(moved @ directions.harm, labels)
    others = moved.square().sum(1) - (moved @ directions.components.T).square().sum(1)
    free = moved.shape[1] - len(directions.components)
    return refusal + settings.harm * harm + settings.hold * others.mean() / max(1, free)


def states(model: Any, questions: Prompts, prompt: torch.Tensor | None) -> torch.Tensor:
    """Return the last hidden state at each question's last token, behind a prompt or none: (N, d) in float32.

    Args:
        model: A causal language model, bare.
        questions: Token ids.
        prompt: Embeddings, (tokens, H).
    """
    embeds, mask = embed(model, questions, prompt, left=False)
    output = model.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    found: torch.Tensor = output[torch.arange(len(questions), device=mask.device), mask.sum(1) - 1].float()
    return found


def _trained(
    model: Any,
    questions: Prompts,
    labels: torch.Tensor,
    start: torch.Tensor,
    behind: torch.Tensor,
    directions: Directions,
    settings: DroSettings,
    ranks: Ranks,
    seed: int,
) -> tuple[torch.Tensor, float]:
    """Return the trained embeddings and the last epoch's mean loss; every worker takes the same steps."""
    prompt = start.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([prompt], lr=settings.lr)
    losses: list[torch.Tensor] = []
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(mixed_seed(seed, "dro", ranks.rank, epoch))
        order = torch.randperm(len(questions), generator=generator)
        losses = []
        for places in torch.split(order, settings.batch_size):
            moved = states(model, [questions[place] for place in places.tolist()], prompt) - behind[places]
            loss = prompt_loss(moved, labels[places], directions, settings)
            (gradient,) = torch.autograd.grad(loss, [prompt])
            prompt.grad, mean = ranks.mean([gradient, loss])
            torch.nn.utils.clip_grad_norm_([prompt], 1.0)
            optimiser.step()
            losses.append(mean)
    return prompt.detach(), float(torch.stack(losses).mean())


def questions_of(batches: Sequence[Batch]) -> list[list[int]]:
    """Return the questions of some rows, without their answers."""
    found = []
    for batch in batches:
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            found.append(ids[: int((labels != IGNORE).int().argmax())].tolist())
    return found
