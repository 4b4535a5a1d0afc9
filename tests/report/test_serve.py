"""The page over HTTP, asked for as a browser asks, while its run goes on."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import yaml

from pharmacist_ray.config.template import EXAMPLE
from pharmacist_ray.errors import ArtifactError, ConfigError
from pharmacist_ray.report import serve
from pharmacist_ray.report.page import page, write_page
from pharmacist_ray.report.serve import Live, server
from pharmacist_ray.storage import write_text


@pytest.fixture
def run(make_run) -> Path:
    """Return a run of which little is made, so that its page is made in no time."""
    made = make_run()
    made.config()
    made.ingest()
    made.score()
    made.manifest("fit")
    return made.root


@pytest.fixture
def address(run) -> Iterator[str]:
    with server(run, 0) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        assert listening.server_address[0] == "127.0.0.1"
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def begin(run: Path, place: str, **files: object) -> None:
    write_text(json.dumps({"fingerprint": "f", "at": 1_700_000_000.0}), run / place / "started.json")
    for name, value in files.items():
        write_text(json.dumps(value), run / place / f"{name}.progress.json")


def test_what_is_under_way_stands_first_and_goes_when_it_is_finished(run, tmp_path):
    before = page(run)
    assert 'id="now"' not in before
    begin(run, "fit", warmup={"step": 7, "total": 1200, "loss": 1.25, "tokens_per_s": 340.4, "attempt": 2})
    (run / "fit/manifest.json").rename(tmp_path / "fit")
    (run / "scores/manifest.json").rename(tmp_path / "scores")
    (run / "scores/rows/part-00000.parquet").unlink()
    begin(run, "scores")
    begin(run, "answers/one")
    (run / "answers/one/two.progress.json").write_text("{half")
    html = page(run)
    assert html.index('<section id="now"') < html.index('<section id="ran"')
    table = html.partition("Begun and not finished")[2].partition("</tbody>")[0]
    told = [
        re.findall(r"<bdi>(.*?)</bdi>", line) + re.findall(r'"n">(.*?)<', line) for line in table.splitlines() if "<bdi>" in line
    ]
    at = "2023-11-14 22:13:20"
    assert told == [
        ["fit", at, "warmup (attempt 2)", "step 7 of 1,200", "1.25", "340"],
        ["scores", at, "shards", "2 of 3", "", ""],
    ]
    for name in ("fit", "scores"):
        (tmp_path / name).rename(run / name / "manifest.json")
        (run / name / "started.json").unlink()
    (run / "answers/one/started.json").unlink()
    assert 'id="now"' not in page(run)


def test_the_served_page_is_the_written_one_and_follows_the_run(run, address, tmp_path, monkeypatch):
    with urllib.request.urlopen(f"{address}/") as answer:
        html, headers = answer.read(), answer.headers
    assert html == write_page(run, tmp_path).read_bytes()
    assert headers["Refresh"] == "10"
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    begin(run, "more", one={"step": 1, "total": 2})
    monkeypatch.setattr(serve, "monotonic", lambda: 1e12)
    assert b"step 1 of 2" in urllib.request.urlopen(f"{address}/?again").read()


def test_a_page_that_takes_long_is_not_made_all_the_time(run, monkeypatch):
    now, made = [0.0], []

    def slow(root: Path) -> str:
        made.append(root)
        now[0] += 30.0
        return str(len(made))

    monkeypatch.setattr(serve, "page", slow)
    monkeypatch.setattr(serve, "monotonic", lambda: now[0])
    live = Live(run)
    assert [live.html() for _ in range(3)] == ["1", "1", "1"]
    now[0] = 299.0
    assert live.html() == "1"
    now[0] = 301.0
    assert live.html() == "2"


def test_nothing_else_is_served_and_to_nobody_else(address):
    for path, host, status, text in (
        ("/etc/passwd", None, 404, "the page is at /"),
        ("/../../config.yaml", None, 404, "the page is at /"),
        ("/", "rebound.example.org", 403, "for this machine alone"),
        ("/", "rebound.example.org:80", 403, "for this machine alone"),
        ("/", "", 403, "for this machine alone"),
    ):
        request = urllib.request.Request(address + path, headers={} if host is None else {"Host": host})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == status
        assert text in refused.value.read().decode()


def test_a_run_that_goes_away_is_said_and_comes_back(run, address, monkeypatch):
    monkeypatch.setattr(serve, "monotonic", count(1e12, 1e6).__next__)
    away = run.rename(run.with_name("away"))
    run.mkdir()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/")
    assert refused.value.code == 503
    assert "is not a run directory" in refused.value.read().decode()
    run.rmdir()
    away.rename(run)
    assert b"Pharmacist report" in urllib.request.urlopen(f"{address}/").read()


def test_a_folder_that_is_no_run_and_a_taken_port_are_said_in_one_line(run, tmp_path):
    with pytest.raises(ArtifactError, match="is not a run directory"):
        server(tmp_path, 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"^cannot listen on port {port} of 127\.0\.0\.1: .* in use; choose another one with --port$"
        ):
            server(run, port)
    with pytest.raises(ConfigError, match=r"port 70000 of 127\.0\.0\.1: no such port"):
        server(run, 70000)


def test_the_command_says_where_it_is_and_ends_in_peace(run, tmp_path):
    values = EXAMPLE | {"run_dir": str(run)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    code = "from pharmacist_ray.cli.app import main; main()"
    command = [sys.executable, "-c", code, "report", "--config", str(tmp_path / "run.yaml"), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        where = re.fullmatch(rf"{re.escape(str(run))} is shown at (http://127\.0\.0\.1:\d+/) until Ctrl-C\n", said)
        assert where, said + process.stderr.read()
        assert b"Pharmacist report" in urllib.request.urlopen(where[1]).read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
