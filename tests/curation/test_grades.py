from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pharmacist_ray.curation.grades import auroc, grade_scores
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ArtifactError, DataError
from pharmacist_ray.storage import write_parquet

LABELS = ["clean", "swapped", "clean", "benign", "clean", "swapped", "benign", "clean", "benign", "swapped"]
UP = [0.9, 0.1, 0.8, 0.3, 0.7, 0.2, 0.75, 0.1, 0.4, 0.2]


def pairs_won(values: np.ndarray, positive: np.ndarray) -> float:
    """The definition: over all pairs of a positive and a negative row, a win counts one and a tie a half."""
    pairs = list(product(values[positive], values[~positive]))
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@given(data=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_won_with_ties_counted_half(data: list[tuple[int, bool]]) -> None:
    values, positive = np.array([float(value) for value, _ in data]), np.array([label for _, label in data])
    assume(positive.any() and not positive.all())
    assert auroc(values, positive) == pytest.approx(pairs_won(values, positive), abs=1e-12)
    assert auroc(-values, positive) == pytest.approx(1 - auroc(values, positive), abs=1e-12)


def test_auroc_of_a_perfect_a_reversed_and_a_constant_score() -> None:
    positive = np.array([True, True, False, False, False])
    assert auroc(np.array([5.0, 4, 3, 2, 1]), positive) == 1
    assert auroc(np.array([1.0, 2, 3, 4, 5]), positive) == 0
    assert auroc(np.ones(5), positive) == 0.5


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Ten labelled rows in two shards, and their scores in other shards and in another order."""
    rows = [
        Row(f"{n:032x}", f"w{n}", "w1", source=f"made:{n}", raw=orjson.dumps({"quality": label}).decode())
        for n, label in enumerate(LABELS)
    ]
    write_rows(rows[:5], tmp_path / "rows" / "part-00000.parquet")
    write_rows(rows[5:], tmp_path / "rows" / "part-00001.parquet")
    order = [3, 9, 0, 7, 1, 8, 2, 6, 4, 5]
    columns = {"id": [rows[n].id for n in order], "up": [UP[n] for n in order], "same": [1.0] * 10}
    table = pa.table(columns)
    write_parquet(table.slice(0, 3), tmp_path / "scores" / "part-00000.parquet")
    write_parquet(table.slice(3), tmp_path / "scores" / "part-00001.parquet")
    return tmp_path / "rows", tmp_path / "scores"


def test_grades_count_the_good_rows_among_the_kept_ones(folders: tuple[Path, Path]) -> None:
    up, same = grade_scores(*folders, column="quality", good=["clean"], keep=0.4)
    assert (up.scorer, same.scorer) == ("up", "same")
    # The four best are rows 0, 2, 6 and 4: clean, clean, benign, clean.
    assert up.precision == 0.75
    assert up.kept == {"benign": pytest.approx(1 / 3), "clean": 0.75, "swapped": 0.0}
    assert up.base_rate == same.base_rate == 0.4
    good = np.array([label == "clean" for label in LABELS])
    assert up.auroc == pytest.approx(pairs_won(np.array(UP), good))
    assert same.auroc == 0.5
    # All scores tie, so the first ids are kept: rows 0 … 3, two of them clean.
    assert same.precision == 0.5
    assert same.kept == {"benign": pytest.approx(1 / 3), "clean": 0.5, "swapped": pytest.approx(1 / 3)}


def test_a_score_made_of_several_is_graded_as_well(folders: tuple[Path, Path]) -> None:
    made = {"down": lambda table: -table.column("up").to_numpy()}
    up, _, down = grade_scores(*folders, column="quality", good=["clean"], keep=0.4, made=made)
    assert down.scorer == "down"
    assert down.auroc == pytest.approx(1 - up.auroc)


def test_several_labels_can_be_good_and_at_least_one_row_is_kept(folders: tuple[Path, Path]) -> None:
    up, _ = grade_scores(*folders, column="quality", good=["clean", "benign"], keep=1.0)
    assert up.precision == up.base_rate == 0.7
    assert set(up.kept.values()) == {1.0}
    up, _ = grade_scores(*folders, column="quality", good=["clean"], keep=0.001)
    assert up.precision == 1.0
    assert up.kept == {"benign": 0.0, "clean": 0.25, "swapped": 0.0}


def test_errors_name_the_column_the_labels_and_the_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^made:0: no column 'kind' with a planted label; name another with --column$"):
        grade_scores(*folders, column="kind", good=["clean"], keep=0.4)
    for good in (["sound"], ["clean", "benign", "swapped"]):
        with pytest.raises(DataError, match=r"^labels in 'quality' are benign, clean, swapped; name the good ones with --good$"):
            grade_scores(*folders, column="quality", good=good, keep=0.4)
    with pytest.raises(ArtifactError, match=r"^no Parquet files at .*; run the stage that writes them first$"):
        grade_scores(tmp_path / "nowhere", folders[1], column="quality", good=["clean"], keep=0.4)


def test_scores_of_rows_that_are_no_candidates_are_refused(folders: tuple[Path, Path]) -> None:
    table = pq.read_table(folders[1] / "part-00001.parquet")
    stranger = table.set_column(0, "id", pa.array([f"{n:032x}" for n in range(100, 100 + table.num_rows)]))
    write_parquet(stranger, folders[1] / "part-00001.parquet")
    with pytest.raises(ArtifactError, match=r"scores of rows that are not among the candidates"):
        grade_scores(*folders, column="quality", good=["clean"], keep=0.4)
