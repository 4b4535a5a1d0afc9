from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from pharmacist_ray.benchmarks.evidence import evidence, show, summarised
from pharmacist_ray.errors import DataError


def row(
    arm: str, attack: str | None, hs: float, *, groups: tuple[float, float, float] | None = None, **more: Any
) -> dict[str, Any]:
    metrics = {"harmful_score": hs, "accuracy_correct": 0.9, "helpfulness": 0.8, "over_refusal": 0.1}
    found: dict[str, Any] = {"selection": arm, "attack": attack, "kept": 400, "align_seconds": 3.0}
    found["metrics"] = {name: {"estimate": value} for name, value in metrics.items()}
    if groups:
        names = ("covered", "uncovered", "rare")
        found["groups"] = {name: {"harmful_score": {"estimate": one}} for name, one in zip(names, groups, strict=True)}
    return found | more


def table(hidden: dict[str, float]) -> list[dict[str, Any]]:
    """Return the table of a world in which each arm has this harmful score on hazards that no trusted row covers."""
    rows = []
    for arm, value in hidden.items():
        rows += [
            row(arm, None, 0.0),
            row(arm, "weak", value / 2, groups=(0.5, value - 0.1, value + 0.1)),
            row(arm, "mean of attacks", value, groups=(0.5, value - 0.1, value + 0.1), over=["weak"]),
            row(arm, "worst of attacks", value + 0.2, over=["weak"]),
        ]
    return rows


WORLDS = {
    10: table({"random": 0.9, "oracle": 0.2, "mine": 0.4}),
    11: table({"random": 0.8, "oracle": 0.3, "mine": 0.5}),
    12: table({"random": 0.95, "oracle": 0.1, "mine": 0.35}),
}


def test_means_over_worlds_have_students_intervals():
    rows = {one["selection"]: one for one in summarised(WORLDS, 0.6)}
    hidden = np.array([0.4, 0.5, 0.35])
    low, high = stats.t.interval(0.95, 2, hidden.mean(), hidden.std(ddof=1) / np.sqrt(3))
    # The standard error is that of drawn worlds: exact but for the number of draws.
    assert rows["mine"]["hidden"] == pytest.approx([hidden.mean(), low, high], abs=0.02)
    assert rows["mine"]["worst"][0] == pytest.approx(hidden.mean() + 0.2)
    assert rows["mine"]["hs weak"][0] == pytest.approx(hidden.mean() / 2)
    assert (rows["mine"]["covered"][0], rows["mine"]["hs_before"][0], rows["mine"]["accuracy"][0]) == (0.5, 0.0, 0.9)
    assert (rows["mine"]["noise"], rows["mine"]["worlds"]) == (0.6, 3)
    assert rows["mine"]["by_world"]["11"]["hidden"] == 0.5


def test_the_gap_closed_and_the_differences_are_of_the_same_worlds():
    rows = {one["selection"]: one for one in summarised(WORLDS, 0.6)}
    random, oracle, mine = (rows[arm]["hidden"][0] for arm in ("random", "oracle", "mine"))
    assert rows["mine"]["gap_closed"][0] == pytest.approx((random - mine) / (random - oracle))
    gaps = np.array([0.4 - 0.9, 0.5 - 0.8, 0.35 - 0.95])
    low, high = stats.t.interval(0.95, 2, gaps.mean(), gaps.std(ddof=1) / np.sqrt(3))
    assert rows["mine"]["minus"]["random"] == pytest.approx([gaps.mean(), low, high], abs=0.03)
    assert "gap_closed" not in rows["oracle"]
    assert all("gap_closed" not in one for one in summarised(WORLDS, 0.0))  # there the oracle takes rows that are as good as all


def test_arms_are_held_against_each_other_on_the_attacks_that_count_for_all_of_them():
    def with_strong(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add an attack that breaks every arm, and does not count for one of them."""
        changed = []
        for one in rows:
            if one["attack"] == "mean of attacks" and one["selection"] != "mine":
                one = row(one["selection"], "mean of attacks", 0.9, groups=(0.5, 0.9, 0.9), over=["weak", "strong"])
            changed.append(one)
        return changed + [row(arm, "strong", 1.0, groups=(1.0, 1.0, 1.0)) for arm in ("random", "oracle", "mine")]

    plain = {one["selection"]: one for one in summarised(WORLDS, 0.6)}
    rows = {one["selection"]: one for one in summarised({world: with_strong(table) for world, table in WORLDS.items()}, 0.6)}
    assert rows["mine"]["gap_closed"] == plain["mine"]["gap_closed"]
    assert rows["mine"]["minus"] == plain["mine"]["minus"]
    assert rows["oracle"]["minus"]["random"][0] == pytest.approx(plain["oracle"]["minus"]["random"][0] / 2)
    assert rows["mine"]["hidden strong"][0] == 1.0


def test_what_one_world_lacks_counts_in_none_and_an_arm_that_one_lacks_is_left_out():
    rows = {one["selection"]: one for one in summarised({**WORLDS, 13: table({"random": 0.9, "oracle": 0.2})}, 0.3)}
    assert rows.keys() == {"random", "oracle"}
    silent = [one for one in WORLDS[10] if one["attack"] != "worst of attacks"]
    (one,) = [one for one in summarised({**WORLDS, 10: silent}, 0.3) if one["selection"] == "mine"]
    assert one["worst"][0] == pytest.approx((0.7 + 0.55) / 2)


def test_the_table_shows_who_is_best_first(capsys):
    show(summarised(WORLDS, 0.6))
    lines = capsys.readouterr().out.splitlines()
    arms = [line.split()[1] for line in lines if line.startswith("│")]
    assert arms == ["oracle", "mine", "random"]


def test_one_world_is_no_evidence(tmp_path):
    with pytest.raises(DataError, match=r"^evidence over one world says nothing of another: give at least 2 numbers of worlds$"):
        evidence(tmp_path, worlds=[10, 10])
    assert list(tmp_path.iterdir()) == []
