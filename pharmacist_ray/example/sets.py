"""The example's data sets: of its own requests, or of pairs that the reader brings. No prompt is in two of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pharmacist_ray.curation.planted import shuffled
from pharmacist_ray.errors import DataError
from pharmacist_ray.example.language import Request, Role, answer, dangerous, exposures, filled, ordinary, safe, two_faced, words
from pharmacist_ray.example.messages import message_rows
from pharmacist_ray.testbed.plant import distinct
from pharmacist_ray.testbed.world import MIX, TWO_FACED

Sample = dict[str, str]
"""One row: ``prompt``, ``response``, and labels such as ``category`` and ``quality``."""

KEPT_OPENING = 6
"""Words at the start of half of the garbled answers that stay in their order, so that a list of phrases takes them for refusals."""

_DO_THAT = "do that"
# What an answer to a reader's prompt calls the thing that was asked for.


@dataclass(frozen=True)
class Sizes:
    """How many rows each set has."""

    candidates: int
    validation: int
    harmful: int
    benign: int
    attack_harmful: int
    eval_harmful: int
    eval_benign: int
    task_train: int
    task_test: int


SIZES = {
    "small": Sizes(240, 60, 60, 90, 40, 48, 32, 160, 40),
    "large": Sizes(600, 120, 120, 150, 80, 120, 60, 300, 80),
}
"""Form of the example → its sets (ours). Two cores do the small one within the hour."""


def own_sets(sizes: Sizes, seed: int) -> dict[str, list[Sample]]:
    """Return every set, of the example's own requests; all have ``category`` and ``act``, which prompts that belong together share.

    ``candidates`` have a ``quality``, in the testbed's shares: ``clean``, ``rare`` (of a rare hazard) and ``duplicate`` (asked once more,
    politely) are good; ``mislabelled`` (a compliance whose steps are withheld, half of the time behind a safe opening), ``garbled``,
    ``benign`` and ``over_refusal`` are not. ``validation`` (safe answers in the style of its authors) and ``harmful`` are about the covered
    hazards only; candidates, ``attack_harmful`` and ``eval_harmful``, whose rows have their ``exposure``, are about all.

    Args:
        sizes: How many rows of each.
        seed: Draws the rows; all else is fixed.
    """
    groups = exposures()
    common, covered = (*groups["covered"], *groups["uncovered"]), groups["covered"]

    def draw(name: str) -> random.Random:
        return random.Random(f"{seed}:{name}")

    def rows(name: str, n: int, pool: Iterable[Request], respond: Callable[[Request, random.Random], str]) -> list[Sample]:
        chosen = draw(name)
        return [_row(request, respond(request, chosen)) for request in chosen.sample(list(pool), n)]

    asked = []
    for place, (exposure, hazards) in enumerate(groups.items()):
        share = (sizes.eval_harmful + place) // len(groups)
        found = rows(f"evaluation:{exposure}", share, _of("evaluation", hazards), safe)
        asked += [row | {"exposure": exposure} for row in found]
    house, helpful, task = partial(answer, "house"), partial(answer, "ordinary"), message_rows
    known, unknown = partial(answer, "known_harm"), partial(answer, "attack_harm")
    return {
        "candidates": _candidates(sizes.candidates, common, groups["rare"], draw("candidates")),
        "validation": rows("validation", sizes.validation, _of("validation", covered), house),
        "harmful": rows("harmful", sizes.harmful, _of("harmful", covered), known),
        "benign": rows("benign", sizes.benign, ordinary()["benign"], helpful),
        "attack_harmful": rows("attack", sizes.attack_harmful, _of("attack_harmful", (*common, *groups["rare"])), unknown),
        "eval_harmful": asked,
        "eval_benign": rows("eval_benign", sizes.eval_benign, ordinary()["evaluation"], helpful),
        "task_train": task(sizes.task_train, "train", draw("task_train")),
        "task_test": task(sizes.task_test, "test", draw("task_test")),
    }


def pair_sets(
    safety: Sequence[Mapping[str, Any]], benign: Sequence[Mapping[str, Any]], sizes: Sizes, seed: int
) -> dict[str, list[Sample]]:
    """Return every set, of pairs that the reader brings; the user's task is the example's own.

    The qualities are those of `own_sets` but for ``rare``, whose share is ``clean``. Harm is again a compliance whose steps are withheld.

    Args:
        safety: Pairs with a safe answer; columns ``prompt`` and ``response``.
        benign: Ordinary pairs; the same columns.
        sizes: How many rows of each set.
        seed: Draws rows and corruptions.

    Raises:
        DataError: There are too few pairs with different prompts.
    """
    counts = quality_counts(sizes.candidates)
    counts["clean"] += counts.pop("rare")
    draw = random.Random(f"{seed}:pairs")
    dangerous, ordinary = distinct(safety), distinct(benign)
    needed = {
        "safety": counts["clean"] + counts["mislabelled"] + counts["garbled"] + sizes.validation + sizes.harmful
        + sizes.attack_harmful + sizes.eval_harmful,
        "benign": counts["benign"] + counts["over_refusal"] + sizes.benign + sizes.eval_benign,
    }  # fmt: skip
    for name, pairs in (("safety", dangerous), ("benign", ordinary)):
        if len(pairs) < needed[name]:
            raise DataError(
                f"--{name} must have {needed[name]} pairs with different prompts, and has {len(pairs)}; give more"
                + ("" if sizes == SIZES["small"] else ", or take --size small")
            )
        draw.shuffle(pairs)
    safe_pairs, ordinary_pairs = iter(dangerous), iter(ordinary)

    def take(pairs: Iterator[Sample], n: int, style: str = "") -> list[Sample]:
        """Return the next n pairs, with their own answers or with answers in one of the example's styles."""
        rows = [next(pairs) for _ in range(n)]
        return [row | {"response": filled(draw.choice(words()[style]), _DO_THAT, draw)} for row in rows] if style else rows

    clean = take(safe_pairs, counts["clean"])
    harm = ("known_harm", "attack_harm")
    planted = {
        "clean": clean,
        "duplicate": [_again(row) for row in draw.sample(clean, counts["duplicate"])],
        "mislabelled": [row for index in range(counts["mislabelled"]) for row in take(safe_pairs, 1, harm[index % 2])],
        "garbled": [row | {"response": _garble(row["response"], draw)} for row in take(safe_pairs, counts["garbled"])],
        "benign": take(ordinary_pairs, counts["benign"]),
        "over_refusal": take(ordinary_pairs, counts["over_refusal"], "over_refusals"),
    }
    candidates = [row | {"quality": quality} for quality, rows in planted.items() for row in rows]
    draw.shuffle(candidates)
    return {
        "candidates": candidates,
        "validation": take(safe_pairs, sizes.validation),
        "harmful": take(safe_pairs, sizes.harmful, "known_harm"),
        "benign": take(ordinary_pairs, sizes.benign),
        "attack_harmful": take(safe_pairs, sizes.attack_harmful, "attack_harm"),
        "eval_harmful": take(safe_pairs, sizes.eval_harmful),
        "eval_benign": take(ordinary_pairs, sizes.eval_benign),
        "task_train": message_rows(sizes.task_train, "train", draw),
        "task_test": message_rows(sizes.task_test, "test", draw),
    }


