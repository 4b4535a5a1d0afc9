"""When a run starts Ray, and what is heard of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from pharmacist_ray.config import load_config
from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.curation import ingest
from pharmacist_ray.data.schema import Row
from pharmacist_ray.pipeline import session
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.runtime import private_ray

TRAIN = {"steps": 1, "batch_size": 4}


@pytest.fixture
def file(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path) -> Path:
    """Return a configuration over a few rows that needs no process besides the stage's own."""
    data = {}
    for seed, name in enumerate(("candidates", "validation", "harmful")):
        rows = rows_of(12, seed=seed)
        data[name] = {"path": str(tmp_path / f"{name}.jsonl")}
        lines = (json.dumps({"prompt": row.prompt, "response": row.response}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model_folder), "template": "plain", "max_length": 32},
        "data": data,
        "resources": {"workers": 0, "actors": 0},
        "selector": {"warmup": TRAIN, "checkpoints": [1], "reference": None, "batch_size": 4},
        "scoring": {"scorers": ["pharmacist", "random"]},
        "alignment": {"train": TRAIN},
        "comparison": {"selections": ["pharmacist"], "seeds": [0]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[ResourcesConfig]:
    """Return the list of times that a stage connected to Ray."""
    seen: list[ResourcesConfig] = []
    connected = session.connected

    @contextmanager
    def counted(resources: ResourcesConfig) -> Iterator[None]:
        seen.append(resources)
        with connected(resources):
            yield

    monkeypatch.setattr(session, "connected", counted)
    return seen


@pytest.mark.usefixtures("ray_local")
def test_ray_is_started_only_for_what_other_processes_have_to_make(file, starts):
    config = load_config(file)
    stages = ("ingest", "fit", "score", "select", "align", "attack", "report")
    session.run_stage("ingest", config)
    assert starts == []
    processes = config.model_copy(update={"resources": ResourcesConfig(workers=1, actors=1)})
    assert [name for name in stages if session.needs_ray(Run(processes), name)] == ["fit", "score", "align"]
    for stage in ("ingest", "fit", "score", "select", "align", "report"):
        session.run_stage(stage, config)
    session.run_stage("run", config)
    assert starts == []
    # All is there, whoever made it.
    assert [name for name in stages if session.needs_ray(Run(processes), name)] == []


@pytest.mark.usefixtures("ray_local")
def test_large_sources_are_ingested_over_one_ray(file, starts, monkeypatch):
    monkeypatch.setattr(ingest, "SMALL_BYTES", 0)
    session.run_stage("ingest", load_config(file))
    assert len(starts) == 3  # candidates, validation, harmful: the later ones find it


def test_a_command_imports_only_what_it_uses_itself():
    """What trains and scores takes seconds to import, and other processes do that."""
    heavy = ["peft", "deepspeed", "matplotlib", "bitsandbytes", "accelerate", "transformers.modeling_utils"]
    code = f"import sys, pharmacist_ray.pipeline.session; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_private_ray_says_nothing_of_its_own_on_the_screen(file):
    code = "from pharmacist_ray.curation import ingest; ingest.SMALL_BYTES = 0; from pharmacist_ray.cli.app import main; main()"
    variables = {"PYTHONPATH": os.getcwd(), "PHARMACIST_OBJECT_STORE_BYTES": str(80 << 20)}
    command = [sys.executable, "-c", code, "ingest", "-c", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert (done.returncode, done.stderr) == (0, "")
    assert "log level" not in done.stdout
    assert "candidates: 12 rows in" in done.stdout


def test_what_else_is_written_meanwhile_is_passed_on(capfd):
    with private_ray._without_log_level_line():
        os.write(2, b"[x I 1 1] logging.cc:303: Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3\n")
        os.write(2, b"something happened\n")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "something happened\nafterwards\n"
