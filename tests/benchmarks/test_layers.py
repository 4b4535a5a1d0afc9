"""Scores over the last layers against those over all, small: all layers are all layers, and the file says what the table does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.benchmark import main


@pytest.fixture
def config(small_run: Callable[..., Path]) -> Path:
    return small_run(40, selector={"checkpoints": [1, 2]}, scoring={"scorers": ["pharmacist"], "last_layers": 1})


def test_it_measures_small_and_writes_what_it_found(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["layers", str(config), "--rows", "24", "--rounds", "1", "--layers", "1", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert (found["rows"], found["direction"]) == (20, "pharmacist")  # the others had a part in the weights
    last, whole = found["layers"]
    assert (last["layers"], whole["layers"], whole["of"]) == (1, 2, 2)
    assert [whole[name] for name in ("pearson", "spearman", "overlap")] == pytest.approx([1, 1, 1])
    assert -1 < last["pearson"] < 1
    assert whole["ratio"] > 0
    assert "1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "3"], "--layers 3: the model has 2 layers"),
        (
            ["scoring.scorers=[low_loss]", "selection.scorer=low_loss", "comparison.selections=[low_loss]"],
            "has no score that is an influence: add pharmacist",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["layers", str(config), *more, "--out", str(tmp_path / "out")])
    assert message in " ".join(capfd.readouterr().err.split())
