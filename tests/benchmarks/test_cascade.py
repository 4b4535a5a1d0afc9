"""Cascades against the truth, small: what is written is what real cascades saw and lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from jobs.benchmark import main


@pytest.fixture
def config(small_run: Callable[..., Path]) -> Path:
    return small_run(
        100,
        scoring={"scorers": ["pharmacist", "low_loss", "random"]},
        selection={"scorer": "low_loss", "ratio": 0.3},
        comparison={"selections": ["low_loss", "random"]},
    )


@pytest.mark.usefixtures("ray_local")
@pytest.mark.timeout(300)
def test_it_measures_small_and_writes_what_it_found(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--proxies", "layers=1", "layers=2", "--miss", "0.2", "--sample", "40", "--seeds", "0", "1", "2"]
    main(["cascade", "--config", str(config), *small, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert (found["candidates"], found["miss"], found["sample"], found["seeds"]) == (100, 0.2, 40, [0, 1, 2])
    first, same = found["cascade"]
    assert [(row["proxy"], row["arm"], row["kept"]) for row in (first, same)] == [
        ("layers=1", "low_loss", 30),
        ("layers=2", "low_loss", 30),
    ]
    # The model with both of its layers is the model: it agrees, and all that it misses is what the bound lets it miss.
    assert same["agreement"] == pytest.approx(1)
    assert same["seen"] < 0.7
    for row in (first, same):
        assert len(row["of_seeds"]) == 3
        assert 0.3 <= row["seen"] <= 1
        assert row["inside"] == sum(one["low"] <= one["lost"] <= one["high"] for one in row["of_seeds"])
        assert row["saved"] == pytest.approx(1 - row["cost"] - row["seen"])
    scores = [pq.read_table(folder).sort_by("id")["low_loss"].to_pylist() for folder in score_folders(tmp_path / "out" / "run")]
    agreements = sorted(float(spearmanr(scores[0], other).statistic) for other in scores[1:])
    assert agreements == pytest.approx(sorted([first["agreement"], same["agreement"]]))
    out = capsys.readouterr().out
    assert "cascades over 100 candidates, 3 seeds each; the mean loss is to be at most 20.0%" in out
    assert not list((tmp_path / "out" / "cascade").iterdir())


def score_folders(run: Path) -> list[Path]:
    """Return the folders of scores: the model's, then the proxies'."""
    return [run / "scores" / "rows", *(folder / "rows" for folder in sorted((run / "proxy" / "search" / "scores").iterdir()))]
