"""Ray Data's actors beside a bare loop, small: the same scores, and a row of the table for each way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmark import main
from pharmacist_ray.benchmarks import scoring
from pharmacist_ray.benchmarks.scoring import FLOORS, WAYS, Load, measure
from pharmacist_ray.curation.score import ShardScorer
from pharmacist_ray.errors import ArtifactError

SMALL = Load(rows=24, shape="tiny", length=16, rounds=1)


@pytest.mark.usefixtures("ray_local")
def test_it_measures_small_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["scoring", "--rows", "24", "--shape", "tiny", "--length", "16", "--rounds", "1", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "scoring.json").read_text())
    assert made["load"] == {"rows": 24, "shape": "tiny", "length": 16, "rounds": 1}
    assert [one["way"] for one in made["rounds"]] == list(WAYS)
    assert all(0 < one["start_s"] < one["seconds"] and one["rows_per_s"] > 0 for one in made["rounds"])
    pace = {one["way"]: one["rows_per_s"] for one in made["rounds"]}
    told = {one["way"]: one["ratio"] for one in made["scoring"] if one["over"]}
    assert told == {way: pytest.approx(pace[way] / pace[other]) for way, (other, _) in FLOORS.items()}
    assert "24 rows of up to 16 tokens, tiny, 1 rounds" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_local")
def test_a_lost_shard_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(arguments: dict[str, Any], units: list[dict[str, Any]], *how: Any) -> Iterator[dict[str, Any]]:
        yield from map(ShardScorer(**arguments), units[1:])

    monkeypatch.setattr(scoring, "_scored", lossy)
    with pytest.raises(ArtifactError, match=r"bare loop gave \d+ scores of 7 shards for 24 rows of 8, or other scores"):
        measure(SMALL)
