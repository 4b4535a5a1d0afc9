"""A real HTTP server on loopback that answers as an OpenAI-compatible endpoint does, or fails as one does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Response = tuple[int, dict[str, str], bytes]


def completion(text: str | None, finish: str = "stop") -> Response:
    body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    return 200, {}, json.dumps(body).encode()


@dataclass
class Server:
    """A real HTTP server; ``answers`` says what it replies to the n-th request with a body."""

    url: str = ""
    answers: Callable[[int, dict[str, Any]], Response] = lambda number, body: completion("yes")
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most: int = 0
    times: list[float] = field(default_factory=list)


@contextmanager
def served() -> Iterator[Server]:
    """Serve on a free port until the block ends."""
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(state.asked)
                state.asked.append(body)
                state.headers.append({"path": self.path, "auth": self.headers.get("Authorization", "")})
                state.times.append(time.monotonic())
                state.at_once += 1
                state.most = max(state.most, state.at_once)
            status, headers, content = state.answers(number, body)
            with lock:
                state.at_once -= 1
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    state.close = lambda: (http.shutdown(), http.server_close())  # type: ignore[attr-defined]
    yield state
    state.close()  # type: ignore[attr-defined]
    thread.join()
