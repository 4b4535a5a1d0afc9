from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest

from pharmacist_ray.cli import submit as module
from pharmacist_ray.cli.submit import check_paths, environment, pack, reached_by_all, resources, runtime_env, submit
from pharmacist_ray.config.load import load_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.config.template import EXAMPLE, template
from pharmacist_ray.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Any]:
    """Return a maker of `init`'s configuration with absolute paths: config("model.path=x")."""
    (tmp_path / "run.yaml").write_text(template())
    names = ("data.candidates", "data.validation", "data.harmful", "data.benign", "attacks.0.task", "attacks.0.harmful")
    names += ("evaluation.harmful_prompts", "evaluation.benign_prompts", "evaluation.task.source")
    paths = [f"{name}.path=/data/rows.jsonl" for name in names]
    return lambda *overrides: load_config(tmp_path / "run.yaml", ["run_dir=/runs/x", *paths, *overrides])


def test_paths_that_mean_the_same_everywhere_pass(config):
    check_paths(config("model.path=org/name", "data.benign.path=[s3://bucket/a.jsonl, hf:org/set, hf:/data/set]"))
    check_paths(config("evaluation.judge_path=/judge"))


def test_many_such_paths_are_counted():
    with pytest.raises(
        ConfigError, match=r"^run_dir=runs/first, data\.candidates\.path=.*, data\.validation\.path=\S+ and 7 more are relative"
    ):
        check_paths(Config.model_validate(EXAMPLE))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run_dir=runs/x", "run_dir=runs/x"),
        ("data.candidates.path=[/a.jsonl, b.jsonl]", "data.candidates.path=b.jsonl"),
        ("alignment.harmful={path: ~/a.jsonl}", "alignment.harmful.path=~/a.jsonl"),
        ("attacks.0.harmful.path=a/*.parquet", "attacks.0.harmful.path=a/*.parquet"),
        ("evaluation.task.source.path=hf:./mine", "evaluation.task.source.path=hf:./mine"),
        ("model.path=./base", "model.path=./base"),
        ("model.path=base", "model.path=base"),
        ("evaluation.judge_path=world.json", "evaluation.judge_path=world.json"),
        ("evaluation.judge={kind: generative, path: ./base}", "evaluation.judge.path=./base"),
        (
            "evaluation.judge=[phrases, {kind: generative, path: org/name, template_file: a.yaml}]",
            "evaluation.judge.1.template_file=a.yaml",
        ),
        ("evaluation.lm_eval={tasks: [mine], include: tasks}", "evaluation.lm_eval.include=tasks"),
    ],
)
def test_a_path_that_means_something_else_in_a_job_is_named(config, override, named, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "world.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        check_paths(config(override))
    assert str(error.value).startswith(f"{named} is relative, but a job starts in a temporary copy of its working directory")


def test_local_paths_are_what_every_node_has_to_reach(config):
    found = reached_by_all(config("model.path=org/name", "data.benign.path=[s3://bucket/a.jsonl, hf:org/set, hf:/data/set]"))
    assert found == ["/data/rows.jsonl", "/data/set", "/runs/x"]


def test_what_a_jobs_process_takes_is_an_amount_above_nothing():
    assert resources(["GPU=1", "memory=2e9", "big=0.5"]) == {"GPU": 1.0, "memory": 2e9, "big": 0.5}
    for wrong in ("GPU", "GPU=", "GPU=some", "GPU=0", "=1", "CPU=2"):
        with pytest.raises(ConfigError, match=rf"^--resource {wrong}: it takes NAME=AMOUNT"):
            resources([wrong])


def test_a_runtime_environment_comes_from_a_file_and_leaves_the_working_directory_to_us(tmp_path):
    file = tmp_path / "env.yaml"
    for text, message in (
        ("[a]", "is no runtime environment"),
        ("env_vars: [a]", "is no runtime environment"),
        ("working_dir: .", "has working_dir, with which the configuration would not travel; give --working-dir"),
        ("{", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"^--runtime-env {file} {message}"):
            runtime_env(file)
    file.write_text("pip: [numpy]\nenv_vars: {A: file, B: file}\n")
    sent: dict[str, Any] = {}
    client = SimpleNamespace(get_address=lambda: "http://head:8265", submit_job=lambda **given: sent.update(given) or "id")
    submit(
        client, "benchmark", env={"A": "line"}, runtime=runtime_env(file), cpus=2, takes={"GPU": 1.0, "memory": 1e9, "big": 1.0}
    )
    assert sent["runtime_env"] == {"pip": ["numpy"], "env_vars": {"A": "line", "B": "file"}}
    taken = {name: sent[f"entrypoint_{name}"] for name in ("num_cpus", "num_gpus", "memory", "resources")}
    assert taken == {"num_cpus": 2, "num_gpus": 1.0, "memory": 1_000_000_000, "resources": {"big": 1.0}}


def test_variables_come_from_the_line_or_from_here(monkeypatch):
    monkeypatch.setenv("HERE", "a=b")
    assert environment(["HERE", "GIVEN=c=d", "EMPTY="]) == {"HERE": "a=b", "GIVEN": "c=d", "EMPTY": ""}


def test_a_variable_that_is_wrong_is_never_quoted(monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ConfigError, match="--env NOWHERE: NOWHERE is not set here; export it, or write NOWHERE=VALUE"):
        environment(["NOWHERE"])
    with pytest.raises(ConfigError, match=r"the 2\. given is neither") as error:
        environment(["A=1", "hunter-2"])
    assert "hunter" not in str(error.value)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder as a developer has it."""
    folder = tmp_path / "checkout"
    for name in ("jobs/curate.py", "data/big.bin", "deep/keep.txt", "deep/drop.log", "deep/inner/drop.log", ".git/HEAD", ".venv/x",
                 "runs/demo/rows", "a/__pycache__/b.pyc", ".ruff_cache/0", ".env", "secret.txt", "notes.tmp"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("*.tmp\n/secret.txt\n")
    (folder / ".rayignore").write_text("data/\n")
    (folder / "deep" / ".rayignore").write_text("*.log\n")
    return folder


def names(package: Path) -> list[str]:
    with ZipFile(package) as archive:
        return sorted(name for name in archive.namelist() if "ignore" not in name)


def test_what_travels_is_what_no_list_names_and_the_configuration_from_wherever_it_lies(checkout, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("seed: 1\n")
    pack(tmp_path / "job.zip", config, checkout)
    assert names(tmp_path / "job.zip") == [".submitted/run.yaml", "deep/keep.txt", "jobs/curate.py"]
    with ZipFile(tmp_path / "job.zip") as archive:
        assert archive.read(".submitted/run.yaml") == b"seed: 1\n"
    pack(tmp_path / "alone.zip", config, None)
    assert names(tmp_path / "alone.zip") == [".submitted/run.yaml"]


def test_a_rayignore_takes_back_what_is_left_out_by_itself(checkout, tmp_path):
    (checkout / ".rayignore").write_text("data/\n!runs/\n")
    pack(tmp_path / "job.zip", None, checkout)
    assert "runs/demo/rows" in names(tmp_path / "job.zip")


def test_equal_folders_are_equal_packages(checkout, tmp_path):
    pack(tmp_path / "one.zip", None, checkout)
    (checkout / "deep" / "keep.txt").touch()
    pack(tmp_path / "two.zip", None, checkout)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_a_folder_that_is_too_large_is_named_with_its_largest_parts(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE_LIMIT", 2 << 20)
    noise = bytes(b for n in range(1 << 20) for b in (n * n % 251, n % 241, n * 7 % 239))
    (checkout / "models").mkdir()
    for number in range(40):
        (checkout / "models" / f"{number}.bin").write_bytes(noise[number:])
    with pytest.raises(
        ConfigError, match=r"packs to more than 2 MiB, .*; largest: models/ \(120 MiB\), .*; name what is not needed"
    ):
        pack(tmp_path / "job.zip", None, checkout)
    with pytest.raises(ConfigError, match="is not a folder"):
        pack(tmp_path / "job.zip", None, checkout / "nowhere")


@pytest.mark.parametrize(
    ("job", "id", "message"), [("curat", None, "did you mean 'curate'"), ("curate", "../x", "--id ../x: an id is")]
)
def test_a_job_that_cannot_be_is_known_at_once(job, id, message):
    with pytest.raises(ConfigError, match=message):
        submit(SimpleNamespace(), job, id=id)  # type: ignore[arg-type]
