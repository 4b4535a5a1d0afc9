"""Per-sample losses, where every weighting and reduction happens outside and can be seen; and gradients dressed as losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pharmacist_ray.data.render import IGNORE, Batch


def per_sample_nll(model: Any, batch: Batch) -> torch.Tensor:
    """Return the mean negative log-likelihood of each sample's answer tokens, in nats.

    The mean is per sample, so that a long answer weighs no more than a short one. Logits are computed only where a token is supervised,
    and the cross-entropy in float32.

    Args:
        model: A causal language model (Hugging Face, PEFT, or a DeepSpeed engine around one).
        batch: Right-padded batch; every sample has at least one supervised position.

    Returns:
        Losses (B,), float32, differentiable.
    """
    nll, mask = token_nll(model, batch)
    return (nll * mask).sum(dim=1) / mask.sum(dim=1)


def token_nll(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of each supervised token and where there is one.

    Returns:
        ``nll`` (B, S) float32 and ``mask`` (B, S) float32 of ones and zeros: each sample's supervised tokens from the left, in their
        order, S being the most that a sample has.
    """
    logits, labels = _answer_logits(model, batch)
    flat = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view_as(labels), (labels != IGNORE).float()


def answer_log_probs(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of every token of the vocabulary where a token is supervised, and where that is.

    Returns:
        (B, S, V) and (B, S), both float32, over the same S positions as `token_nll`'s.
    """
    logits, labels = _answer_logits(model, batch)
    return F.log_softmax(logits.float(), dim=-1), (labels != IGNORE).float()


def kl_divergence(before: torch.Tensor, now: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return each sample's mean over its supervised tokens of KL(p_before ‖ p_now), in nats.

    Args:
        before: Log-probabilities (B, S, V), taken as constants.
        now: Log-probabilities (B, S, V).
        mask: (B, S), ones where a token is supervised.

    Returns:
        (B,), float32, differentiable in ``now``.
    """
    tokens = F.kl_div(now, before.detach(), reduction="none", log_target=True).sum(-1)
    return (tokens * mask).sum(dim=1) / mask.sum(dim=1)


def _answer_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (B, S, V) and labels (B, S) of the positions that are supervised, each sample's from the left.

    The output head, which takes a good part of the pass where the vocabulary is large, is given those positions alone. And no mask is: the
    padding is on the right, where no token of an answer looks, and attention is fastest when it need only be causal.
    """
    labels = batch.labels[:, 1:]
    supervised = labels != IGNORE
    most = int(supervised.sum(dim=1).max())
    places = supervised.int().argsort(dim=1, descending=True, stable=True)[:, :most]

    def only_these(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (given[0].gather(1, places.unsqueeze(-1).expand(-1, -1, given[0].shape[-1])),)

    handle = model.get_output_embeddings().register_forward_pre_hook(only_these)
    try:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits, labels.gather(1, places)


def surrogate(
    tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], value: float | torch.Tensor = 0.0
) -> torch.Tensor:
    """Return a scalar whose gradient with respect to ``tensors`` is ``gradients`` and whose value is ``value``.

    This is how a gradient that is no plain loss's enters an engine, so that accumulation, clipping and ZeRO keep working:
    Σ⟨x, stop-grad(g)⟩, less its own value.

    Args:
        tensors: Differentiable tensors x, parameters or activations.
        gradients: One g per tensor, of its shape; constants.
        value: What the scalar says, for reports.
    """
    terms = [(x.float() * g.detach().float()).sum() for x, g in zip(tensors, gradients, strict=True)]
    total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
    return total - total.detach() + torch.as_tensor(value, device=total.device, dtype=total.dtype)
