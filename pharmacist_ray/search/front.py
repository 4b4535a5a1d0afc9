"""Which trials of a search are best, and which one to take: pure functions of their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

OBJECTIVES: dict[str, str] = {"worst_hs": "min", "task_accuracy": "max", "over_refusal": "min", "align_seconds": "min"}
"""What a trial is judged by, and which way is better: the highest harmful score over the attacks; task accuracy after the attacks;
over-refusal after the attacks; seconds of one alignment (see `time_levels`)."""


def non_dominated(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no other point dominates, (n,).

    A point dominates another if it is nowhere worse and somewhere better; equal points do not dominate each other.

    Args:
        costs: One row a point, one column an objective, (n, k); less is better.
    """
    no_worse = (costs[:, None, :] <= costs[None, :, :]).all(axis=2)
    better = (costs[:, None, :] < costs[None, :, :]).any(axis=2)
    return np.asarray(~(no_worse & better).any(axis=0))


def time_levels(seconds: Sequence[float], tolerance: float) -> list[float]:
    """Return for each time the one that stands for it: the shortest of those within ``tolerance`` of each other.

    Times are noisy, and a trial must not be on the front for its luck. From the shortest on, a level takes in what is at most
    ``1 + tolerance`` times its shortest, and the next longer time begins a new one. Rounding to levels keeps "no slower than"
    transitive, which a comparison of pairs within a tolerance would not be: then a trial could be beaten by one that is itself off
    the front. Two times at the edge of a level may still differ by little.

    Args:
        seconds: The times.
        tolerance: A share, at least 0.
    """
    levels: dict[float, float] = {}
    start = float("-inf")
    for one in sorted(seconds):
        if one > start * (1 + tolerance) or start < 0:
            start = one
        levels[one] = start
    return [levels[one] for one in seconds]


def on_front(trials: Sequence[Mapping[str, Any]], time_tolerance: float) -> list[bool]:
    """Return which trials no other one beats in one of `OBJECTIVES` without losing in another.

    Args:
        trials: Finished trials with `OBJECTIVES`.
        time_tolerance: Alignment times are compared by `time_levels`.
    """
    if not trials:
        return []
    costs = np.array([[trial[name] if way == "min" else -trial[name] for name, way in OBJECTIVES.items()] for trial in trials])
    costs[:, list(OBJECTIVES).index("align_seconds")] = time_levels([one["align_seconds"] for one in trials], time_tolerance)
    return [bool(one) for one in non_dominated(costs)]


def recommend(trials: Sequence[Mapping[str, Any]], tolerance: float, time_tolerance: float) -> tuple[Mapping[str, Any], str]:
    """Return the trial to take, and why.

    A low harmful score alone is worth nothing: a model that answers nothing has one. So a trial stands for choice if its task
    accuracy is within ``tolerance`` of the best trial's and its over-refusal within ``tolerance`` of the least; of these the one with
    the lowest worst harmful score is taken (then: lower mean, higher accuracy, fewer seconds). If no trial is within both, the
    one that exceeds them least is.

    Args:
        trials: Finished trials with `OBJECTIVES`, ``mean_hs`` and ``trial``; at least one.
        tolerance: From 0 to 1.
        time_tolerance: See `on_front`.
    """
    front = [trial for trial, best in zip(trials, on_front(trials, time_tolerance), strict=True) if best]
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
