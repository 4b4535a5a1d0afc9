from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pharmacist_ray.config import Config
from pharmacist_ray.errors import TrainingError
from pharmacist_ray.pipeline import session
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import STAGES


@pytest.fixture
def file(placed_example: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(placed_example))
    return tmp_path / "run.yaml"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config]]:
    """Return the list of (stage, configuration) that the jobs of a test would run."""
    calls: list[tuple[str, Config]] = []

    def run_stages(stages: Sequence[str], config: Config) -> Run:
        calls.extend((stage, config) for stage in stages)
        return Run(config)

    monkeypatch.setattr(session, "run_stages", run_stages)
    return calls


def job(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_module(f"jobs.{name}", run_name="__main__")


def test_help_works_where_a_job_would_ask_for_it():
    done = subprocess.run([sys.executable, "-m", "jobs.curate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Ingest, fit, score and select: the curated subset." in done.stdout
    assert "--config" in done.stdout
    assert "KEY=VALUE" in done.stdout


def test_the_jobs_together_are_all_stages_in_order(ran, file, monkeypatch):
    for name in ("curate", "align", "evaluate"):
        job(monkeypatch, name, "--config", file, "seed=4", "selection.ratio=0.2")
    assert [stage for stage, _ in ran] == list(STAGES)
    assert {(config.seed, config.selection.ratio) for _, config in ran} == {(4, 0.2)}


def test_one_job_is_all_that_the_command_run_does(ran, file, monkeypatch):
    job(monkeypatch, "run", "--config", file, "seed=4")
    assert [(stage, config.seed) for stage, config in ran] == [("run", 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selection.ratoi=1"], "unknown key 'selection.ratoi' (did you mean 'ratio'?)"),
        (["run_dir=runs/x"], "run_dir=runs/x is relative, but a job starts in a temporary copy of its working directory"),
        (
            ["data.harmful.path=[s3://b/a.jsonl, b.jsonl]", "attacks.0.task.path=~/c"],
            "data.harmful.path=b.jsonl, attacks.0.task.path=~/c are relative",
        ),
    ],
)
def test_a_mistake_is_one_line_and_its_code(ran, file, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        job(monkeypatch, "curate", "--config", file, *arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith("pharmacist: ")
    assert message in err
    assert err.count("\n") == 1
    assert ran == []


def test_a_stage_that_fails_ends_the_job_with_its_code(file, monkeypatch, capsys):
    def fail(stages: Sequence[str], config: Config) -> None:
        raise TrainingError("the loss is nan\nat step 3")

    monkeypatch.setattr(session, "run_stages", fail)
    with pytest.raises(SystemExit) as ended:
        job(monkeypatch, "curate", "--config", file)
    assert ended.value.code == 7
    assert capsys.readouterr().err == "pharmacist: the loss is nan at step 3\n"


def test_alignment_says_where_each_model_lies(ran, file, monkeypatch, capsys):
    job(monkeypatch, "align", "--config", file, "comparison.seeds=[0, 1]", "comparison.selections=[all]")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["  all.sft.s0", "  all.sft.s1"]
    assert re.fullmatch(rf"  all\.sft\.s0: {file.parent}/run/align/all\.sft\.s0-[0-9a-f]{{8}}/run/adapter", lines[0])


def test_an_evaluation_without_its_section_ends_before_anything_is_attacked(file, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        job(monkeypatch, "evaluate", "--config", file, "evaluation=null", f"model.path={file.parent}")
    assert ended.value.code == 2
    assert capsys.readouterr() == (
        "", "pharmacist: there is no `evaluation` section in the configuration; `pharmacist init` shows one\n",
    )  # fmt: skip


def test_a_benchmark_writes_where_all_nodes_can_read(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        job(monkeypatch, "benchmark", "--out", "here")
    assert ended.value.code == 2
    assert "--out here is relative" in capsys.readouterr().err


@pytest.mark.slow
def test_a_benchmark_measures_on_a_worker(ray_local, monkeypatch, capsys, tmp_path):
    job(monkeypatch, "benchmark", "--objectives", "sft", "--rounds", 1, "--rows", 2, "--length", 8, "--out", tmp_path)
    costs = json.loads((tmp_path / "benchmark.json").read_text())["costs"]
    assert [(cost["objective"], cost["ratio"]) for cost in costs] == [("sft", 1.0)]
    assert "sft" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:  # and says so where there is none for it
        job(monkeypatch, "benchmark", "--device", "cuda")
    assert ended.value.code == 6
    assert "1 workers need 1 GPU but the cluster has 0" in capsys.readouterr().err


def test_a_job_without_a_configuration_says_how_to_give_one(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        job(monkeypatch, "evaluate")
    assert ended.value.code == 2
    assert "the following arguments are required: --config" in capsys.readouterr().err
