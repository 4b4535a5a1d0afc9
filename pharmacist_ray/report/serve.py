"""The page of a run over HTTP, on this machine alone, made anew while the run goes on."""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic

from pharmacist_ray.errors import ConfigError, PharmacistError
from pharmacist_ray.report.page import page
from pharmacist_ray.storage import StoragePath

EVERY_S = 10
"""Seconds after which a browser asks again (ours)."""

SHARE = 0.1
"""At most so much of the time goes into making the page, which with many scores takes long (ours)."""

HOST = "127.0.0.1"


class Live:
    """A run's page as it was a few seconds ago at most."""

    def __init__(self, run: StoragePath) -> None:
        """Look at a run directory.

        Args:
            run: The run directory.
        """
        self.run, self._lock = run, threading.Lock()
        self._html, self._next = "", 0.0

    def html(self) -> str:
        """Return the page, made anew where it is older than `EVERY_S`, or than its making takes for its `SHARE`.

        Raises:
            ArtifactError: The folder is not a run directory.
        """
        with self._lock:
            started = monotonic()
            if started >= self._next:
                self._html = page(self.run)
                took = monotonic() - started
                self._next = started + max(0.9 * EVERY_S, took / SHARE)
            return self._html


def server(run: StoragePath, port: int) -> ThreadingHTTPServer:
    """Return a server of a run's page on loopback; `serve_forever` is for the caller.

    It answers requests for ``/`` alone, and only those that name this machine: a page of somebody else's whose name leads here gets
    nothing.

    Args:
        run: The run directory.
        port: 0 takes a free one.

    Raises:
        ArtifactError: ``run`` is not a run directory.
        ConfigError: The port is taken.
    """
    live = Live(run)
    live.html()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in (HOST, "localhost"):
                self._answer(HTTPStatus.FORBIDDEN, "this page is for this machine alone", "text/plain")
            elif self.path.partition("?")[0] != "/":
                self._answer(HTTPStatus.NOT_FOUND, "the page is at /", "text/plain")
            else:
                try:
                    self._answer(HTTPStatus.OK, live.html(), "text/html")
                except PharmacistError as error:
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error), "text/plain")

        def _answer(self, status: HTTPStatus, text: str, kind: str) -> None:
            data = text.encode()
            self.send_response(status)
            for name, value in (
                ("Content-Type", f"{kind}; charset=utf-8"),
                ("Content-Length", str(len(data))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("X-Frame-Options", "DENY"),
                ("Refresh", str(EVERY_S)),  # the page has no script, and its policy allows none
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing: a line every ten seconds helps nobody."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise ConfigError(f"cannot listen on port {port} of {HOST}: {reason}; choose another one with --port") from error
