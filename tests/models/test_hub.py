"""A model on a hub is held at one commit: asked of a real HTTP server, and of the cache that the hub's own library keeps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pharmacist_ray.config.load import dump_config, parse_config
from pharmacist_ray.models import hub
from pharmacist_ray.models.hub import on_hub, pinned, with_model_path
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.session import begin

OLD, NEW = "a" * 40, "b" * 40


def test_what_can_only_be_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert [path for path in ("o/n", "o/n@main", f"o/n@{OLD}", "o/n@refs/pr/1") if not on_hub(path)] == []
    assert [path for path in ("here/model", "/o/n", "./o", "s3://o/n", "o", "a/b/c", "o/n@") if on_hub(path)] == []


def test_a_commit_and_what_a_run_directory_was_begun_with_are_not_asked_for():
    assert pinned(f"o/n@{OLD}") == f"o/n@{OLD}"
    assert pinned("o/n", f"o/n@{OLD}") == f"o/n@{OLD}"
    assert pinned("/some/folder", f"o/n@{OLD}") == "/some/folder"


@pytest.fixture
def cache(tmp_path: Path, model_folder: Path) -> Path:
    """Return a cache as the hub's library keeps it, with a model at two commits, of which ``main`` is the newer one."""
    root = tmp_path / "cache" / "models--owner--name"
    for commit in (OLD, NEW):
        shutil.copytree(model_folder, root / "snapshots" / commit)
    (root / "snapshots" / OLD / "config.json").write_text(
        json.dumps(json.loads((model_folder / "config.json").read_text()) | {"max_position_embeddings": 64})
    )
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(NEW)
    (root / "refs" / "v1").write_text(OLD)
    return tmp_path / "cache"


def python(cache: Path, code: str, **more: str) -> str:
    """Run code in a process of its own: the hub's library reads its settings once."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"} | more
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_offline_the_cache_says_which_commit_a_name_means_and_has_its_files(cache):
    code = """
from pharmacist_ray.models.hub import pinned
from pharmacist_ray.models.load import empty_model, load_model, load_tokenizer
from pharmacist_ray.models.precision import stored_dtype
for name in ("owner/name", "owner/name@v1", "nobody/nothing"):
    print(pinned(name))
for name in ("owner/name", "owner/name@v1"):
    path = pinned(name)
    config = load_model(path).config
    print(config.max_position_embeddings, empty_model(path).config.max_position_embeddings, len(load_tokenizer(path)), stored_dtype(path))
"""
    assert python(cache, code).splitlines() == [
        f"owner/name@{NEW}", f"owner/name@{OLD}", "nobody/nothing", "128 128 48 float32", "64 64 48 float32",
    ]  # fmt: skip


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """Run a hub that knows which commit a revision is, and return its address, what it knows, and what it was asked."""
    commits, asked = {"main": OLD}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            revision = self.path.partition("?")[0].rpartition("/")[2]
            known = self.path.startswith("/api/models/owner/name/revision/") and revision in commits
            body = json.dumps({"id": "owner/name", "sha": commits.get(revision), "siblings": []} if known else {"error": "no"})
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", commits, asked
        running.shutdown()


def test_the_hub_is_asked_once_and_a_run_directory_keeps_its_commit(
    server, tmp_path, placed_example: dict[str, Any], monkeypatch
):
    url, commits, asked = server
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    values = placed_example | {"model": {"path": "owner/name", "template": "plain", "dtype": "float32"}}
    config = parse_config(values | {"run_dir": str(tmp_path / "run")}, where="test")

    def begun() -> tuple[str, str]:
        """Return what a process that begins now takes the model for, and what the selector is then made from."""
        hub._commit.cache_clear()
        run = Run(config)
        assert Run(config).model == Run(config, base=run).model == run.model
        run.root.mkdir(exist_ok=True)
        (run.root / "config.yaml").write_text(dump_config(with_model_path(config, run.config.model.path)))
        return run.model.path, run.fitted.fingerprint

    first = begun()
    assert first[0] == f"owner/name@{OLD}"
    assert sum(path.startswith("/api/models/") for path in asked) == 1
    commits["main"] = NEW
    assert begun() == first
    shutil.rmtree(tmp_path / "run")
    later = begun()
    assert later[0] == f"owner/name@{NEW}"
    assert later[1] != first[1]
    hub._commit.cache_clear()


def test_a_cascades_proxy_keeps_its_commit_as_the_model_does(
    server, model_folder: Path, placed_example: dict[str, Any], monkeypatch
):
    url, commits, _ = server
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    values = placed_example | {"model": {"path": str(model_folder), "template": "plain"}}
    values["scoring"] = values.get("scoring", {}) | {"proxy": {"path": "owner/name"}}
    config = parse_config(values, where="test")

    def begun() -> str:
        hub._commit.cache_clear()
        run = Run(config)
        begin(config, run)
        assert run.config.model.path == str(model_folder)
        assert run.proxied is not None
        return run.proxied.model.path

    assert begun() == f"owner/name@{OLD}"
    commits["main"] = NEW
    assert begun() == f"owner/name@{OLD}"
    hub._commit.cache_clear()


@pytest.mark.slow
def test_a_commit_that_nobody_has_is_one_line(cache):
    code = f"""
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.load import load_tokenizer
try:
    load_tokenizer("owner/name@{"c" * 40}")
except ModelError as error:
    print(error)
"""
    assert python(cache, code).startswith(f"'owner/name@{'c' * 40}' is no folder here and cannot be had from the hub: ")
