"""How long the example will take here: the tokens that its stages read and write, over the pace of the model on this machine.

A rough figure, to know whether to wait or to come back tomorrow: starting processes is counted by a constant, and nothing is taken to
run side by side.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pharmacist_ray.config.schema import Config, TrainConfig
from pharmacist_ray.data.layouts import to_row
from pharmacist_ray.models.load import add_lora
from pharmacist_ray.models.ref import ModelRef

START_S = 20.0
"""Seconds in which the processes of a stage start and load the model (ours)."""
_ROWS, _LENGTH = 8, 64  # of the batch that is timed


@dataclass(frozen=True)
class Pace:
    """Tokens a second of one model on one machine."""

    forward: float
    trained: float
    """Forward and backward, with an adapter."""


def pace_of(model: ModelRef, config: Config, device: str = "cpu") -> Pace:
    """Measure a forward pass, and a step's forward and backward passes, each after a short one for nothing.

    Args:
        model: The model.
        config: For the adapter.
        device: Where the run will be.
    """
    network = add_lora(model.load(device), config.model.lora, seed=0)
    ids = torch.randint(0, network.config.get_text_config().vocab_size, (_ROWS, _LENGTH), device=device)

    def tokens_a_second(train: bool) -> float:
        for batch in (ids[:1], ids):
            started = time.perf_counter()
            with torch.set_grad_enabled(train):
                loss = network(input_ids=batch, labels=batch).loss
                if train:
                    loss.backward()
            loss.item()  # waits for the device
        return ids.numel() / (time.perf_counter() - started)

    return Pace(tokens_a_second(False), tokens_a_second(True))


def lengths_of(model: ModelRef, sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, tuple[float, float]]:
    """Return set → the mean tokens of its rows' prompts, and of whole rows with the token that ends them, as they are cut.

    Args:
        model: Whose template and tokenizer.
        sets: Their rows, all with ``prompt`` and ``response``.
    """
    renderer = model.renderer()
    found: dict[str, tuple[float, float]] = {}
    for name, samples in sets.items():
        rows = [to_row({"prompt": one["prompt"], "response": one["response"]}, layout="prompt_response") for one in samples]
        prompts = [min(model.max_length - 1, len(renderer.prompt_ids(row))) for row in rows]
        answers = renderer.tokenizer([row.response for row in rows], add_special_tokens=False)["input_ids"]
        whole = [min(model.max_length, prompt + len(answer) + 1) for prompt, answer in zip(prompts, answers, strict=True)]
        found[name] = (sum(prompts) / len(rows), sum(whole) / len(rows))
    return found


def reckon(
    config: Config, counts: Mapping[str, int], lengths: Mapping[str, tuple[float, float]], variants: int, pace: Pace
) -> dict[str, float]:
    """Return stage → seconds.

    ``fit`` trains the warm-up and the reference. At each checkpoint it passes once over the harmful rows for the simulated attack, and
    twice over the validation rows, for the direction with that attack and without. ``score`` passes forward and backward over candidates
    and planted rows at each checkpoint, and forward twice for the loss gap. A calibrated selection keeps every second trusted row out of
    the fit, and plants five rows for it.

    Args:
        config: The run.
        counts: Set → rows.
        lengths: Set → tokens, as `lengths_of` has them.
        variants: How many models are aligned.
        pace: Of the model here.
    """
    whole = {name: length for name, (_, length) in lengths.items()}
    checkpoints, selector = len(config.selector.checkpoints), config.selector

    def training(train: TrainConfig, row: float, rows: int) -> float:
        steps = train.steps if train.epochs is None else train.epochs * rows / train.batch_size
        return steps * train.batch_size * row / pace.trained

    trusted, planted = (0.5, 5 / 2) if config.calibrated else (1.0, 0.0)
    passed = trusted * (2 * counts["validation"] * whole["validation"] + counts["harmful"] * whole["harmful"])
    fit = training(selector.warmup, whole["candidates"], counts["candidates"]) + checkpoints * passed / pace.trained
    if selector.reference is not None:
        fit += training(selector.reference, (whole["validation"] + whole["benign"]) / 2, counts["validation"])
    scored = counts["candidates"] * whole["candidates"] + planted * counts["validation"] * whole["validation"]
    score = scored * (checkpoints / pace.trained + 2 / pace.forward)
    share = config.alignment.replay_share if config.alignment.replay else 0.0
    aligned = training(config.alignment.train, (1 - share) * whole["candidates"] + share * whole["benign"], counts["candidates"])
    attacked = [
        training(one.train, one.harmful_share * whole["attack_harmful"] + (1 - one.harmful_share) * whole["task_train"], one.rows)
        for one in config.attacks
    ]
    asked = sum(
        counts[name] * (lengths[name][0] + (config.evaluation.max_new_tokens if config.evaluation else 0))
        for name in ("eval_harmful", "eval_benign", "task_test")
    )
    return {
        "fit": START_S + fit,
        "score": START_S + score,
        "align": START_S + variants * aligned,
        "attack": START_S + variants * sum(attacked),
        "evaluate": START_S + variants * (1 + len(config.attacks)) * asked / pace.forward,
    }
