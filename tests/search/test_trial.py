from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config.load import parse_config
from pharmacist_ray.config.schema import EarlyConfig
from pharmacist_ray.config.template import EXAMPLE
from pharmacist_ray.errors import DataError
from pharmacist_ray.pipeline.artifacts import Artifact
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.sharing import lock_missing, lock_missing_artifacts
from pharmacist_ray.search import trial as module
from pharmacist_ray.search.search import trials_table
from pharmacist_ray.search.space import trial_config
from pharmacist_ray.search.trial import measured, read_records, record_file, run_trial, write_record


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


class Stop(SystemExit):
    """What Ray Tune raises in a trial's process where it reports."""


def looks(monkeypatch: pytest.MonkeyPatch, base: Run, *, stop: bool, **early: Any) -> tuple[Run, list[Any], Any]:
    """Return a run with ASHA, the list of what was reported and looked at, and a report that may stop the trial."""
    search = base.config.search.model_copy(update={"early": EarlyConfig(**early), "scheduler": "asha"})
    made: list[Any] = []
    monkeypatch.setattr(module, "look", lambda run, search: made.append("look") or 0.4)

    def report(told: dict[str, Any]) -> None:
        made.append((told["early_hs"], told["looks"]))
        if stop:
            raise Stop

    return Run(base.config.model_copy(update={"search": search})), made, report


def test_a_trial_is_looked_at_before_its_attacks_and_may_end_there(base, monkeypatch):
    calls: list[str] = []
    stages(monkeypatch, calls)
    monkeypatch.setitem(module.STAGES, "attack", lambda run: calls.append("attack"))
    monkeypatch.setattr(module, "STAGES", {name: module.STAGES[name] for name in ("align", "attack", "evaluate")})
    run, made, report = looks(monkeypatch, base, stop=True)
    with pytest.raises(Stop):
        run_trial(run, {"selection.ratio": 0.2}, report=report)
    assert (calls, made) == (["align"], ["look", (0.4, 1)])
    (record,) = read_records(base.root)  # whoever stopped it writes that down
    assert (record["status"], record["early_hs"], record["early"]) == ("running", 0.4, {"attack": None, "prompts": 0.25})

    write_record(record_file(base.root, record["trial"]), record | {"status": "stopped"})
    run, made, report = looks(monkeypatch, base, stop=False)
    assert run_trial(run, {"selection.ratio": 0.2}, report=report) == {"trial": record["trial"], "early_hs": 0.4, "looks": 2}
    assert (calls, made) == (["align"], [(0.4, 1)])  # kept, and the scheduler is told of it
    assert read_records(base.root)[0]["status"] == "stopped"

    run, made, report = looks(monkeypatch, base, stop=False, prompts=0.5)  # another look, another chance
    assert run_trial(run, {"selection.ratio": 0.2}, report=report)["worst_hs"] == 0.3
    assert (calls, made) == (["align", "align", "attack", "evaluate 0.2"], ["look", (0.4, 1)])
    run, made, report = looks(monkeypatch, base, stop=True)
    with pytest.raises(Stop):
        run_trial(run, {"selection.ratio": 0.2}, report=report)
    assert (len(calls), made) == (4, ["look", (0.4, 1)])
    assert read_records(base.root)[0]["status"] == "finished"  # what has finished is not stopped


def test_without_a_scheduler_a_trial_that_was_stopped_goes_on(base, monkeypatch):
    calls: list[str] = []
    stages(monkeypatch, calls)
    run_trial(base, {"selection.ratio": 0.2})
    (record,) = read_records(base.root)
    early = {"attack": None, "prompts": 0.25}
    write_record(record_file(base.root, record["trial"]), record | {"status": "stopped", "early": early, "early_hs": 0.9})
    (base.root / "search" / "evaluation").rename(base.root / "search" / "old")
    assert run_trial(base, {"selection.ratio": 0.2})["worst_hs"] == 0.3
    assert len(calls) == 4
    assert read_records(base.root)[0]["status"] == "finished"


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
            with lock_missing_artifacts(run, artifact) as missing:
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
        with lock_missing(run, names, lambda name: base.root / "answers" / name, lambda name: name in made) as missing:
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
    with lock_missing_artifacts(base, artifact) as missing:
        assert missing == [artifact]
    assert not (base.root / "search").exists()
