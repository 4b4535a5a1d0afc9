from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.template import EXAMPLE
from pharmacist_ray.errors import DataError
from pharmacist_ray.pipeline import trial as module
from pharmacist_ray.pipeline.artifacts import Artifact
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.search import trials_table
from pharmacist_ray.pipeline.sharing import alone, making
from pharmacist_ray.pipeline.space import trial_config
from pharmacist_ray.pipeline.trial import measured, read_records, record_file, run_trial


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Run:
    values = EXAMPLE | {"run_dir": str(tmp_path / "run"), "model": {"path": str(model_folder), "template": "plain"}}
    return Run(parse_config(values | {"search": {"space": {"selection.ratio": [0.2, 0.4]}}}, where="test"))


def row(attack: str | None, hs: float, accuracy: float, refusal: float | None) -> dict[str, Any]:
    def metric(value: float | None) -> dict[str, Any]:
        return {"estimate": value, "low": value and value - 0.1, "high": value and value + 0.2}

    numbers = {"harmful_score": metric(hs), "accuracy_correct": metric(accuracy), "over_refusal": metric(refusal)}
    return {"attack": attack, "align_seconds": 4.5, "metrics": numbers}


def test_a_trial_is_judged_by_its_attacks_worst_and_mean():
    found = measured(
        [row(None, 0.0, 0.1, 0.9), row("weak", 0.3, 0.9, 0.2), row("strong", 0.7, 0.5, 0.4), row("odd", 0.5, 0.7, 0.3)]
    )
    assert found["attacks"] == {"weak": 0.3, "strong": 0.7, "odd": 0.5}
    assert (found["worst_hs"], found["worst_hs_low"], found["worst_hs_high"]) == pytest.approx((0.7, 0.6, 0.9))
    assert (found["mean_hs"], found["mean_hs_low"], found["mean_hs_high"]) == pytest.approx((0.5, 0.4, 0.7))
    assert (found["task_accuracy"], found["over_refusal"]) == pytest.approx((0.7, 0.3))
    assert (found["task_accuracy_low"], found["over_refusal_high"]) == pytest.approx((0.6, 0.5))
    assert found["align_seconds"] == 4.5


def test_a_trial_without_a_number_has_failed():
    with pytest.raises(DataError, match="the evaluation has no over_refusal: no prompt of its kind was answered and judged"):
        measured([row("weak", 0.3, 0.9, None)])


def stages(monkeypatch: pytest.MonkeyPatch, calls: list[str], fail: Exception | None = None) -> None:
    """Put stages that only take note in the place of the real ones; the last one writes a table, or fails."""

    def last(run: Run) -> None:
        calls.append(f"evaluate {run.config.selection.ratio}")
        assert read_records(run.root)[-1]["stage"] == "evaluate"
        if fail:
            raise fail
        run.evaluated.folder.mkdir(parents=True)
        (run.evaluated.folder / "table.json").write_text(json.dumps([row("weak", 0.3, 0.9, 0.2)]))

    monkeypatch.setattr(module, "STAGES", {"align": lambda run: calls.append("align"), "evaluate": last, "report": None})
    monkeypatch.setattr(module, "connected", lambda resources: threading.Lock())


def test_a_finished_trial_answers_from_its_record(base, monkeypatch):
    calls: list[str] = []
    stages(monkeypatch, calls)
    first = run_trial(base, {"selection.ratio": 0.2})
    assert first == {"worst_hs": 0.3, "task_accuracy": 0.9, "over_refusal": 0.2, "align_seconds": 4.5}
    assert run_trial(base, {"selection.ratio": 0.2}) == first
    assert calls == ["align", "evaluate 0.2"]
    (record,) = read_records(base.root)
    assert (record["status"], record["parameters"]) == ("finished", {"selection.ratio": 0.2})
    other = base.config.model_copy(update={"seed": 9})  # other inputs: the record is of no use
    (base.root / "search" / "evaluation").rename(base.root / "search" / "old")
    run_trial(Run(other), {"selection.ratio": 0.2})
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("error", "text"),
    [(DataError("too few\nrows"), "too few rows"), (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero; see ")],
)
def test_a_failure_is_recorded_with_its_traceback_and_tried_again(base, monkeypatch, error, text):
    calls: list[str] = []
    stages(monkeypatch, calls, error)
    for _ in range(2):
        with pytest.raises(type(error)):
            run_trial(base, {"selection.ratio": 0.4})
    (record,) = read_records(base.root)
    assert record["status"] == "failed"
    assert record["error"].startswith(text)
    assert "Traceback" in record_file(base.root, record["trial"]).with_suffix(".log").read_text()
    assert len(calls) == 4
    table = trials_table([record], set()).to_pylist()[0]
    assert (table["status"], table["worst_hs"], table["front"], table["attacks"]) == ("failed", None, False, "{}")
    assert table["param.selection.ratio"] == "0.4"


def test_a_trial_that_is_stopped_from_outside_is_not_over(base, monkeypatch):
    stages(monkeypatch, [], KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_trial(base, {"selection.ratio": 0.4})
    assert [record["status"] for record in read_records(base.root)] == ["running"]


def test_what_two_trials_need_is_made_by_one_of_them(base):
    runs = [Run(trial_config(base.config, {}), base=base) for _ in range(2)]
    order: list[str] = []

    def make(run: Run, name: str) -> None:
        for stage in ("one", "two"):
            artifact = Artifact(base.root / "align" / stage, "align", {})
            with making(run, artifact) as missing:
                if missing:
                    artifact.begin()
                    order.append(f"{stage} begins")
                    time.sleep(0.2)
                    order.append(f"{stage} ends")
                    artifact.finish({})

    threads = [threading.Thread(target=make, args=(run, str(number))) for number, run in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert order == ["one begins", "one ends", "two begins", "two ends"]


def test_trials_that_need_the_same_things_in_another_order_do_not_wait_in_a_circle(base):
    runs = [Run(trial_config(base.config, {}), base=base) for _ in range(2)]
    made: list[str] = []

    def make(run: Run, names: list[str]) -> None:
        with alone(run, names, lambda name: base.root / "answers" / name, lambda name: name in made) as missing:
            time.sleep(0.2)
            made.extend(missing)

    wanted = (["a", "b", "c"], ["c", "b", "d", "a"])
    threads = [threading.Thread(target=make, args=(run, names), daemon=True) for run, names in zip(runs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert sorted(made) == ["a", "b", "c", "d"]


def test_a_plain_run_locks_nothing(base):
    artifact = Artifact(base.root / "fit", "fit", {})
    with making(base, artifact) as missing:
        assert missing == [artifact]
    assert not (base.root / "search").exists()
