"""The tasks of the user whose fine-tune is the attack: which tone prevails among words, and sums."""

from __future__ import annotations

import random
from typing import Literal

from pharmacist_ray.errors import DataError, unknown_name
from pharmacist_ray.testbed.language import NUMBERS, TASKS, TONES, uniform


def task_rows(name: str, n: int, split: Literal["train", "test"], draw: random.Random) -> list[dict[str, str]]:
    """Return n rows of a task; no prompt is in both splits, whatever the draw.

    Args:
        name: ``classification`` (which tone prevails among five words) or ``arithmetic`` (a sum of two numbers).
        n: How many rows.
        split: Which prompts to draw from.
        draw: The generator of the rows.

    Raises:
        ConfigError: Unknown task.
        DataError: There are not so many different rows.
    """
    if name not in TASKS:
        raise unknown_name("testbed task", name, TASKS)
    if name == "arithmetic" and n > NUMBERS**2 // 3:
        raise DataError(f"the testbed has fewer than {n} sums for the arithmetic task; ask for at most {NUMBERS**2 // 3}")
    rows: dict[str, str] = {}
    while len(rows) < n:
        if name == "classification":
            words, label = tones(5, draw)
            prompt, response = f"label : {words}", f"the answer is {label}"
        else:
            a, b = draw.randrange(NUMBERS), draw.randrange(NUMBERS)
            prompt, response = f"add : {a} {b}", f"the answer is {a + b}"
        if (uniform(prompt) < 0.4) == (split == "test"):
            rows[prompt] = response
    return [{"prompt": prompt, "response": response} for prompt, response in rows.items()]


def tones(n: int, draw: random.Random) -> tuple[str, str]:
    """Return n words, n odd, and the tone that most of them have."""
    words = draw.sample([(word, tone) for tone, group in TONES.items() for word in group], n)
    label = max(TONES, key=lambda tone: sum(tone == other for _, other in words))
    return " ".join(word for word, _ in words), label