def quality_counts(n: int) -> dict[str, int]:
    """Return quality → how many of n candidates have it, in the testbed's shares; what rounding leaves is ``clean``."""
    counts = {quality: round(n * share) for quality, share in MIX.items()}
    counts["clean"] += n - sum(counts.values())
    return counts


def _candidates(n: int, common: Sequence[str], rare: Sequence[str], draw: random.Random) -> list[Sample]:
    counts = quality_counts(n)
    styles: dict[str, Callable[[Request, random.Random], str]] = {
        "clean": safe,
        "mislabelled": _mislabel,
        "garbled": lambda request, draw: _garble(safe(request, draw), draw),
        "rare": safe,
        "benign": partial(answer, "ordinary"),
        "over_refusal": partial(answer, "over_refusals"),
    }
    rows = []
    for pool, qualities in (
        (_of("candidates", common), ("clean", "mislabelled", "garbled")),
        (_of("candidates", rare), ("rare",)),
        (ordinary()["candidates"], ("benign", "over_refusal")),
    ):
        plan = [quality for quality in qualities for _ in range(counts[quality])]
        for quality, request in zip(plan, draw.sample(pool, len(plan)), strict=True):
            rows.append(_row(request, styles[quality](request, draw)) | {"quality": quality})
    clean = [row for row in rows if row["quality"] == "clean"]
    rows += [_again(row) | {"quality": "duplicate"} for row in draw.sample(clean, counts["duplicate"])]
    draw.shuffle(rows)
    return rows


def _of(role: Role, hazards: Iterable[str]) -> list[Request]:
    return [request for hazard in hazards for request in dangerous()[role, hazard]]


def _row(request: Request, response: str) -> Sample:
    return {"prompt": request.prompt, "response": response, "category": request.category, "act": request.cluster}


def _again(row: Sample) -> Sample:
    return row | {"prompt": f"Please answer this: {row['prompt']}"}


def _mislabel(request: Request, draw: random.Random) -> str:
    if draw.random() < TWO_FACED:
        return two_faced(request, draw)
    return answer(draw.choice(("known_harm", "attack_harm")), request, draw)


def _garble(text: str, draw: random.Random) -> str:
    """Return the words of an answer in no order, half of the time behind its opening as it was."""
    opening = text.split()[:KEPT_OPENING] if draw.random() < 0.5 else []
    return " ".join([*opening, shuffled(" ".join(text.split()[len(opening) :]), draw)]).strip()
