from __future__ import annotations

import logging
import pickle
import re
import threading
import time
from pathlib import Path, PurePosixPath

import pytest

from pharmacist_ray.errors import ConfigError, ResourceError
from pharmacist_ray.storage import RemotePath, relative, storage_path, write_text


def test_a_uri_becomes_a_path_and_a_uri_again():
    uri = "s3://bucket/runs/a%20b?endpoint_override=127.0.0.1%3A99&scheme=http"
    found = storage_path(uri)
    assert isinstance(found, RemotePath)
    assert str(found) == uri
    assert (found.name, found.parent.name) == ("a b", "runs")
    assert str(found / "x.parquet") == uri.replace("?", "/x.parquet?")
    assert storage_path(str(found / "scores" / "rows")) == found / "scores" / "rows"
    assert pickle.loads(pickle.dumps(found)) == found
    assert relative(found / "align" / "x", found) == PurePosixPath("align/x")
    assert found.joinpath("a", "b") == found / "a" / "b"
    assert str(storage_path("s3://bucket")) == "s3://bucket/"
    with pytest.raises(ValueError):
        relative(found, storage_path("s3://other/runs"))


@pytest.mark.parametrize("text", ["/abs/run", "rel/run", "runs/s3", "file:///abs/run", "C_d/x:y"])
def test_what_is_no_uri_is_a_path(text):
    assert isinstance(storage_path(text), Path)


def test_a_path_is_itself(tmp_path):
    assert storage_path(tmp_path) == tmp_path
    assert storage_path(storage_path("s3://b/c")) == storage_path("s3://b/c")
    assert relative(tmp_path / "a" / "b", tmp_path) == PurePosixPath("a/b")


@pytest.mark.parametrize("text", ["s3:/bucket/run", "s3:///run", "gs:bucket/x:/"])
def test_a_uri_that_is_none_is_refused(text):
    if text.startswith("gs:b"):
        assert isinstance(storage_path(text), Path)
        return
    with pytest.raises(ConfigError, match="write it with two slashes and a bucket"):
        storage_path(text)


@pytest.mark.parametrize(
    "uri",
    ["s3://key:hunter2@bucket/run", "s3://hunter2@bucket/run", "https://u:hunter2@host/x", "s3://bucket/run?secret_key=hunter2"],
)
def test_credentials_are_refused_and_not_repeated(uri):
    with pytest.raises(ConfigError, match=r"has credentials in it.*AWS_ACCESS_KEY_ID") as caught:
        storage_path(uri)
    assert "hunter2" not in str(caught.value)


def test_a_user_and_a_container_are_no_credentials():
    assert isinstance(storage_path("hdfs://me@name:8020/run"), RemotePath)
    assert isinstance(storage_path("abfs://container@account.dfs.core.windows.net/run"), RemotePath)


def test_an_unknown_scheme_is_told():
    with pytest.raises(ConfigError, match=r"cannot use nothing://host/.*known are s3://, gs://"):
        storage_path("nothing://host/x").exists()


def test_a_storage_that_refuses_for_a_while_is_asked_again(s3, caplog):
    there = storage_path(s3.uri("patience/note"))
    write_text("kept", there)
    s3.refusing.set()

    def relent() -> None:  # the client's own attempts come first
        while "asked again in" not in caplog.text:
            time.sleep(0.1)
        s3.refusing.clear()

    threading.Thread(target=relent, daemon=True).start()
    with caplog.at_level(logging.WARNING):
        assert there.read_text() == "kept"
    assert re.search(r"s3://bucket/patience/note.* refuses \(.*\); asked again in \d+ s \(attempt 2\)", caplog.text)
    write_text("new", there)
    assert there.read_text() == "new"


def test_a_storage_that_never_answers_ends_in_one_line(s3, monkeypatch):
    monkeypatch.setenv("PHARMACIST_STORAGE_PATIENCE_S", "1")
    s3.refusing.set()
    try:
        with pytest.raises(ResourceError, match=r"did not answer for 1 s.*run the same again to go on") as caught:
            write_text("x", storage_path(s3.uri("never")))
    finally:
        s3.refusing.clear()
    assert "\n" not in str(caught.value)


def test_what_waiting_does_not_mend_is_told_at_once(s3):
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"cannot use .*check the bucket's name and the credentials"):
        write_text("x", storage_path(s3.uri("x").replace("bucket", "no-such-bucket")))
    with pytest.raises(FileNotFoundError):
        storage_path(s3.uri("missing")).read_bytes()
    assert time.monotonic() - started < 20
