"""What is said of a plan, and the file that it is written to."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pharmacist_ray.cli.plan import plan_run
from pharmacist_ray.config import load_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.cluster import parse_cluster
from pharmacist_ray.doctor.planner import changes_of, plan_for, show_plan
from pharmacist_ray.errors import ArtifactError, ConfigError, ResourceError
from tests.doctor.conftest import ALONE, FOLDER


@pytest.mark.parametrize("size", ["8b", "70b"])
def test_the_files_of_the_cluster_folder_say_what_the_planner_proposes(size: str, llama: Callable[..., Config]) -> None:
    text = (FOLDER / f"llama-3-{size}.yaml").read_text()
    (cluster,) = re.findall(rf"pharmacist doctor --config cluster/llama-3-{size}\.yaml --cluster (\S+)", text)
    _, _, _, layout = plan_for(llama(size), parse_cluster(cluster)[0])
    assert layout.problems == []
    assert changes_of(layout, llama(size)) == {}


def test_a_plan_says_what_fits_why_how_long_and_what_breaks(
    llama: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, said = parse_cluster("8xA100-40")
    show_plan(llama("8b"), cluster, rows=2e6, said=said)
    out = capsys.readouterr().out
    for line in (
        "cluster  1 node of 8 A100-40, 39.4 GiB each as PyTorch sees them, 95% planned with\n",
        "model    8,030,261,248 parameters in 32 layers, 15.0 GiB in bfloat16; the adapter has 20,971,520\n",
        "          selector.warmup               28.1 GiB  fits A100-40 (base weights 15.0 GiB, activations 9.0 GiB)\n",
        "          resources.workers                   8  of a training; they share its batches evenly (64 rows)\n",
        "          selector.warmup, alignment.train, selector.reference\n",
        "            accumulation                      4  with 1 it would take 60.4 GiB\n",
        "time     on 1x8xA100-40, ",
        "2,000,000 rows of 256 tokens, 1 × with gradients and 2 × without\n",
        "ingest and select take CPUs, whose number is not known: 0.11 and 0.0039 CPU hours\n",
        "network  groups of 8 GPUs exchange over NVLink, 210 GB/s each (its speed × 0.7)\n",
        "disk     every node reads the weights when a training or a stage starts: 15.0 GiB in 0.27 minutes at 1 GB/s (assumed)\n",
        "          memory: selector.warmup is the tightest, 28.1 of 37.4 GiB\n",
        "longer rows: at model.max_length=1024 selector.warmup would take 38.9 GiB; half of that still fits\n",
    ):
        assert line in out
    assert "between nodes" not in out
    assert "assumed: 1" not in out  # somebody said how many rows


def test_a_group_shows_what_its_gathers_cost(llama: Callable[..., Config], capsys: pytest.CaptureFixture[str]) -> None:
    layout = show_plan(llama("70b"), parse_cluster("16xH100")[0])
    out = capsys.readouterr().out
    assert f"gathers  score: a batch of 8,192 tokens on each of {layout.group} GPUs at ZeRO 3, over NVLink\n" in out
    assert "          gathering weights              1.01 s  3 gathers × 0.75 × 141.1e9 B / 315e9 B/s\n" in out
    assert "          gathers are 8% of a batch; at a quarter of its tokens they would be 26%\n" in out
    assert "            zero_stage                        3  with 0 it would take " in out
    assert "          ZeRO 3: every GPU of a training receives 115.0 GiB each time the weights are gathered\n" in out


def test_what_fits_nowhere_ends_with_an_error_after_all_that_is_known(
    llama: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ResourceError, match="score: no GPU of 1x4xL4 holds what it takes"):
        show_plan(llama("70b", *ALONE), parse_cluster("4xL4")[0])
    out = capsys.readouterr().out
    assert re.search(r"          score +1\d\d\.\d GiB  too much for L4 \(base weights 131\.4 GiB", out)
    assert "problem  fit: no GPU of 1x4xL4 holds what the directions take, 26 GiB with a single row" in out


@pytest.fixture
def file(shapes: dict[str, Path], tmp_path: Path) -> Path:
    text = (FOLDER / "llama-3-8b.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace("/mnt/cluster/models/llama-3-8b", str(shapes["8b"])))
    return tmp_path / "run.yaml"


def plan(file: Path, cluster: str, write: Path | None = None, *overrides: str) -> None:
    plan_run(file, overrides, cluster, write=write, rows=1e6, network=None)


def comments(file: Path) -> list[str]:
    return re.findall(r"#.*", file.read_text())


def test_what_is_written_loads_says_what_was_planned_and_keeps_every_comment(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "planned.yaml"
    plan(file, "4xH100", written)
    config = load_config(written)
    _, _, _, layout = plan_for(load_config(file), parse_cluster("4xH100")[0], 1e6)
    assert changes_of(layout, load_config(file)) != {}
    assert changes_of(layout, config) == {}
    assert config == layout.config.model_copy(update={"run_dir": config.run_dir})
    assert comments(written) == comments(file)
    keys = [line.split(":")[0] for line in file.read_text().splitlines() if ":" in line]
    after = iter(line.split(":")[0] for line in written.read_text().splitlines() if ":" in line)
    assert all(key in after for key in keys)  # in the same order
    assert f"wrote {written}: " in capsys.readouterr().out
    plan(written, "4xH100", written)
    assert "nothing to change" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))


def test_the_file_itself_is_changed_in_place_and_no_other_is_replaced(file: Path, tmp_path: Path) -> None:
    before = file.read_text()
    (tmp_path / "other.yaml").write_text("kept: true\n")
    with pytest.raises(ArtifactError, match=r"other\.yaml is there already; choose another name, or .*run\.yaml itself"):
        plan(file, "4xH100", tmp_path / "other.yaml")
    assert (tmp_path / "other.yaml").read_text() == "kept: true\n"
    with pytest.raises(ArtifactError, match=r"cannot write .*none/x\.yaml: No such file or directory"):
        plan(file, "4xH100", tmp_path / "none" / "x.yaml")
    assert file.read_text() == before
    plan(file, "4xH100", file)
    assert load_config(file).resources.workers == 4
    shutil.copy(file, tmp_path / "again.yaml")
    plan(file, "2x4xA100-40", file)
    assert yaml.safe_load(file.read_text()) != yaml.safe_load((tmp_path / "again.yaml").read_text())
    plan(file, "4xH100", file)
    assert load_config(file) == load_config(tmp_path / "again.yaml")


def test_a_section_that_the_file_leaves_out_keeps_its_own_defaults(shapes: dict[str, Path], tmp_path: Path) -> None:
    source = {"path": "/x.jsonl"}
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(shapes["8b"]), "max_length": 1024},
        "data": {"candidates": source, "validation": source, "harmful": source, "benign": source},
        "attacks": [{"name": "p10", "task": source, "harmful": source}],
        "comparison": {"selections": ["pharmacist"], "seeds": [0, 1]},
    }
    file = tmp_path / "short.yaml"
    file.write_text("# a short one\n" + yaml.safe_dump(values, sort_keys=False))
    before = load_config(file)
    plan(file, "2xL40S", file)
    after = load_config(file)
    assert after != before
    for name, train in after.trainings().items():  # warm-up, reference, alignment and attack all have defaults of their own
        for key in ("steps", "epochs", "batch_size", "lr"):
            assert getattr(train, key) == getattr(before.trainings()[name], key), (name, key)
    assert file.read_text().startswith("# a short one\n")


def test_an_override_is_planned_with_and_not_written(file: Path, tmp_path: Path) -> None:
    plan(file, "8xH100", tmp_path / "planned.yaml", "model.max_length=256")
    assert load_config(tmp_path / "planned.yaml").model.max_length == 512


def test_a_cluster_that_means_nothing_is_told_in_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown GPU 'Foo'; known: A100-40, A100-80, A10G"):
        plan(file, "16xFoo")
    with pytest.raises(ConfigError, match="--cluster plans a run: give its file by --config"):
        plan_run(None, [], "16xH100", write=None, rows=None, network=None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        ResourceError, match="--cluster connected asks the cluster at RAY_ADDRESS, which is unset; set it, or write"
    ):
        plan(file, "connected")
