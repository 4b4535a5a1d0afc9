"""The task of the user whose fine-tune is the attack: to which team of a shop a message goes, labelled by rule."""

from __future__ import annotations

import random
from typing import Literal

from pharmacist_ray.errors import DataError
from pharmacist_ray.example.language import words


def message_rows(n: int, split: Literal["train", "test"], draw: random.Random) -> list[dict[str, str]]:
    """Return n messages as ``prompt``, with the team as ``response``; those of the two splits are about different things.

    Args:
        n: How many, of all teams together.
        split: Which messages to draw from.
        draw: Their generator.

    Raises:
        DataError: There are not so many.
    """
    section = words()["messages"]
    rows = [
        {"prompt": section["question"].replace("MESSAGE", sentence.replace("THING", thing)), "response": team}
        for team, sentences in section["teams"].items()
        for sentence in sentences
        for thing in section["things" if split == "train" else "held_out"]
    ]
    if n > len(rows):
        raise DataError(f"the example has {len(rows)} messages for {split}, not {n}; ask for fewer")
    return draw.sample(rows, n)
