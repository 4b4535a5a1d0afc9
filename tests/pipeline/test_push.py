"""`pharmacist push` to a hub of the tests' own: what is sent can be loaded again without us, and names no place on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pharmacist_ray.config import load_config
from pharmacist_ray.errors import ArtifactError, ConfigError
from pharmacist_ray.pipeline.push import run_push
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.session import run_stage
from pharmacist_ray.storage import read_table
from tests.hub import TOKEN, Hub, serve
from tests.search.test_search import write_config


@pytest.fixture(scope="module")
def place(model_folder, rows_of, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push-of-somebody")
    values: dict[str, Any] = yaml.safe_load(write_config(folder, model_folder, rows_of).read_text())
    values["scoring"] = {"scorers": ["random"], "random_draws": 1}
    values["selection"] = {"scorer": "random", "ratio": 0.5}
    values["attacks"] = values["attacks"][:1]
    values["comparison"] = {"selections": ["random"], "seeds": [3]}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    run_stage("run", load_config(folder / "run.yaml"))
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    server = serve(found)
    yield found
    server.shutdown()
    server.server_close()


def python(hub: Hub, code: str, home: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: the hub's library reads its settings once."""
    more = {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token, "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | more)


def pushed(hub: Hub, place: Path, home: Path, *commands: tuple[str, ...], token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run commands one after the other, in one process, until one fails."""
    code = f"""
import sys
from pharmacist_ray.cli.app import main
for command in {commands!r}:
    sys.argv = ["pharmacist", "push", *command, "-c", {str(place / "run.yaml")!r}]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""
    return python(hub, code, home, token)


def test_a_pushed_set_and_adapter_are_loaded_by_others_and_name_no_place_here(place, hub, tmp_path, model_folder):
    adapter = ("adapter", "me/robust", "--license", "apache-2.0", "--base", "owner/base", "--public")
    done = pushed(hub, place, tmp_path, ("curated", "me/rows", "--license", "cc-by-4.0"), adapter)
    assert done.returncode == 0, done.stderr
    assert hub.private == {"datasets/me/rows": True, "models/me/robust": False}
    assert sorted(hub.files["datasets/me/rows"]) == ["README.md", "data/train-00000-of-00001.parquet"]
    assert sorted(hub.files["models/me/robust"]) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for files in hub.files.values():
        for name, content in files.items():
            for secret in (TOKEN, str(place), "push-of-somebody", str(model_folder), str(Path.home())):
                assert secret.encode() not in content, (name, secret)
    card = yaml.safe_load(hub.files["models/me/robust"]["README.md"].decode().split("---")[1])
    assert (card["license"], card["base_model"], card["library_name"]) == ("apache-2.0", "owner/base", "peft")
    measured = {metric["type"] for one in card["model-index"][0]["results"] for metric in one["metrics"]}
    assert {"harmful_score", "helpfulness", "accuracy_correct"} <= measured

    run = Run(load_config(place / "run.yaml"))
    code = f"""
import json
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
rows = load_dataset("me/rows", split="train")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(model_folder)!r}), "me/robust")
total = sum(float(p.double().abs().sum()) for n, p in model.named_parameters() if "lora_" in n)
print(json.dumps([sorted(rows["pharmacist_id"]), rows.column_names, total]))
"""
    loaded = python(hub, code, tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    ids, columns, total = json.loads(loaded.stdout.splitlines()[-1])
    kept = [
        id for file in sorted((run.main_selection.folder / "rows").glob("*.parquet")) for id in read_table(file)["id"].to_pylist()
    ]
    assert ids == sorted(kept)
    assert columns == ["prompt", "response", "quality", "pharmacist_id", "pharmacist_score"]
    assert total > 0


@pytest.mark.slow
def test_a_dry_run_shows_everything_and_sends_nothing(place, hub, tmp_path):
    done = pushed(hub, place, tmp_path, ("curated", "me/rows", "--license", "mit", "--dry-run"), token="")
    assert done.returncode == 0, done.stderr
    assert hub.asked == []
    for words in ("dataset me/rows, private: 2 files", "data/train-00000-of-00001.parquet", "license: mit", "nothing was sent"):
        assert words in done.stdout


@pytest.mark.slow
def test_who_may_not_is_told_in_one_line(place, hub, tmp_path):
    done = pushed(hub, place, tmp_path, ("curated", "me/rows", "--license", "mit"), token="hf_wrong")
    assert done.returncode != 0
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("pharmacist: the hub refuses to take me/rows (401: ")
    assert line.endswith("set HF_TOKEN to a token that may write there")
    assert "hf_wrong" not in done.stderr


def test_what_is_missing_is_told_before_anything_is_sent(place, tmp_path):
    config = load_config(place / "run.yaml")
    for arguments, words in (
        (("curated", "me/rows"), r"^the candidates state no licence: say under which these rows may be published, --license"),
        (
            ("adapter", "me/robust"),
            r"^model.path is the folder .*, which nobody else has: give its name on the hub, --base OWNER/NAME$",
        ),
        (("curated", "rows"), r"^'rows' is no name on a hub; it has the form owner/name$"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_push(config, *arguments)
    with pytest.raises(ConfigError, match=r"^unknown selection 'loss'"):
        run_push(config, "curated", "me/rows", arm="loss", licence="mit")
    with pytest.raises(ConfigError, match=r"^unknown defence 'vaccine'"):
        run_push(config, "adapter", "me/robust", defence="vaccine", licence="mit", base="o/n")
    with pytest.raises(ArtifactError, match=r"^HF_HUB_OFFLINE is set: nothing is sent; unset it to push$"):
        run_push(config, "curated", "me/rows", licence="mit")


def test_the_licence_is_that_of_the_candidates_own_card(place, tmp_path, rows_of):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("---\nlicense: odc-by\n---\n\n# Rows\n")
    (tmp_path / "set" / "rows.jsonl").write_text("".join(f"{row.raw}\n" for row in rows_of(12, seed=50)))
    config = load_config(place / "run.yaml", [f"data.candidates.path={tmp_path}/set", f"run_dir={tmp_path}/run"])
    for stage in ("ingest", "score", "select"):
        run_stage(stage, config)
    assert run_push(config, "curated", "me/rows", dry_run=True) == ["README.md", "data/train-00000-of-00001.parquet"]
