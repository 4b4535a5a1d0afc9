from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from pharmacist_ray.curation.planted import FILE, KINDS, hold_out, shuffled, unit_of
from pharmacist_ray.data.rows import iterate_rows, write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import DataError


def rows_of(name: str, count: int) -> list[Row]:
    texts = [(f"{name} asks {i}", f"{name} says {i} a b c d e f g h") for i in range(count)]
    return [Row(row_id(*text, "extra", "[]"), *text, "extra", "[]") for text in texts]


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    counts = {"validation": 41, "harmful": 24, "benign": 30}
    for name, count in counts.items():
        write_rows(rows_of(name, count), tmp_path / name / "part-00000.parquet")
    return {name: tmp_path / name for name in counts}


def test_each_kind_is_what_it_is_called_and_half_of_the_rows_are_left_for_the_fit(sets: dict[str, Path], tmp_path: Path) -> None:
    summary = hold_out(sets, tmp_path / "out", limit=200, seed=3)
    assert summary == {
        "planted": {"good": 20, "mislabelled": 12, "garbled": 20, "ordinary": 15, "over_refusal": 15},
        "not_planted": [],
    }
    fit = {name: {row.prompt for row in iterate_rows(tmp_path / "out" / "fit" / f"{name}.parquet")} for name in sets}
    assert {name: len(prompts) for name, prompts in fit.items()} == {"validation": 21, "harmful": 12, "benign": 15}
    whose = {
        "good": "validation",
        "mislabelled": "validation",
        "garbled": "validation",
        "ordinary": "benign",
        "over_refusal": "benign",
    }
    says = {"good": "validation", "mislabelled": "harmful", "garbled": None, "ordinary": "benign", "over_refusal": "validation"}
    planted = list(iterate_rows(tmp_path / "out" / "rows" / FILE))
    for row in planted:
        kind = row.category
        assert row.id == row_id(row.prompt, row.response, row.input, row.history)
        assert (row.input, row.history) == ("extra", "[]")
        assert row.prompt not in fit[whose[kind]]
        if kind == "garbled":
            number = row.prompt.rpartition(" ")[2]
            assert row.response != f"validation says {number} a b c d e f g h"
            assert Counter(row.response.split()) == Counter(f"validation says {number} a b c d e f g h".split())
        else:
            assert row.response.startswith(f"{says[kind]} says")
            if kind in ("good", "ordinary"):
                assert row.response.split()[2] == row.prompt.split()[2]
    for kind in KINDS:  # no trusted row is in two units, or twice in a kind
        mine = [row for row in planted if row.category == kind]
        assert len({row.prompt for row in mine}) == len({row.response for row in mine}) == len(mine)
        assert len({unit_of(row.raw) for row in mine}) == len(mine)
    prompts = {unit_of(row.raw): row.prompt for row in planted if row.category == "good"}
    assert all(prompts[unit_of(row.raw)] == row.prompt for row in planted if row.category in ("mislabelled", "garbled"))


def test_the_halves_depend_on_the_rows_and_the_seed_alone(sets: dict[str, Path], tmp_path: Path) -> None:
    def planted(out: str, seed: int = 3, limit: int = 200) -> list[Row]:
        hold_out(sets, tmp_path / out, limit=limit, seed=seed)
        return list(iterate_rows(tmp_path / out / "rows" / FILE))

    first = planted("first")
    rows = rows_of("validation", 41)
    (sets["validation"] / "part-00000.parquet").unlink()
    for shard, part in enumerate((rows[30:], rows[:30])):
        write_rows(part, sets["validation"] / f"part-{shard:05d}.parquet")
    assert planted("again") == first
    assert planted("other", seed=4) != first
    assert Counter(row.category for row in planted("few", limit=6)) == dict.fromkeys(KINDS, 6)


def test_without_benign_rows_two_kinds_are_left_out_and_words_that_stay_the_same_are_not_called_garbled(tmp_path: Path) -> None:
    for name in ("validation", "harmful"):
        rows = [Row(row_id(f"{name}{i}", "no"), f"{name}{i}", "no") for i in range(10)]
        write_rows(rows, tmp_path / name / "part-00000.parquet")
    sets = {name: tmp_path / name for name in ("validation", "harmful")}
    assert hold_out(sets, tmp_path / "out", limit=9, seed=0) == {
        "planted": {"good": 5},
        "not_planted": ["mislabelled", "garbled", "ordinary", "over_refusal"],
    }
    write_rows(rows[:9], tmp_path / "harmful" / "part-00000.parquet")
    message = (
        "^a calibrated selection holds out half of the trusted rows, and data.harmful has only 9: give it at least 10, or select by "
        "another score$"
    )
    with pytest.raises(DataError, match=message):
        hold_out(sets, tmp_path / "short", limit=9, seed=0)


def test_shuffled_words_are_the_same_words() -> None:
    text = "one two  three\nfour five six seven"
    assert Counter(shuffled(text, random.Random(0)).split()) == Counter(text.split())
    assert shuffled(text, random.Random(0)) == shuffled(text, random.Random(0)) != " ".join(text.split())
