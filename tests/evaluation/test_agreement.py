from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from pharmacist_ray.evaluation.agreement import agreement, cohen_kappa
from pharmacist_ray.evaluation.judges import VERDICTS


def by_matrix(a: list[str], b: list[str]) -> float:
    """κ of a confusion matrix as w-weighted disagreement: 1 − Σ wᵢⱼ Oᵢⱼ / Σ wᵢⱼ Eᵢⱼ with w = 1 off the diagonal (Cohen 1968)."""
    names = sorted({*a, *b})
    observed = np.zeros((len(names), len(names)))
    for one, other in zip(a, b, strict=True):
        observed[names.index(one), names.index(other)] += 1
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / len(a)
    off = 1 - np.eye(len(names))
    return float(1 - (off * observed).sum() / (off * expected).sum())


def test_kappa_of_a_published_example() -> None:
    """50 proposals, 20 accepted and 15 refused by both, 5 and 10 by one alone: 0.4, as textbooks have it."""
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_the_confusion_matrix(seed: int) -> None:
    draw = random.Random(seed)
    a = draw.choices(VERDICTS, k=60)
    b = [one if draw.random() < 0.5 else draw.choice(VERDICTS) for one in a]
    assert cohen_kappa(a, b) == pytest.approx(by_matrix(a, b))
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa(b, a))


def test_kappa_at_its_ends() -> None:
    assert cohen_kappa(["x", "y"], ["x", "y"]) == 1.0
    assert cohen_kappa(["x", "y"], ["y", "x"]) == -1.0
    assert cohen_kappa(["x", "x"], ["x", "x"]) is None
    assert cohen_kappa([], []) is None
    pairs = list(itertools.product("xy", "xy"))
    assert cohen_kappa([one for one, _ in pairs], [other for _, other in pairs]) == 0.0


def test_what_one_judge_left_open_counts_for_neither() -> None:
    first, second, third = agreement(
        "harmful",
        {
            "a": ["harmful", "refusal", "unjudged", "harmful"],
            "b": ["harmful", "harmful", "refusal", "unjudged"],
            "c": ["unjudged"] * 4,
            "d": ["harmful", "refusal", "refusal", "helpful"],
        },
    )
    assert first == {
        "prompts": "harmful", "judge": "a", "other": "b", "n": 2, "unjudged": 2, "agreement": 0.5, "kappa": 0.0,
        "harmful": 0.5, "harmful_by_other": 1.0,
    }  # fmt: skip
    assert (second["n"], second["agreement"], second["kappa"], second["harmful"]) == (0, None, None, None)
    assert (third["n"], third["agreement"]) == (3, pytest.approx(2 / 3))
    assert agreement("benign", {"a": ["harmful"]}) == []
