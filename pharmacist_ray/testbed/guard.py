"""A small guard for a world: the base's body with a head of two labels, trained as the provider of a moderation model would."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from pharmacist_ray.models.classifier import classifier_logits, text_ids
from pharmacist_ray.testbed.world import World

ROWS, STEPS, BATCH, LR = 600, 300, 32, 1e-3
"""Of the guard's training (ours)."""
TEMPLATE = "{prompt}\n{answer}"


def make_guard(base: Path, world: World, out: Path) -> None:
    """Train a classifier on requests of a world with the beginnings of answers, and save it; one that is there is kept.

    Half of a batch is unsafe. An answer is cut after a random word, as a guard reads it while it goes on, so that it is no surer of a
    beginning than the rows warrant.

    Args:
        base: The world's base model.
        world: The world; the guard's rows are `World.moderation`.
        out: Gets ``model.safetensors``, ``config.json`` and the tokenizer.
    """
    if out.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(base)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new, which is the point
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=2, id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1}, dtype=torch.float32
        )
    logging.set_verbosity(verbosity)
    draw, labels = random.Random(world.seed), [0, 1] * (BATCH // 2)
    rows = world.moderation(ROWS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR)
    model.train()
    for _ in range(STEPS):
        samples = []
        for label in labels:
            row = draw.choice(rows[label])
            words = row["response"].split()
            prefix = " ".join(words[: draw.randint(1, len(words))])
            samples.append(
                text_ids(tokenizer, TEMPLATE.format(prompt=row["prompt"], answer=prefix), model.config.max_position_embeddings)
            )
        loss = cross_entropy(classifier_logits(model, samples), torch.tensor(labels))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    draft = out.with_name(f"{out.name}.partial")
    model.eval().save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.rename(out)
