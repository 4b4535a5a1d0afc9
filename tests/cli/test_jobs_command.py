from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pharmacist_ray.cli import jobs as module
from pharmacist_ray.cli.jobs import connect, follow, show_log
from pharmacist_ray.errors import ConfigError, ResourceError

SEEN: list[dict[str, str]] = []
"""Headers of what other servers were asked."""


def test_a_cluster_has_to_be_named(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of a cluster, but not of its job server
    with pytest.raises(ConfigError, match="which cluster"):
        connect(None)


def test_where_nothing_answers_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ResourceError, match=f"nothing answers at http://127.0.0.1:{port}; is that the head's dashboard"):
        connect(f"127.0.0.1:{port}")  # what is given goes before the variable


@pytest.fixture(params=[404, 200])
def other_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the URL of a web server that is not Ray's."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            SEEN.append(dict(self.headers))
            self.send_response(request.param)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_some_other_server_is_told_from_a_cluster(other_server, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(ResourceError, match=f"what answers at {other_server} is no Ray job server"):
        connect(other_server)


def test_a_proxy_sees_the_headers_that_it_wants(other_server, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    for wrong in ("hunter-2", '["hunter-2"]', '{"Cookie": 2}'):
        monkeypatch.setenv("RAY_JOB_HEADERS", wrong)
        with pytest.raises(ConfigError, match=r"^RAY_JOB_HEADERS is not a JSON object of texts") as error:
            connect(other_server)
        assert "hunter" not in str(error.value)
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Who": "me"}')
    with pytest.raises(ResourceError):
        connect(other_server)
    assert SEEN[-1]["X-Who"] == "me"


class Flaky:
    """A client whose connection breaks after every few characters of a job's log."""

    def __init__(self, log: str, pieces: list[int], code: int | None, status: str) -> None:
        self.log, self.pieces, self.code, self.status = log, pieces, code, status

    def get_address(self) -> str:
        return "http://head:8265"

    async def tail_job_logs(self, id: str) -> AsyncIterator[str]:
        if not self.pieces:
            return
        for letter in self.log[: self.pieces.pop(0)]:
            yield letter
        if self.pieces:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, id: str) -> Any:
        over = not self.pieces
        status = self.status if over else "RUNNING"

        class Status(str):
            def is_terminal(self) -> bool:
                return over

        return SimpleNamespace(
            submission_id=id, status=Status(status), driver_exit_code=self.code, message="gone\nnow", start_time=0, end_time=0
        )


@pytest.mark.parametrize(
    ("status", "code", "exits", "said"),
    [
        ("SUCCEEDED", 0, 0, "job j succeeded"),
        ("FAILED", 3, 3, "job j failed with exit code 3"),
        ("FAILED", -9, 137, "job j failed with exit code 137"),
        ("FAILED", None, 1, "job j failed: gone⟨U+000A⟩now"),
        ("STOPPED", -15, 143, "job j was stopped"),
    ],
)
def test_a_log_is_printed_once_however_often_the_connection_breaks(status, code, exits, said, monkeypatch, capsys):
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    assert follow(Flaky("one\ntwo\nthree\n", [2, 2, 5, 99], code, status), "j") == exits  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert out.startswith("one\ntwo\nthree\njob j ")
    assert said in out


def test_a_cluster_that_does_not_come_back_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with pytest.raises(ResourceError, match=r"lost the job server at http://head:8265 .* pharmacist job logs j --follow"):
        follow(Flaky("one\n", [2] * 9, 0, "SUCCEEDED"), "j")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "on"


def test_a_log_steers_no_terminal(capsys):
    client = SimpleNamespace(
        get_address=str, get_job_logs=lambda id: "\x1b[33m(raylet)\x1b[0m gone\n\tat\x1b[2J\x1b]0;owned\x07\rover\n"
    )
    show_log(client, "j")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "(raylet) gone\n\tat⟨U+001B⟩[2J⟨U+001B⟩]0;owned⟨U+0007⟩⟨U+000D⟩over\n"
