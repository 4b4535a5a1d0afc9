"""A classifier of prompt and answer: a moderation model of yours, or a linear one trained on the trusted sets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import softplus
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from pharmacist_ray.config.scoring import GuardConfig
from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.errors import ConfigError, ModelError
from pharmacist_ray.models.classifier import fill_template, harm, load_classifier, text_ids, unsafe_places

UNSAFE = "scoring.guard.unsafe"

RIDGE = 0.01
"""Weight of half the squared norm in the linear classifier's loss (ours)."""


@dataclass(frozen=True)
class Linear:
    """A logistic regression on standardised features."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: float

    def probability(self, features: np.ndarray) -> np.ndarray:
        """Return the probability of the first set for each row, (N,)."""
        logits = (features - self.mean) / self.scale @ self.weights + self.bias
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))))


def guard(signals: Signals) -> np.ndarray:
    """Return the probability of safe, by the classifier of ``scoring.guard``, or else by a linear one between validation and harmful rows.

    Your classifier reads prompt and answer and sees neither trusted set, but whatever it was trained on. The linear one is a logistic
    regression on the base's last hidden states, averaged over the answer; it costs a forward a row without the output head, and once
    for each actor one for every trusted row.

    Args:
        signals: The shard's signals.
    """
    if signals.guard is not None:
        return _moderated(signals, signals.guard)
    return signals.of_trusted(train).probability(signals.states(-1))


def train(validation: Signals, harmful: Signals) -> Linear:
    """Return the classifier of validation against harmful rows."""
    return logistic(validation.states(-1), harmful.states(-1))


def logistic(safe: np.ndarray, unsafe: np.ndarray) -> Linear:
    """Return the logistic regression between two sets that weigh the same, whatever their sizes, with `RIDGE`.

    Args:
        safe: Features of the rows with label 1, (N, D).
        unsafe: Features of those with label 0, (M, D).
    """
    both = np.concatenate([safe, unsafe]).astype(np.float64)
    mean, scale = both.mean(axis=0), both.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    features = torch.from_numpy((both - mean) / scale)
    signs = torch.cat([torch.ones(len(safe)), -torch.ones(len(unsafe))]).double()
    shares = torch.cat([torch.full((len(rows),), 0.5 / len(rows)) for rows in (safe, unsafe)]).double()
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = (shares * softplus(-signs * (features @ weights + bias))).sum() + RIDGE / 2 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return Linear(mean, scale, weights.detach().numpy(), float(bias.detach()))


def check_guard(config: GuardConfig) -> None:
    """Find out what is wrong with a classifier without loading it.

    Raises:
        ConfigError: It is no folder, its template lacks a place, or it has no such label.
        ModelError: The folder has no configuration of a model.
    """
    if "{prompt}" not in config.template or "{answer}" not in config.template:
        raise ConfigError(f"scoring.guard.template must contain {{prompt}} and {{answer}}, got '{config.template}'")
    if not Path(config.path).is_dir():
        raise ConfigError(f"scoring.guard.path '{config.path}' is not a folder here; give that of a sequence classifier")
    try:
        found = AutoConfig.from_pretrained(config.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"guard {config.path} is no model that can be loaded: {str(error).splitlines()[0]}") from error
    unsafe_places(found, config.unsafe, UNSAFE)


def _moderated(signals: Signals, config: GuardConfig) -> np.ndarray:
    spec = signals.probe.spec
    model, tokenizer = _loaded(config.path, spec.device)
    unsafe = unsafe_places(model.config, config.unsafe, UNSAFE)
    prompts = [f"{row.prompt}\n{row.input}" if row.input else row.prompt for row in signals.rows]
    texts = [fill_template(config.template, prompt, row.response) for prompt, row in zip(prompts, signals.rows, strict=True)]
    samples = [text_ids(tokenizer, text, config.max_length) for text in texts]
    scores = np.zeros(len(samples))

    def take(rows: list[int]) -> None:
        scores[rows] = (1 - harm(model, [samples[row] for row in rows], unsafe)).cpu().numpy()

    signals.in_batches([len(sample) for sample in samples], take)
    return scores


@lru_cache(maxsize=1)
def _loaded(path: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_classifier(path, "guard")
    return model.to(torch.device(device)), tokenizer  # type: ignore[arg-type]
