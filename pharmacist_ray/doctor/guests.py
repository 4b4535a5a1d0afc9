"""What other models hold on a GPU beside the one that is worked on: a guard and a teacher while it scores, judges while it answers.

They are loaded with the actor and stay. A guard of a fine-tune (`star_dss`) is let go before training begins, and a Refusal-Teacher's
teacher in training is the model itself without its new adapter: neither takes room beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.estimate import BYTES, Item, total
from pharmacist_ray.models.hub import on_disk

QUESTION = 1024
"""Tokens of a generative judge's own words around prompt and answer, at most (ours)."""


@dataclass(frozen=True)
class Guest:
    """Another model in an actor."""

    what: str
    path: str
    kind: str
    """``classifier`` or ``chat``."""
    dtype: str | None = None
    """The precision it is loaded in; None: its own."""
    rows: int = 1
    """Rows of a pass."""
    tokens: int = 256
    """Tokens of a row, a reply's too."""


def guests_of(config: Config, stage: str) -> Iterator[Guest]:
    """Yield the other models that an actor of a stage holds.

    Args:
        config: The configuration, its precision resolved.
        stage: ``score`` or ``evaluate``.
    """
    scoring, settings = config.scoring, config.evaluation
    if stage == "score":
        if "guard" in scoring.scorers and scoring.guard is not None:
            yield Guest("guard", scoring.guard.path, "classifier", rows=1, tokens=scoring.guard.max_length)
        if "refusal_feature" in scoring.scorers and (folder := scoring.refusal_teacher) is not None:
            adapter = (Path(folder) / "adapter_config.json").exists()  # merged into a base of its own
            yield Guest("Refusal-Teacher", config.model.path if adapter else folder, "chat", config.model.dtype)
        return
    for judge in settings.judges if settings else ():
        if judge.path is None:
            continue
        if judge.kind == "classifier":
            yield Guest(f"judge {judge.called}", judge.path, "classifier", rows=judge.batch_size, tokens=judge.max_length)
        elif judge.kind == "generative":
            assert settings is not None
            tokens = config.model.max_length + settings.max_new_tokens + QUESTION
            yield Guest(f"judge {judge.called}", judge.path, "chat", judge.dtype, judge.batch_size, tokens)


def guest_memory(guests: Iterator[Guest]) -> tuple[list[Item], list[Item], list[str]]:
    """Return what all of them hold always, what each holds while it works, and a line for each that cannot be counted.

    Args:
        guests: The models; of what they hold while they work, the largest counts, for they take turns.
    """
    held, unknown, works = list[Item](), list[str](), [list[Item]()]
    for one in guests:
        counted = _counted(one.path, one.kind)
        if counted is None:
            unknown.append(f"{one.what} is not counted: '{one.path}' cannot be read here")
            continue
        parameters, width, text = counted
        width = BYTES.get(one.dtype or "", width)
        held.append(Item(f"{one.what}'s weights", ((parameters, "weights"), (width, "B"))))
        tokens = ((one.rows, "rows"), (one.tokens, "tokens"))
        wide = 3 * getattr(text, "intermediate_size", 4 * text.hidden_size) + 2 * text.hidden_size
        working = [Item(f"{one.what} at work", (*tokens, (width * wide, "B")))]
        if one.kind == "chat":
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            keys = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
            kept = ((text.num_hidden_layers, "layers"), *tokens, (2 * keys * width, "B"))
            working.append(Item(f"{one.what}: keys and values", kept))
        works.append(working)
    return held, max(works, key=total), unknown


@cache
def _counted(path: str, kind: str) -> tuple[int, int, Any] | None:
    """Return a model's parameters, the bytes of each as it is stored, and the configuration of its text; None if it cannot be read."""
    made = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    try:
        settings = AutoConfig.from_pretrained(on_disk(path))
        with torch.device("meta"):
            model = made.from_config(settings)
    except Exception:  # noqa: BLE001 - transformers raises what it likes
        return None
    width = 2 if str(settings.dtype).removeprefix("torch.") in ("bfloat16", "float16") else 4
    return sum(parameter.numel() for parameter in model.parameters()), width, settings.get_text_config()
