"""Scores over the last layers against those over all, small: all layers are all layers, and fewer cost less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.benchmark import main
from pharmacist_ray.data.schema import Row

TRAIN: dict[str, Any] = {"steps": 2, "batch_size": 4, "lr": 1e-2}


@pytest.fixture
def config(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path) -> Path:
    for seed, (name, count) in enumerate({"candidates": 40, "validation": 6, "harmful": 6}.items()):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(row.raw for row in rows_of(count, seed=seed)) + "\n")
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model_folder), "template": "plain", "max_length": 32, "lora": {"r": 2}},
        "data": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("candidates", "validation", "harmful")},
        "resources": {"workers": 0, "actors": 0},
        "selector": {"warmup": TRAIN, "checkpoints": [1, 2], "reference": None},
        "scoring": {"scorers": ["pharmacist"], "last_layers": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def test_it_measures_small_and_writes_what_it_found(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["layers", str(config), "--rows", "24", "--rounds", "1", "--layers", "1", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert (found["rows"], found["direction"]) == (24, "pharmacist")
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
