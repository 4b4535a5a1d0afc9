from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pharmacist_ray.pipeline import identity
from pharmacist_ray.pipeline.identity import dated_identity, file_identity

BOTH = pytest.mark.parametrize("identity_of", [file_identity, dated_identity])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with files in it and below it."""
    home = tmp_path / "data"
    (home / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "deep/a.jsonl"):
        (home / name).write_text(name)
    return home


def restored(file: Path, text: str) -> None:
    """Write a file and give it back its time of change."""
    before = file.stat()
    file.write_text(text)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def test_a_small_file_is_known_by_its_content(folder):
    file = folder / "a.jsonl"
    known = file_identity(str(file))
    os.utime(file, ns=(1, 1))
    assert file_identity(str(file)) == known
    restored(file, "A.jsonl")
    assert file_identity(str(file)) != known
    file.write_text("a.jsonl")
    assert file_identity(str(file)) == known
    assert json.loads(json.dumps(known)) == known


def test_a_large_file_is_known_by_size_and_time(folder, monkeypatch):
    (folder / "b.jsonl").write_text("longer than the others")
    monkeypatch.setattr(identity, "HASHED_FILE", len("deep/a.jsonl"))
    known = file_identity(str(folder))
    os.utime(folder / "a.jsonl", ns=(1, 1))
    restored(folder / "b.jsonl", "LONGER than the others")
    assert file_identity(str(folder)) == known
    os.utime(folder / "b.jsonl", ns=(1, 1))
    assert file_identity(str(folder)) != known
    known = file_identity(str(folder))
    restored(folder / "a.jsonl", "A.jsonl")
    assert file_identity(str(folder)) != known


def test_many_small_files_are_known_by_size_and_time(folder, monkeypatch):
    total = sum(file.stat().st_size for file in folder.rglob("*.jsonl"))
    for limit, noticed in ((total, True), (total - 1, False)):
        monkeypatch.setattr(identity, "HASHED_TOTAL", limit)
        known = file_identity(str(folder))
        restored(folder / "a.jsonl", (folder / "a.jsonl").read_text().swapcase())
        assert (file_identity(str(folder)) != known) is noticed


@pytest.mark.parametrize("pattern", ["", "a.jsonl", "*.jsonl", "**/*.jsonl", "[ab].jsonl", "*/a.jsonl", "deep/../a.jsonl"])
@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_copy_at_another_place_is_the_same_data(folder, tmp_path, monkeypatch, pattern, prefix):
    copied = tmp_path / "elsewhere" / "x" / "data"
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    os.utime(copied / "a.jsonl", ns=(1, 1))
    known = file_identity(f"{prefix}{folder}/{pattern}")
    assert known[1]
    assert file_identity(f"{prefix}{copied}/{pattern}") == known
    monkeypatch.chdir(copied)
    assert file_identity(f"{prefix}./{pattern}") == file_identity(prefix + (pattern or ".")) == known
    monkeypatch.setenv("HOME", str(copied))
    assert file_identity(f"{prefix}~/{pattern}") == known
    assert dated_identity(f"{prefix}{copied}/{pattern}") != dated_identity(f"{prefix}{folder}/{pattern}")


def test_names_within_a_folder_patterns_and_the_hub_prefix_count(folder):
    paths = [folder, f"{folder}/*.jsonl", f"{folder}/?.jsonl", f"{folder}/**/*.jsonl", f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
    known = [json.dumps(file_identity(f"{prefix}{path}")) for path in paths for prefix in ("", "hf:")]
    assert len(set(known)) == len(known)
    (folder / "a.jsonl").rename(folder / "c.jsonl")
    assert json.dumps(file_identity(str(folder))) not in known


def test_what_cannot_be_read_is_left_to_the_reader(folder, monkeypatch):
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)
    status = (folder / "a.jsonl").stat()
    assert file_identity(f"{folder}/a.jsonl") == ["", [["a.jsonl", status.st_size, status.st_mtime_ns]]]


@pytest.mark.parametrize("pattern", ["*.jsonl", "?.jsonl", "**/*.jsonl", "[ab].jsonl", "", "../*/a.jsonl"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "file://", "hf:"])
@BOTH
def test_a_change_behind_a_pattern_or_in_a_folder_is_noticed(tmp_path, monkeypatch, pattern, kind, identity_of):
    home = tmp_path / "data"
    home.mkdir()
    (home / "a.jsonl").write_text("1")
    monkeypatch.chdir(home)
    path = {"absolute": f"{home}/", "relative": "./", "file://": f"file://{home}/", "hf:": f"hf:{home}/"}[kind] + pattern
    known = identity_of(path)
    assert identity_of(path) == known
    (home / "a.jsonl").write_text("12")
    changed = identity_of(path)
    assert changed != known
    if "a.jsonl" not in pattern:
        (home / "b.jsonl").write_text("1")
        assert identity_of(path) != changed


@BOTH
def test_what_is_no_file_is_known_by_its_name_without_secrets(identity_of):
    assert identity_of("org/model") == ["org/model", []]
    assert identity_of("hf:org/data") == ["hf:org/data", []]
    identity = identity_of("nowhere://key:secret@host/x.jsonl?token=secret")
    assert identity == ["nowhere://host/x.jsonl", []]
