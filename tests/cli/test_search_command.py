from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pharmacist_ray.cli.app import main
from pharmacist_ray.config import Config
from pharmacist_ray.errors import PharmacistError, ResourceError
from pharmacist_ray.pipeline.revisions import revision
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import run_report
from pharmacist_ray.search import search


@pytest.fixture
def file(placed_example: dict[str, Any], tmp_path: Path) -> Path:
    values = placed_example | {"search": {"space": {"selection.ratio": [0.2, 0.4]}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, dict[str, Any]]]:
    """Return the list of searches that a test's commands would run."""
    calls: list[tuple[Config, dict[str, Any]]] = []
    monkeypatch.setattr(search, "run_search", lambda config, **more: calls.append((config, more)))
    return calls


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_the_command_passes_overrides_and_whether_to_go_on(file, asked, monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["pharmacist", "search", "-c", str(file), *flags, "search.space={seed: [1]}", "seed=4"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    ((config, more),) = asked
    assert (config.search.space, config.seed, more) == ({"seed": [1]}, 4, {"resume": bool(flags)})


def test_the_agreement_of_a_search_that_did_not_run_is_refused(file, model_folder, asked, monkeypatch, capsys):
    model = f"model={{path: {model_folder}, template: plain}}"
    monkeypatch.setattr(sys, "argv", ["pharmacist", "search", "-c", str(file), "--agreement", model])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 5
    assert capsys.readouterr().err == (
        "pharmacist: 0 trials of this search have finished, and ranks need 3; run `pharmacist search` first\n"
    )
    assert asked == []


def test_the_job_runs_the_search_of_its_configuration(file, asked, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["search", "--config", str(file), "search.concurrent=3"])
    runpy.run_module("jobs.search", run_name="__main__")
    assert asked[0][0].search.concurrent == 3

    def fail(config: Config) -> None:
        raise ResourceError("no room")

    monkeypatch.setattr(search, "run_search", fail)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("jobs.search", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().err) == (6, "pharmacist: no room\n")


def test_the_report_is_a_page_also_where_nothing_is_compared(file, capsys):
    from pharmacist_ray.config import load_config

    (file.parent / "run").mkdir()
    (file.parent / "run" / "config.yaml").write_text(file.read_text())
    for overrides in ([], ["evaluation=null", "search=null"]):
        run = Run(load_config(file, overrides))
        run_report(run)
        out = capsys.readouterr().out
        assert "nothing is compared yet" in out
        assert f"report: {run.root}/report/report.html" in out
        (run.root / "report" / "report.html").unlink()
    run = Run(load_config(file))
    run.evaluated.folder.mkdir()
    made = {"fingerprint": "of other inputs", "revision": revision("evaluate")}
    (run.evaluated.folder / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(PharmacistError, match="evaluation was made with other settings or inputs"):
        run_report(run)
