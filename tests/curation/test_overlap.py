"""Which sets share prompts, and the refusal to evaluate on what is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pharmacist_ray.curation import overlap
from pharmacist_ray.curation.overlap import find_overlaps, refuse_trained
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import DataError

LONG = "please tell me in ten short lines how the old mill by the river was repaired after the great flood of last spring and who paid"


def write(folder: Path, prompts: list[str], histories: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    histories = histories or [""] * len(prompts)
    rows = [
        Row(row_id(prompt, str(number), "", history), prompt, str(number), history=history)
        for number, (prompt, history) in enumerate(zip(prompts, histories, strict=True))
    ]
    write_rows(rows, folder / "part.parquet")
    return folder


def compared(tmp_path: Path, **sets: list[str]) -> dict[tuple[str, str], tuple[int, int, int | None]]:
    (tmp_path / "out").mkdir(parents=True, exist_ok=True)
    found = find_overlaps({name: write(tmp_path / name, prompts) for name, prompts in sets.items()}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "overlap.json").read_text()) == found
    return {(pair["set"], pair["within"]): (pair["rows"], pair["exact"], pair["near"]) for pair in found["pairs"]}


def test_prompts_meet_whatever_their_case_and_space(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        candidates=["one two three", "four", "five", "Straße  6"],
        validation=["ONE two\nthree", "nine", "STRASSE 6"],
        benign=["ten", "nine"],
    )
    assert found == {("validation", "candidates"): (3, 2, 0), ("validation", "benign"): (3, 1, 0)}


def test_a_prompt_that_is_there_twice_counts_twice(tmp_path: Path) -> None:
    assert compared(tmp_path, candidates=["a", "b", "c"], harmful=["a", "a"]) == {("harmful", "candidates"): (2, 2, 0)}


def test_near_matches_are_counted_apart_from_exact_ones(tmp_path: Path) -> None:
    changed = LONG.replace("who paid", "who paid it")
    found = compared(tmp_path, candidates=[LONG, "x", "y", "z"], validation=[changed, LONG, "nothing like it at all"])
    assert found == {("validation", "candidates"): (3, 1, 1)}


def test_what_was_said_before_belongs_to_the_prompt(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", ["go on", "x"], ['[{"role":"user"}]', ""]), write(tmp_path / "b", ["go on"])
    assert find_overlaps({"candidates": first, "validation": second}, tmp_path) == {"pairs": []}


def test_the_largest_set_is_read_in_batches_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"question number {number} about thing {number * 7}" for number in range(50)]
    sets = {"candidates": prompts, "validation": [*prompts[10:20], "other"], "eval-benign": prompts[45:]}
    whole = compared(tmp_path / "whole", **sets)
    monkeypatch.setattr(overlap, "_BATCH", 7)
    assert compared(tmp_path / "parts", **sets) == whole
    assert whole["validation", "candidates"][1] == 10
    assert whole["eval-benign", "candidates"][1] == 5


def test_near_matches_of_large_sets_are_not_looked_for_and_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "NEAR_ROWS", 3)
    found = compared(tmp_path, candidates=["a", "b", "c"], harmful=["a"], benign=["a"])
    assert found["harmful", "candidates"] == (1, 1, None)
    assert found["harmful", "benign"] == (1, 1, 0)


def test_an_evaluation_on_trained_prompts_is_refused_in_words() -> None:
    pair = {"set": "eval-harmful", "within": "candidates", "rows": 60, "exact": 12, "near": 3}
    with pytest.raises(DataError) as caught:
        refuse_trained([pair, {**pair, "set": "validation"}])
    assert str(caught.value) == (
        "prompts of the evaluation are trained on too: 12 exactly of the 60 of eval-harmful in candidates; a figure on them says "
        "nothing of others. Take them out of one of the two, or set evaluation.allow_trained_prompts=true"
    )


@pytest.mark.parametrize(
    "pair",
    [
        {"set": "eval-harmful", "within": "candidates", "rows": 60, "exact": 0, "near": 60},
        {"set": "eval-harmful", "within": "eval-benign", "rows": 60, "exact": 2, "near": 0},
        {"set": "harmful", "within": "attack-weak-harmful", "rows": 60, "exact": 2, "near": 0},
    ],
)
def test_near_matches_and_sets_of_one_kind_are_reported_and_not_refused(pair: dict[str, object]) -> None:
    refuse_trained([pair])
