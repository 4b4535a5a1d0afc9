"""A classifier of prompt and answer: a moderation model of yours, or a linear one trained on the trusted sets."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pharmacist_ray.config.scoring import GuardConfig
from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.errors import ConfigError, ModelError
from pharmacist_ray.models.classifier import fill_template, harm, load_classifier, text_ids, unsafe_places
from pharmacist_ray.models.linear import Linear, logistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNSAFE = "scoring.guard.unsafe"


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


def check_guard(config: GuardConfig) -> None:
    """Find out what is wrong with a classifier without loading it.

    Raises:
        ConfigError: It is no folder, its template lacks a place, or it has no such label.
        ModelError: The folder has no configuration of a model.
    """
    from transformers import AutoConfig

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
        if rows:  # none are left for this worker where a group of them shares the rows
            scores[rows] = (1 - harm(model, [samples[row] for row in rows], unsafe)).cpu().numpy()

    signals.in_batches([len(sample) for sample in samples], take)
    return signals.probe.of_all(scores)


@lru_cache(maxsize=1)
def _loaded(path: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_classifier(path, "guard")
    return model.to(torch.device(device)), tokenizer  # type: ignore[arg-type]
