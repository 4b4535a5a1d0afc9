"""What was done is known at once the next time, and whatever may have changed is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pharmacist_ray.config import load_config
from pharmacist_ray.data.schema import Row
from pharmacist_ray.pipeline import standing
from pharmacist_ray.pipeline.session import run_stage, run_stages
from pharmacist_ray.pipeline.standing import stands
from tests.search.test_search import write_config


@pytest.fixture(scope="module")
def file(
    ray_local: None, model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the configuration of a finished run."""
    file = write_config(tmp_path_factory.mktemp("standing"), model_folder, rows_of)
    values = yaml.safe_load(file.read_text())
    values["attacks"] = values["attacks"][:1]
    values["scoring"]["scorers"] = ["random"]
    values["selection"]["scorer"] = "random"
    values["comparison"] = {"selections": ["all"], "seeds": [3]}
    file.write_text(yaml.safe_dump(values))
    run_stage("run", load_config(file))
    return file


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    capsys.readouterr()
    return lambda: capsys.readouterr().out


def test_a_command_with_nothing_to_do_loads_neither_torch_nor_ray_and_prints_the_comparison(file: Path) -> None:
    program = (
        "import atexit, sys\n"
        "from pharmacist_ray.cli.app import main\n"
        "atexit.register(lambda: print([name for name in ('torch', 'ray', 'transformers', 'matplotlib') if name in sys.modules]))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "run", "--config", file], capture_output=True, text=True, check=False, env=os.environ
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"run directory: {file.parent / 'run'}"
    assert lines[1] == "ingest, fit, score, select, align, attack, evaluate: there already"
    assert "│ all" in done.stdout
    assert lines[-2] == f"  report: {file.parent / 'run' / 'report' / 'report.html'}"
    assert lines[-1] == "[]"


def test_a_job_of_several_stages_with_nothing_to_do_says_so_as_soon(file: Path) -> None:
    stages = ("ingest", "fit", "score", "select")
    run_stages(stages, load_config(file))
    program = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print([name for name in ('torch', 'ray', 'transformers', 'matplotlib') if name in sys.modules]))\n"
        "runpy.run_module('jobs.curate', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", file], capture_output=True, text=True, check=False, env=os.environ
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"run directory: {file.parent / 'run'}",
        "ingest, fit, score, select: there already",
        f"  {file.parent / 'run' / 'selections' / 'random_0'}",
        f"  {file.parent / 'run' / 'selections' / 'all'}",
        "[]",
    ]
    assert not stands(("ingest", "fit"), load_config(file))  # nobody has asked for these


def test_it_stands_until_something_changes_and_again_when_that_is_back(file: Path, said: Callable[[], str]) -> None:
    config = load_config(file)
    assert stands(("run",), config)
    rows = file.parent / "alignment.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("w", "v", 1))
    assert not stands(("run",), config)
    rows.write_text(before)
    said()
    assert stands(("run",), config)
    assert "there already" in said()
    for changed in (["selection.ratio=0.25"], ["evaluation.bootstrap_draws=60"], ["comparison.seeds=[4]"]):
        assert not stands(("run",), load_config(file, changed))
    assert not stands(("score",), config)  # nobody has asked for that by itself


@pytest.mark.parametrize("gone", ["scores/manifest.json", "evaluation/manifest.json", "report/report.html", "standing/run.json"])
def test_what_is_gone_is_noticed(file: Path, gone: str) -> None:
    place = file.parent / "run" / gone
    text = place.read_text()
    place.unlink()
    try:
        assert not stands(("run",), load_config(file))
    finally:
        place.write_text(text)
    assert stands(("run",), load_config(file))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 1}', '{"settings": "x", "files": [], "stages": 2}'])
def test_a_broken_record_is_none(file: Path, text: str) -> None:
    place = file.parent / "run" / "standing" / "run.json"
    before = place.read_text()
    place.write_text(text)
    try:
        assert not stands(("run",), load_config(file))
    finally:
        place.write_text(before)


def test_another_version_and_another_revision_look_for_themselves(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "__version__", "9.9.9")
    assert not stands(("run",), load_config(file))
    monkeypatch.undo()
    monkeypatch.setitem(standing.REASONS, "score", ["rows are scored better"])
    assert not stands(("run",), load_config(file))


def test_a_run_with_other_settings_in_between_is_noticed_and_the_configuration_that_stands_is_written_down(
    file: Path, said: Callable[[], str]
) -> None:
    written = file.parent / "run" / "config.yaml"
    before = written.read_text()
    run_stage("select", load_config(file, ["selection.ratio=0.25"]))
    assert "ratio: 0.25" in written.read_text()
    assert stands(("select",), load_config(file, ["selection.ratio=0.25"]))
    assert f"  {file.parent / 'run' / 'selections'}" in said()
    run_stage("run", load_config(file))
    assert not stands(("select",), load_config(file, ["selection.ratio=0.25"]))  # its place has been taken
    run_stage("ingest", load_config(file, ["evaluation.bootstrap_draws=60"]))
    assert "bootstrap_draws: 60" in written.read_text()
    assert stands(("run",), load_config(file))
    assert written.read_text() == before


def test_nothing_is_claimed_of_plug_ins_whose_code_may_change(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_longest.py").write_text(
        "from pharmacist_ray.curation.scorers import Scorer\n"
        "import numpy as np\n"
        "longest = Scorer(lambda signals: np.array([float(len(row.response)) for row in signals.rows]))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config(
        file, [f"run_dir={tmp_path / 'run'}", "scoring.scorers=[my_longest:longest]", "selection.scorer=my_longest:longest"]
    )
    run_stage("ingest", config)
    assert not (tmp_path / "run" / "standing").exists()
    assert json.loads((file.parent / "run" / "standing" / "run.json").read_text())["stages"].keys() >= {"ingest", "score"}
