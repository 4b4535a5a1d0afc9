"""What the page says of scores that are made of others; the rest of the section is tested with the page."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq

from pharmacist_ray.config.scoring import STANDS_FOR
from pharmacist_ray.curation.select import Rule, write_selection
from pharmacist_ray.report.blocks import Note, Table
from pharmacist_ray.report.run_files import RunFiles
from pharmacist_ray.report.scores import read_scores
from pharmacist_ray.report.selection import distributions
from pharmacist_ray.storage import write_parquet, write_text


def test_a_list_of_scores_says_what_it_is_made_of_and_what_it_kept_by_category(make_run):
    run = make_run()
    run.config(selection={"scorer": ["pharmacist", "random_0"], "ratio": 0.4})
    run.ingest()
    run.score()
    rule = Rule("pharmacist-random_0", ratio=0.4, weights={"pharmacist": 1.0, "random_0": 2.0})
    place = "selections/pharmacist-random_0"
    write_selection(run.root / "ingest" / "candidates", run.root / "scores" / "rows", rule, run.root / place, provenance={})
    run.manifest(place, scores="f-scores")
    files = RunFiles(run.root)
    first, categories, *_ = distributions(files, read_scores(files))
    assert first == Note(
        "The main selection ranks by pharmacist-random_0, which is made of the sum of ranks by pharmacist (weight 1), "
        "random_0 (weight 2)."
    )
    assert isinstance(categories, Table)
    assert categories.caption == "Kept by category"


def test_a_calibrated_selection_shows_what_planted_rows_say_of_it(make_run):
    run = make_run()
    run.config(selection={"scorer": "calibrated", "ratio": 0.4})
    run.ingest()
    run.score()

    def interval(estimate: float) -> dict[str, float]:
        return {"estimate": estimate, "low": estimate - 0.1, "high": estimate + 0.1}

    calibration = {
        "scores": {"pharmacist": 2.5}, "level": 0.95, "warnings": ["no score tells planted garbled rows from good ones"],
        "kept": {"garbled": {"planted": 10, "kept": 2} | interval(0.2), "good": {"planted": 10, "kept": 9} | interval(0.9)},
        "auroc": {"calibrated": {"garbled": interval(0.5)}, "pharmacist": {"garbled": interval(0.55)}},
    }  # fmt: skip
    write_text(json.dumps({"fingerprint": "f", "calibration": calibration}), run.root / "selections/calibrated/manifest.json")
    files = RunFiles(run.root)
    note, warning, kept, areas, *_ = distributions(files, read_scores(files))
    assert note == Note("The main selection ranks by calibrated, which is made of the ranks by pharmacist (slope 2.50).")
    assert warning == Note("no score tells planted garbled rows from good ones", warning=True)
    assert isinstance(kept, Table)
    assert "Estimated with 95% intervals" in kept.caption
    assert kept.rows == [("good", "10", "9", "0.90 [0.80, 1.00]"), ("garbled", "10", "2", "0.20 [0.10, 0.30]")]
    assert isinstance(areas, Table)
    assert areas.header == ("score", "garbled")
    assert areas.rows == [("calibrated", "0.50 [0.40, 0.60]"), ("pharmacist", "0.55 [0.45, 0.65]")]


def test_a_cascade_says_what_the_model_saw_and_what_is_lost(make_run):
    run = make_run()
    run.ingest()
    run.score()
    one = {"wanted": 400, "members": 60, "missed": 1, "estimate": 0.014, "low": 0.0, "high": 0.071, "enough": True}
    arms = {"pharmacist": one, "loss_gap": one | {"missed": 0, "estimate": 0.0, "enough": False}}
    facts = {"candidates": 1000, "sampled": 150, "seen": 590, "miss": 0.02, "level": 0.95, "arms": arms}
    for file in (run.root / "scores" / "rows").glob("*.parquet"):
        table = pq.read_table(file)
        write_parquet(table.append_column(STANDS_FOR, pa.array([1.0] * len(table))), file)
    run.manifest("scores", {"cascade": facts})
    files = RunFiles(run.root)
    scores = read_scores(files)
    assert scores is not None
    assert STANDS_FOR not in scores.columns
    seen, few, lost, *_ = distributions(files, scores)
    assert seen == Note(
        "A proxy scored all 1,000 candidates, and the model 590 of them (59%): 150 drawn at random, and 440 more that stand high with the "
        "proxy. The others have no score that needs it, and no selection by one takes them."
    )
    assert few == Note(
        "The sample has too few of the top rows by loss_gap to leave any row out: raise scoring.proxy.sample.", warning=True
    )
    assert isinstance(lost, Table)
    assert lost.rows == [
        ("pharmacist", "400", "60", "1", "1.4% [0.0%, 7.1%]"),
        ("loss_gap", "400", "60", "0", "0.0% [0.0%, 7.1%]"),
    ]
