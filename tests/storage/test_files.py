from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pharmacist_ray.errors import ArtifactError, ResourceError
from pharmacist_ray.storage import (
    disk_full_errors,
    local_copy,
    matching,
    mirrored,
    move_tree,
    opened_parquet,
    pull_tree,
    push_tree,
    read_table,
    remove_tree,
    row_count,
    rows_of_all,
    storage_path,
    working_folder,
    write_parquet,
    write_text,
)  # fmt: skip
from pharmacist_ray.storage import files as module

TABLE = pa.table({"id": ["a", "b", "c"], "score": [1.0, 2.0, 3.0]})


@pytest.fixture(params=["folder", "bucket"])
def target(request: pytest.FixtureRequest, tmp_path: Path, s3):
    """Return an empty place of either kind."""
    return storage_path(tmp_path / "run") if request.param == "folder" else storage_path(s3.uri(f"files/{request.node.name}"))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    table, text = tmp_path / "rows.parquet", tmp_path / "note.json"
    write_parquet(TABLE, table)
    write_text("old", text)
    before = table.read_bytes()

    def half(table: pa.Table, file: Path) -> None:
        Path(file).write_bytes(b"PAR1 half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module.pq, "write_table", half)
        for file in (table, tmp_path / "new.parquet"):
            with pytest.raises(OSError, match="disk full"):
                write_parquet(TABLE, file)
    with pytest.raises(UnicodeEncodeError):
        write_text("half \ud800", text)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no rename")))
        with pytest.raises(OSError, match="no rename"):
            write_text("new", text)
    assert table.read_bytes() == before
    assert text.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note.json", "rows.parquet"]


def test_what_is_written_is_read_back_and_replaces_what_was_there(target):
    for count in (3, 2):
        write_parquet(TABLE.slice(0, count), target / "rows" / "part-00000.parquet")
        write_text(f"{count} é", target / "note.txt")
    file = target / "rows" / "part-00000.parquet"
    assert read_table(file).equals(TABLE.slice(0, 2))
    assert read_table(file, columns=["id"], filters=pc.field("score") > 1)["id"].to_pylist() == ["b"]
    assert row_count(file) == 2
    with opened_parquet(file) as parquet:
        assert [batch.num_rows for batch in parquet.iter_batches(1)] == [1, 1]
    assert (target / "note.txt").read_text() == "2 é"
    with (target / "note.txt").open(encoding="utf-8") as lines:
        assert list(lines) == ["2 é"]
    assert [found.name for found in matching(target, "*")] == ["note.txt", "rows"]


def test_places_answer_as_paths_do(target):
    for name in ("b/manifest.json", "a/manifest.json", "a/deep/er.txt", "top"):
        write_text("{}", target / name)
    assert [found.parent.name for found in matching(target, "*/manifest.json")] == ["a", "b"]
    assert [found.name for found in matching(target, "[ab]")] == ["a", "b"]
    assert matching(target / "nothing", "*") == []
    assert (target / "a").is_dir()
    assert not (target / "a").is_file()
    assert (target / "top").is_file()
    assert not (target / "to").exists()
    assert {found.name for found in (target / "a").iterdir()} == {"manifest.json", "deep"}
    assert (target / "x.tar").with_suffix(".log").name == "x.log"
    assert (target / "x").with_name("y") == target / "y"
    with pytest.raises(FileNotFoundError):
        (target / "nothing").read_text()
    with pytest.raises(FileNotFoundError):
        (target / "nothing").unlink()
    (target / "nothing").unlink(missing_ok=True)
    (target / "top").unlink()
    assert not (target / "top").exists()
    remove_tree(target / "a")
    assert not (target / "a").exists()
    assert (target / "b" / "manifest.json").exists()
    remove_tree(target / "a")  # nothing to remove


def test_a_finished_folder_takes_the_place_of_the_old_one(target):
    for round in ("first", "second"):
        work = working_folder(target / ".new")
        (work / "rows").mkdir(parents=True)
        (work / "rows" / f"{round}.txt").write_text(round)
        (work / "manifest.json").write_text(round)
        move_tree(work, target / "done", last=["manifest.json"])
        assert not work.exists()
    assert [found.name for found in matching(target / "done" / "rows", "*")] == ["second.txt"]
    assert (target / "done" / "manifest.json").read_text() == "second"
    assert [found.name for found in matching(target, "*")] == ["done"]


def test_the_manifest_goes_up_last(s3, tmp_path, monkeypatch):
    for name in ("manifest.json", "a.txt", "z/z.txt"):
        write_text(name, tmp_path / "work" / name)
    sent: list[str] = []
    upload = module._upload
    monkeypatch.setattr(module, "_upload", lambda file, to: (sent.append(to.name), upload(file, to)))
    push_tree(tmp_path / "work", storage_path(s3.uri("order")), last=["manifest.json"])
    assert sent == ["a.txt", "z.txt", "manifest.json"]
    sent.clear()
    (tmp_path / "work" / "a.txt").write_text("longer than before")
    push_tree(tmp_path / "work", storage_path(s3.uri("order")), last=["manifest.json"])
    assert sent == ["a.txt"]


def test_a_stand_in_holds_what_its_target_holds(target):
    write_text("here", target / "work" / "deep" / "file")
    folder = working_folder(target / "work")
    if not isinstance(target, Path):
        write_text("left by an earlier attempt", folder / "stale")
    pull_tree(target / "work", folder)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["file"]
    with pytest.raises(RuntimeError, match="stopped"), mirrored(target / "work") as inside:  # noqa: PT012
        (inside / "new").write_text("more")
        raise RuntimeError("stopped")
    assert (target / "work" / "new").read_text() == "more"


def test_a_local_copy_is_made_once_and_again_when_the_source_has_changed(s3, monkeypatch):
    source = storage_path(s3.uri("model"))
    with pytest.raises(FileNotFoundError, match="there is nothing at s3://bucket/model"):
        local_copy(source)
    for name in ("config.json", "deep/weights.bin"):
        write_text(name, source / name)
    fetched: list[str] = []
    fetch = module._fetch
    monkeypatch.setattr(module, "_fetch", lambda what, to: (fetched.append(what.name), fetch(what, to)))
    copies = {local_copy(source) for _ in range(3)} | {local_copy(str(source))}
    assert len(copies) == 1
    assert sorted(fetched) == ["config.json", "weights.bin"]
    folder = copies.pop()
    assert folder.name == "model"
    assert (folder / "deep" / "weights.bin").read_text() == "deep/weights.bin"
    assert local_copy(source / "config.json").read_text() == "config.json"
    write_text("changed and longer", source / "config.json")
    assert (local_copy(source) / "config.json").read_text() == "changed and longer"


def test_many_who_want_a_copy_make_one(s3, monkeypatch):
    write_text("weights", storage_path(s3.uri("shared/weights")))
    fetched: list[str] = []
    fetch = module._fetch

    def slowly(what, to):
        fetched.append(what.name)
        time.sleep(0.2)
        fetch(what, to)

    monkeypatch.setattr(module, "_fetch", slowly)
    threads = [threading.Thread(target=local_copy, args=(s3.uri("shared"),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["weights"]


def test_a_name_that_leads_out_of_the_folder_is_refused(s3):
    s3.client.put_object(Bucket="bucket", Key="evil/../../../../tmp/escaped", Body=b"x")
    s3.client.put_object(Bucket="bucket", Key="evil/good", Body=b"x")
    with pytest.raises(ResourceError, match="leads out of the folder; remove it"):
        local_copy(s3.uri("evil"))


def test_a_scratch_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("PHARMACIST_SCRATCH", str(tmp_path / "link"))
    with pytest.raises(ResourceError, match="belongs to somebody else; set PHARMACIST_SCRATCH"):
        module.scratch()
    monkeypatch.setenv("PHARMACIST_SCRATCH", str(tmp_path / "own"))
    assert module.scratch().stat().st_mode & 0o777 == 0o700
    if os.getuid() == 0:
        os.chown(tmp_path / "own", 12345, 12345)
        with pytest.raises(ResourceError, match="belongs to somebody else"):
            module.scratch()


def test_an_upload_of_which_part_is_lost_is_sent_again(s3, monkeypatch):
    real, calls = module.shutil.copyfileobj, []

    def lossy(source, target, *more):
        calls.append(1)
        if len(calls) == 1:
            target.write(b"half")
        else:
            real(source, target, *more)

    monkeypatch.setattr(module.shutil, "copyfileobj", lossy)
    write_text("the whole text", storage_path(s3.uri("lossy")))
    assert len(calls) == 2
    assert storage_path(s3.uri("lossy")).read_text() == "the whole text"


def test_parquet_of_a_bucket_is_what_pyarrow_reads_there(s3):
    write_parquet(TABLE, storage_path(s3.uri("plain.parquet")))
    found = storage_path(s3.uri("plain.parquet"))
    assert pq.read_table(found.inner, filesystem=found.filesystem).equals(TABLE)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
def test_no_room_is_said_in_one_line():
    def write() -> None:
        with open("/dev/full", "w") as file:  # opened, never renamed over: root could replace the device
            file.write("text")

    line = r"^no space is left to write run/scores; free some, then run the same command again: it goes on$"
    with pytest.raises(ResourceError, match=line), disk_full_errors(Path("run/scores")):
        write()


@pytest.mark.parametrize(
    "error",
    [
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(122, "Disk quota exceeded"),
        OSError(27, "File too large"),
    ],
    ids=["arrow", "safetensors", "quota", "limit"],
)
def test_what_libraries_say_of_a_full_disk_is_understood(error):
    """Their words as `tests/faults/test_disk.py` meets them."""
    with pytest.raises(ResourceError, match="no space is left to write x; "), disk_full_errors(Path("x")):
        raise error


def test_other_errors_pass_as_they_are():
    for error in (OSError(13, "Permission denied"), ValueError("a bug"), ArtifactError("x: No space left on device")):
        with pytest.raises(type(error)) as raised, disk_full_errors(Path("somewhere")):
            raise error
        assert raised.value is error


def test_rows_of_many_files_are_counted_by_their_footers(tmp_path: Path) -> None:
    assert rows_of_all([]) == 0
    for number in range(40):
        write_parquet(pa.table({"id": [str(place) for place in range(number)]}), tmp_path / f"part-{number:05d}.parquet")
    assert rows_of_all(tmp_path.glob("*.parquet")) == sum(range(40))
    with pytest.raises(FileNotFoundError):
        rows_of_all([tmp_path / "part-00001.parquet", tmp_path / "none.parquet"])
