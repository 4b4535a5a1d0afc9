"""Which trials of a search are best, and which one to take: pure functions of their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

OBJECTIVES: dict[str, str] = {"worst_hs": "min", "task_accuracy": "max", "over_refusal": "min", "align_seconds": "min"}
"""What a trial is judged by, and which way is better: the highest harmful score over the attacks; task accuracy after the attacks;
over-refusal after the attacks; seconds of one alignment."""


def non_dominated(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no other point dominates, (n,).

    A point dominates another if it is nowhere worse and somewhere better; equal points do not dominate each other.

    Args:
        costs: One row a point, one column an objective, (n, k); less is better.
    """
    no_worse = (costs[:, None, :] <= costs[None, :, :]).all(axis=2)
    better = (costs[:, None, :] < costs[None, :, :]).any(axis=2)
    return np.asarray(~(no_worse & better).any(axis=0))


def on_front(trials: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return which trials no other one beats in one of `OBJECTIVES` without losing in another."""
    if not trials:
        return []
    signs = [1.0 if way == "min" else -1.0 for way in OBJECTIVES.values()]
    return [bool(one) for one in non_dominated(np.array([[trial[name] for name in OBJECTIVES] for trial in trials]) * signs)]


def recommend(trials: Sequence[Mapping[str, Any]], tolerance: float) -> tuple[Mapping[str, Any], str]:
    """Return the trial to take, and why.

    A low harmful score alone is worth nothing: a model that answers nothing has one. So a trial stands for choice if its task
    accuracy is within ``tolerance`` of the best trial's and its over-refusal within ``tolerance`` of the least; of these the one with
    the lowest worst harmful score is taken (then: lower mean, higher accuracy, fewer seconds). If no trial is within both, the
    one that exceeds them least is.

    Args:
        trials: Finished trials with `OBJECTIVES`, ``mean_hs`` and ``trial``; at least one.
        tolerance: From 0 to 1.
    """
    front = [trial for trial, best in zip(trials, on_front(trials), strict=True) if best]
    accuracy, refusal = max(t["task_accuracy"] for t in trials), min(t["over_refusal"] for t in trials)

    def excess(trial: Mapping[str, Any]) -> float:
        """By how much a trial leaves the tolerance, at least 0; rounded, so that 0.05 is within 0.05."""
        worse = max(accuracy - trial["task_accuracy"], trial["over_refusal"] - refusal)
        return max(0.0, round(float(worse) - tolerance, 9))

    least = min(map(excess, front))
    fit = [trial for trial in front if excess(trial) == least]
    chosen = min(fit, key=lambda t: (t["worst_hs"], t["mean_hs"], -t["task_accuracy"], t["align_seconds"], t["trial"]))
    within = (
        f"the {len(fit)} of {len(front)} trials on the Pareto front whose task accuracy is within {tolerance:g} of the best "
        f"({accuracy:.3f}) and whose over-refusal is within {tolerance:g} of the least ({refusal:.3f})"
    )
    if least:
        within = (
            f"the trials on the Pareto front, none is within {tolerance:g} of the best task accuracy ({accuracy:.3f}) and the "
        )
        within += f"least over-refusal ({refusal:.3f}); of those that come nearest"
    numbers = f"task accuracy {chosen['task_accuracy']:.3f}, over-refusal {chosen['over_refusal']:.3f}"
    return chosen, f"Of {within}, it has the lowest worst harmful score after an attack: {chosen['worst_hs']:.3f} ({numbers})."
