from __future__ import annotations

import json

import numpy as np
import pytest

from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.report.blocks import brief
from pharmacist_ray.report.run_files import RunFiles
from pharmacist_ray.report.training import _NAME, training
from pharmacist_ray.storage import write_text


@pytest.fixture
def made(make_run):
    run = make_run()
    run.config()
    for arm in ("all", "random_0", "random_1", "pharmacist"):
        run.manifest(f"selections/{arm}")
    run.train()
    return run


def figures(run):
    return {block.numbers.caption: block for block in training(RunFiles(run.root))}


def test_every_kind_of_training_has_a_figure_of_two_panels(made):
    found = figures(made)
    assert [caption.partition(":")[0] for caption in found] == [
        "Warm-up of the selector", "The loss gap's reference", "Alignment", "Attack strong",
    ]  # fmt: skip
    assert all(len(block.plots) == 2 for block in found.values())
    assert "one run" in found["Warm-up of the selector: means over runs"].caption
    assert "8 runs" in found["Alignment: means over runs"].caption


def test_lines_are_means_over_runs_of_an_arm_and_draws_are_one_arm(made):
    table = figures(made)["Alignment: means over runs"].numbers
    assert list(table.header) == [
        "steps", *(f"{arm}, {metric}" for metric in ("loss", "gradient norm") for arm in ("pharmacist", "all", "random")),
    ]  # fmt: skip
    assert len(table.rows) == 30
    for place, row in ((0, table.rows[0]), (1, table.rows[1]), (29, table.rows[-1])):
        steps = [2 * place + 1, 2 * place + 2]
        loss = np.mean([np.mean([start / step for step in steps]) for start in (2.0, 3.0)])
        assert row[0] == f"{steps[0]}–{steps[1]}"
        assert row[1] == row[2] == row[3] == f"{loss:.3g}"
        assert row[4] == "2.5"  # the step without a finite norm is left out, not taken as 0


@pytest.mark.parametrize(("steps", "rows", "last"), [(1, 1, "1"), (40, 40, "40"), (100, 34, "100"), (101, 34, "100–101")])
def test_a_line_ends_at_the_last_step(made, steps, rows, last):
    made.history(made.root / "fit" / "warmup", steps=steps)
    table = figures(made)["Warm-up of the selector: means over runs"].numbers
    assert (len(table.rows), table.rows[-1][0]) == (rows, last)


def test_of_several_models_of_a_name_the_one_with_the_runs_settings_is_shown_else_the_newest(made):
    for name, day, steps, selection in (
        ("ffffffff", "2025-01-01", 1, "f-selections/all"), ("eeeeeeee", "2027-01-01", 2, "f-selections/all"),
        ("dddddddd", "2029-01-01", 7, "f-selections/of-last-week"),
    ):  # fmt: skip
        made.model("align", f"all.sft.s0-{name}", 50.0 * steps, selection=selection)
        file = made.root / "align" / f"all.sft.s0-{name}" / "manifest.json"
        settings = {"made_at": day, "config": {"alignment": {"train": {"steps": steps}}}}
        write_text(json.dumps(json.loads(file.read_text()) | settings), file)

    def first_loss():
        table = figures(made)["Alignment: means over runs"].numbers
        return dict(zip(table.header, table.rows[0], strict=True))["all, loss"]

    assert first_loss() == brief((100.0 + 3.0) * 0.75 / 2)  # the newest of the current selection: steps 1 and 2 of 100 / step
    made.config(alignment={"train": {"steps": 1}})
    assert first_loss() == brief((50.0 + 3.0) * 0.75 / 2)
    made.manifest("selections/all")
    manifest = json.loads((made.root / "selections/all/manifest.json").read_text())
    write_text(json.dumps(manifest | {"fingerprint": "f-newer"}), made.root / "selections/all/manifest.json")
    found = figures(made)
    assert "all, loss" not in found["Alignment: means over runs"].numbers.header
    assert "all, loss" not in found["Attack strong: means over runs"].numbers.header


def test_defences_are_told_apart_and_older_names_have_none(made):
    made.model("align", "pharmacist.vaccine.s0-0123abcd", 2.0, selection="f-selections/pharmacist")
    assert figures(made)["Alignment: means over runs"].numbers.header[1:3] == [
        "pharmacist · sft, loss",
        "pharmacist · vaccine, loss",
    ]
    for text, arm, defence, attack in (
        ("all.s0", "all", None, None), ("all.s10.lr3e-4", "all", None, "lr3e-4"), ("loss_gap.sft.s0.s1", "loss_gap", "sft", "s1"),
    ):  # fmt: skip
        parts = _NAME.fullmatch(text)
        assert (parts["arm"], parts["defence"], parts["attack"]) == (arm, defence, attack)


def test_a_model_that_is_not_finished_and_a_run_without_any_are_nothing(make_run):
    run = make_run()
    run.config()
    run.manifest("selections/all")
    run.history(run.root / "align" / "all.s0-0123abcd" / "run")
    assert training(RunFiles(run.root)) == []


def test_a_broken_history_is_named(made):
    file = made.root / "fit" / "warmup" / "history.jsonl"
    file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with pytest.raises(ArtifactError, match=r"cannot read .*warmup/history\.jsonl"):
        training(RunFiles(made.root))
