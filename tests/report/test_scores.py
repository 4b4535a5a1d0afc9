from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.report import scores as module
from pharmacist_ray.report.run_files import RunFiles
from pharmacist_ray.report.scores import BINS, EXAMPLES, Extremes, Histogram, read_scores
from pharmacist_ray.storage import write_parquet, write_text


@pytest.fixture(scope="module")
def made(make_run):
    run = make_run()
    run.config()
    run.ingest(200)
    run.score()
    run.select()
    return run


def in_memory(run):
    """Return id → score and the ids kept, read at once."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted((run.root / "scores/rows").glob("*.parquet"))])
    kept = pq.read_table(run.root / "selections/pharmacist/rows")["id"].to_pylist()
    return dict(zip(table["id"].to_pylist(), table["pharmacist"].to_pylist(), strict=True)), set(kept)


@pytest.mark.parametrize("batch", [7, 1 << 17])
def test_streams_agree_with_everything_in_memory(made, monkeypatch, batch):
    monkeypatch.setattr(module, "_BATCH", batch)
    found = read_scores(RunFiles(made.root))
    values, kept = in_memory(made)
    known = {id: value for id, value in values.items() if not np.isnan(value)}
    main = found.columns["pharmacist"]
    assert found.main == "pharmacist"
    assert (main.rows, main.unscored) == (len(known), 3)
    assert (main.low, main.high) == (min(known.values()), max(known.values()))
    assert main.edges[0] >= main.low
    assert main.edges[-1] <= main.high
    inside = np.clip(list(known.values()), main.edges[0], main.edges[-1])
    assert main.all.tolist() == np.histogram(inside, main.edges)[0].tolist()
    inside = np.clip([known[id] for id in kept], main.edges[0], main.edges[-1])
    assert main.kept.tolist() == np.histogram(inside, main.edges)[0].tolist()
    assert main.quartiles == pytest.approx(np.quantile(list(known.values()), [0.25, 0.5, 0.75]).tolist())
    assert found.columns["random_0"].kept is None
    assert found.columns["random_0"].all.sum() == 200
    for ids, extremes in ((kept, found.kept), (known.keys() - kept, found.dropped)):
        ranked = sorted(ids, key=known.__getitem__)
        assert [id for _, id, _ in extremes.worst] == ranked[:EXAMPLES]
        assert [id for _, id, _ in extremes.best] == ranked[::-1][:EXAMPLES]


def test_an_outlier_does_not_flatten_the_rest():
    histogram = Histogram()
    module._measure(histogram, np.append(np.random.default_rng(0).normal(size=5000), [1e12, np.inf, np.nan]), 1)
    assert (histogram.rows, histogram.unscored, histogram.high) == (5002, 1, 1e12)
    assert histogram.edges[-1] < 10
    counts = histogram.count(np.array([0.0, 1e12, np.inf, -np.inf]))
    assert counts.sum() == 4
    assert counts[-1] == 2
    assert counts[0] == 1


@pytest.mark.parametrize("values", [[2.5] * 9, [0.0], []])
def test_scores_that_do_not_differ_still_have_bins(values):
    histogram = Histogram()
    module._measure(histogram, np.array(values), 1)
    assert np.all(np.diff(histogram.edges) > 0)
    assert histogram.count(np.array(values)).sum() == len(values)
    assert len(histogram.quartiles) == 3


def test_the_sample_is_bounded_and_spread_over_all_rows(made, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 20)
    found = read_scores(RunFiles(made.root))
    assert 15 <= sum(map(len, found.columns["random_0"].sample)) <= 20 + 3


def test_extremes_are_those_of_a_sort_and_ties_go_by_id():
    extremes = Extremes()
    for start in (0, 4):
        ids = pa.array([f"id{number}" for number in range(start, start + 4)])
        extremes.add(np.array([1.0, 1.0, 0.5, 2.0]), ids, np.array([True, True, True, start == 4]), "part")
    assert extremes.best == [(2.0, "id7", "part"), (1.0, "id0", "part"), (1.0, "id1", "part")]
    assert [id for _, id, _ in extremes.worst] == ["id2", "id6", "id0"]


def test_a_selection_of_other_scores_is_not_shown_as_one_of_these(make_run):
    run = make_run()
    run.config()
    run.ingest()
    run.score()
    run.select()
    run.manifest("selections/pharmacist", scores="f-of-last-week")
    found = read_scores(RunFiles(run.root))
    assert found.main is None
    assert found.columns["pharmacist"].kept is None
    assert found.columns["pharmacist"].all.sum() == 57


def test_lowest_first_is_followed(make_run):
    run = make_run()
    run.config()
    run.ingest()
    run.score()
    run.select()
    file = run.root / "selections/pharmacist/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["rule"]["descending"] = False
    write_text(json.dumps(manifest), file)
    values, kept = in_memory(run)
    found = read_scores(RunFiles(run.root))
    assert found.kept.best[0][1] == min(kept, key=values.__getitem__)


def test_without_finished_scores_there_is_nothing_and_a_broken_file_is_named(make_run):
    run = make_run()
    run.config()
    run.ingest()
    assert read_scores(RunFiles(run.root)) is None
    run.score()
    part = run.root / "scores/rows/part-00001.parquet"
    part.write_bytes(b"PAR1 not really")
    with pytest.raises(ArtifactError, match=r"cannot read .*part-00001\.parquet"):
        read_scores(RunFiles(run.root))
    write_parquet(pa.table({"id": ["x"], "pharmacist": [1.0], "random_0": [1.0]}), part)
    assert read_scores(RunFiles(run.root)).columns["pharmacist"].all.sum() > BINS // 2
