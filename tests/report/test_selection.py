"""What the page says of scores that are made of others; the rest of the section is tested with the page."""

from __future__ import annotations

import json

from pharmacist_ray.curation.select import Rule, write_selection
from pharmacist_ray.report.blocks import Note, Table
from pharmacist_ray.report.run_files import RunFiles
from pharmacist_ray.report.scores import read_scores
from pharmacist_ray.report.selection import distributions
from pharmacist_ray.storage import write_text


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
