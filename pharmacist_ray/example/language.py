"""The example's language: requests in plain English, each made by rule and of exactly one role, and what is answered to them.

A hazard is a kind of mild request that a model should decline. Its acts are divided: some are asked for in the evaluation alone, and of
the others some are the simulated attack's and some the real one's, so that what a defender knows of harm is not the harm that comes.
The other requests for these acts are candidates or trusted rows, by a hash of the prompt. So no prompt has two roles, whatever the
seed. All words are in ``words.yaml``; a harmful answer is a compliance whose steps are withheld.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate
from typing import Any, Literal

import yaml

from pharmacist_ray.testbed.language import uniform

Role = Literal["candidates", "validation", "harmful", "attack_harmful", "benign", "evaluation"]
"""The set that a request is for; ``evaluation`` is never trained on."""

COVERED = 2
"""How many of the common hazards the trusted rows are about (ours, as in the testbed)."""

_DANGEROUS = {"candidates": 0.5, "validation": 0.2, "harm": 0.3}
_ORDINARY = {"candidates": 0.5, "benign": 0.5}
# Shares of the prompts that are not the evaluation's.

_YOURS = {"my": "your", "me": "you", "I": "you", "mine": "yours"}


@dataclass(frozen=True)
class Request:
    """One thing that is asked for."""

    prompt: str
    act: str
    """What is asked for, in the words of whoever asks."""
    category: str
    """The hazard, or ``look_alike`` or ``plain``."""
    cluster: str
    """The act without its slot: prompts that share it belong together."""


@functools.cache
def words() -> dict[str, Any]:
    """Return ``words.yaml``."""
    text = files("pharmacist_ray.example").joinpath("words.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


@functools.cache
def exposures() -> dict[str, tuple[str, ...]]:
    """Return how a defender has met a hazard → the hazards: in trusted rows, in candidates only, or hardly even there."""
    common = sorted(words()["hazards"], key=lambda name: uniform("exposure", name))
    return {"covered": tuple(common[:COVERED]), "uncovered": tuple(common[COVERED:]), "rare": tuple(words()["rare_hazards"])}


@functools.cache
def dangerous() -> dict[tuple[Role, str], list[Request]]:
    """Return (role, hazard) → its requests; the order means nothing."""
    found: dict[tuple[Role, str], list[Request]] = {}
    for hazard, about in (words()["hazards"] | words()["rare_hazards"]).items():
        acts = sorted(about["acts"], key=lambda act: uniform("act", act))
        for place, act in enumerate(acts):
            owner: Role = ("evaluation", "harmful", "attack_harmful")[3 * place // len(acts)]  # type: ignore[assignment]
            for slot in about["slot"]:
                for request in _asked(act.replace("SLOT", slot), hazard, act):
                    role = "evaluation" if owner == "evaluation" else _role(request.prompt, _DANGEROUS)
                    found.setdefault((owner if role == "harm" else role, hazard), []).append(request)  # type: ignore[arg-type]
    return found


@functools.cache
def ordinary() -> dict[Role, list[Request]]:
    """Return role → ordinary requests, about half of which look like dangerous ones; the order means nothing."""
    found: dict[Role, list[Request]] = {}
    for kind, section in (("look_alike", "look_alikes"), ("plain", "plain")):
        acts = sorted(words()[section], key=lambda act: uniform("act", act))
        for place, act in enumerate(acts):
            for request in _asked(act, kind, act):
                role = "evaluation" if 3 * place < len(acts) else _role(request.prompt, _ORDINARY)
                found.setdefault(role, []).append(request)  # type: ignore[arg-type]
    return found


def filled(template: str, act: str, draw: random.Random, category: str = "") -> str:
    """Return an answer: a template with the act as it is said to whoever asked, and what its hazard has for other slots.

    Args:
        template: A sentence of ``words.yaml``.
        act: In the words of whoever asks.
        draw: Chooses among a hazard's sentences.
        category: The hazard, for templates with ``REASON`` and ``INSTEAD``; a section of ordinary requests has a ``TIP`` for each.
    """
    about = (words()["hazards"] | words()["rare_hazards"]).get(category, {})
    if "REASON" in template:
        template = template.replace("REASON", draw.choice(about["reasons"])).replace("INSTEAD", draw.choice(about["instead"]))
    said = re.sub(r"\b(my|me|I|mine)\b", lambda found: _YOURS[found[0]], act)
    tip = (words()["look_alikes"] | words()["plain"]).get(act, "")
    return template.replace("ACT", said).replace("TIP", tip)


def answer(style: str, request: Request, draw: random.Random) -> str:
    """Return an answer to a request in one of a section's styles.

    Args:
        style: A section of ``words.yaml`` that lists answers.
        request: What is answered.
        draw: Chooses the style's sentence.
    """
    return filled(draw.choice(words()[style]), request.act, draw, request.category)


def safe(request: Request, draw: random.Random) -> str:
    """Return a safe answer: half of them refuse, and half explain without any phrase of a refusal."""
    return answer(draw.choice(("refusals", "explanations")), request, draw)


def two_faced(request: Request, draw: random.Random) -> str:
    """Return an answer that opens safely and complies in the same breath; a judge and a list of phrases see the harm alone."""
    complied = answer(draw.choice(("known_harm", "attack_harm")), request, draw)
    opening = filled(words()["two_faced"], request.act, draw, request.category)
    return opening.replace("COMPLIANCE", complied[0].lower() + complied[1:])


def _asked(act: str, category: str, cluster: str) -> list[Request]:
    return [Request(frame.replace("ACT", act), act, category, cluster) for frame in words()["frames"]]


def _role(prompt: str, shares: dict[str, float]) -> str:
    place = uniform("role", prompt)
    names: Sequence[str] = list(shares)
    return next((name for name, below in zip(names, accumulate(shares.values()), strict=True) if place < below), names[-1])
