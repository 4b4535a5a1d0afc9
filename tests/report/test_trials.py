from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pharmacist_ray.report.blocks import Code, Figure, Note, Table
from pharmacist_ray.report.run_files import RunFiles
from pharmacist_ray.report.trials import SHOWN, search
from pharmacist_ray.storage import write_parquet


@pytest.fixture
def made(make_run):
    run = make_run()
    run.config()
    run.search()
    return run


def of(kind, run):
    return [block for block in search(RunFiles(run.root)) if isinstance(block, kind)]


def test_counts_and_recommendation_come_first(made):
    notes = [note.text for note in of(Note, made)]
    assert notes[0].startswith("24 trials: 21 finished, 3 failed, 3 on the Pareto front")
    assert notes[1].startswith("Recommended: trial t01. lowest harmful score")
    assert of(Code, made)[0].text == "pharmacist run --config search/t01.yaml"


def test_there_is_a_panel_for_each_number_that_was_varied_and_one_for_the_front(made):
    against, front = of(Figure, made)
    assert [plot.numbers.header[1] for plot in against.plots] == ["selection.ratio", "selector.intensity"]
    assert against.plots[0].words == "21 trials: lowest worst harmful score 0.2 at selection.ratio = 0.2."
    assert against.plots[1].words == "21 trials: lowest worst harmful score 0.2 at selector.intensity = 1."
    assert len(front.plots) == 1
    assert "trial t00 with worst harmful score 0.2 and task accuracy 0.9" in str(front.plots[0].svg)
    assert all("recommended" in str(plot.svg) for plot in (*against.plots, *front.plots))


def test_the_table_has_the_front_first_then_the_best(made):
    finished, failed = of(Table, made)
    assert [row[0] for row in finished.rows[:3]] == ["t00 (front)", "t01 (front)", "t02 (front)"]
    worst = [float(row[4].split()[0]) for row in finished.rows[3:]]
    assert worst == sorted(worst)
    assert dict(zip(finished.header, finished.rows[0], strict=True)) == {
        "trial": "t00 (front)", "selection.ratio": "0.2", "selector.intensity": "1.0", "alignment.objective": "vaccine",
        "worst HS": "0.20 [0.15, 0.25]", "mean HS": "0.1", "task accuracy": "0.90 [0.85, 0.95]",
        "over-refusal": "0.05 [0.00, 0.10]", "align s": "3.5", "HS by attack": "strong 0.2",
    }  # fmt: skip
    assert [row[0] for row in failed.rows] == ["t07", "t15", "t23"]
    assert failed.rows[0][1] == "boom "


def test_many_trials_are_counted_and_not_all_listed(make_run):
    run = make_run()
    run.config()
    run.search(200)
    finished, _ = of(Table, run)
    assert len(finished.rows) == SHOWN
    assert finished.caption.endswith(f"{SHOWN} of 175")


def test_a_parameter_that_all_share_or_that_is_no_number_has_no_panel(made):
    file = made.root / "search" / "trials.parquet"
    table = pq.read_table(file)
    table = table.set_column(table.schema.names.index("param.selection.ratio"), "param.selection.ratio", pa.array(["0.4"] * 24))
    write_parquet(table.append_column("param.flag", pa.array(["true", "false"] * 12)), file)
    against, _ = of(Figure, made)
    assert [plot.numbers.header[1] for plot in against.plots] == ["selector.intensity"]
    assert "selection.ratio" not in of(Table, made)[0].header
    assert "flag" in of(Table, made)[0].header


def test_stopped_trials_are_counted_and_listed_with_their_early_look_and_nowhere_else(made):
    file = made.root / "search" / "trials.parquet"
    rows = pq.read_table(file).to_pylist()
    for number, row in enumerate(rows):
        row["early_hs"] = 0.9 - number / 100 if number in (4, 5) else None
        if row["early_hs"]:
            row |= {"status": "stopped", "worst_hs": None, "task_accuracy": None, "mean_hs": None, "front": False}
    write_parquet(pa.Table.from_pylist(rows), file)
    assert of(Note, made)[0].text.startswith("24 trials: 19 finished, 3 failed, 2 stopped early, 3 on the Pareto front")
    finished, stopped, failed = of(Table, made)
    assert stopped.header == ["trial", "selection.ratio", "selector.intensity", "alignment.objective", "early HS"]
    assert stopped.rows == [["t05", "0.4", "0.01", "sft", "0.85"], ["t04", "0.2", "0.1", "vaccine", "0.86"]]
    assert not {"t04", "t05"} & {row[0] for table in (finished, failed) for row in table.rows}


@pytest.mark.parametrize("keep", ["failed", "none"])
def test_a_search_without_a_finished_trial_has_no_figure(made, keep):
    file = made.root / "search" / "trials.parquet"
    rows = [row for row in pq.read_table(file).to_pylist() if row["status"] == keep]
    write_parquet(pa.Table.from_pylist(rows, schema=pq.read_schema(file)), file)
    (made.root / "search" / "recommendation.json").unlink()
    assert of(Figure, made) == []
    assert of(Note, made)[0].text.startswith(f"{len(rows)} trials: 0 finished")


def test_without_a_search_there_is_nothing(make_run):
    run = make_run()
    run.config()
    assert search(RunFiles(run.root)) == []
