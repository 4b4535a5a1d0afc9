"""A hub of the tests' own: a real HTTP server that keeps repositories in memory, as far as the hub's library asks it to.

Small files come in a commit, Parquet and safetensors by Git LFS first. (Xet, the hub's newer way, needs its own servers.)
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".parquet", ".safetensors")
TOKEN = "hf_of_the_tests"


@dataclass
class Hub:
    """What the server knows."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """``datasets/owner/name`` or ``models/owner/name`` → whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The same → path → content."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 → content that came by Git LFS."""
    asked: list[str] = field(default_factory=list)

    def sha(self, repo: str) -> str:
        """Return the commit of a repository."""
        parts = [path.encode() + content for path, content in sorted(self.files[repo].items())]
        return hashlib.sha1(b"".join(parts), usedforsecurity=False).hexdigest()


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Start the server on loopback, and return it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: Any, status: int = 200) -> None:
            self._reply(status, json.dumps(value).encode())

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def do_POST(self) -> None:
            body, path = self._body(), urlsplit(self.path).path
            hub.asked.append(f"POST {path}")
            if not self._known():
                self._reply(401, b'{"error": "Invalid credentials"}', X_Error_Message="Invalid credentials")
            elif path == "/api/repos/create":
                asked = json.loads(body)
                kind = asked.get("type") or "model"
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                repo = f"{kind}s/{name}"
                hub.files.setdefault(repo, {})
                hub.private.setdefault(repo, asked.get("private", asked.get("visibility") == "private"))
                self._json({"url": f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name, "id": name})
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(LFS) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for one in json.loads(body)["files"]
                ]
                self._json({"files": files})
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {
                        "oid": one["oid"],
                        "size": one["size"],
                        "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}},
                    }
                    for one in json.loads(body)["objects"]
                ]
                self._json({"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                repo = path.removeprefix("/api/").partition("/commit/")[0]
                for line in body.decode().splitlines():
                    item = json.loads(line)
                    value = item["value"]
                    if item["key"] == "file":
                        hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                    elif item["key"] == "lfsFile":
                        hub.files[repo][value["path"]] = hub.uploads[value["oid"]]
                name = repo.removeprefix("models/")
                self._json(
                    {"commitUrl": f"{hub.url}/{name}/commit/{hub.sha(repo)}", "commitOid": hub.sha(repo), "pullRequestUrl": None}
                )
            elif "/paths-info/" in path:
                repo, _, _ = path.removeprefix("/api/").partition("/paths-info/")
                wanted = json.loads(body)["paths"]
                self._json([_entry(one, hub.files[repo][one]) for one in wanted if one in hub.files[repo]])
            else:
                self._json({"error": f"not known: {path}"}, 404)

        def do_PUT(self) -> None:
            body = self._body()
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.uploads[oid] = body
            self._reply(200, b"")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if not self._known():
                self._reply(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="not here")
                return
            if path.startswith("/api/"):
                self._about(path.removeprefix("/api/"))
                return
            repo, found, rest = path.strip("/").partition("/resolve/")
            repo = repo if repo.startswith("datasets/") else f"models/{repo}"
            file = rest.partition("/")[2]
            if not found or file not in hub.files.get(repo, {}):
                self._reply(404, b"{}", X_Error_Code="EntryNotFound", X_Error_Message="no such file")
                return
            content = hub.files[repo][file]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            ranged = self.headers.get("Range")
            if ranged and self.command == "GET":
                first, _, last = ranged.removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
                part = content[start : end + 1]
                self._reply(
                    206, part, "application/octet-stream", ETag=tag, X_Repo_Commit=hub.sha(repo),
                    Content_Range=f"bytes {start}-{end}/{len(content)}",
                )  # fmt: skip
                return
            self._reply(200, content, "application/octet-stream", ETag=tag, X_Repo_Commit=hub.sha(repo), Accept_Ranges="bytes")

        def _about(self, path: str) -> None:
            parts = path.split("/")
            repo, rest = "/".join(parts[:3]), parts[3:]
            if repo not in hub.files:
                self._reply(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="no such repository")
            elif not rest or rest[0] == "revision":
                siblings = [{"rfilename": name} for name in sorted(hub.files[repo])]
                self._json(
                    {
                        "_id": "1", "id": "/".join(parts[1:3]), "sha": hub.sha(repo), "private": hub.private[repo], "siblings": siblings,
                        "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False,
                    }
                )  # fmt: skip
            elif rest[0] == "tree":
                folder = "/".join(rest[2:])
                inside = {
                    name: content for name, content in hub.files[repo].items() if not folder or name.startswith(f"{folder}/")
                }
                if not inside:
                    self._reply(404, b"{}", X_Error_Code="EntryNotFound", X_Error_Message="no such folder")
                    return
                deep = "recursive=true" in self.path.lower()
                entries: dict[str, dict[str, Any]] = {}
                for name, content in sorted(inside.items()):
                    left = name.removeprefix(f"{folder}/" if folder else "")
                    if deep or "/" not in left:
                        entries[name] = _entry(name, content)
                    else:
                        sub = f"{folder}/{left.partition('/')[0]}".strip("/")
                        entries[sub] = {"type": "directory", "path": sub, "oid": "0" * 40, "size": 0}
                self._json(list(entries.values()))
            elif rest[0] == "refs":
                self._json(
                    {
                        "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": hub.sha(repo)}],
                        "tags": [],
                        "converts": [],
                    }
                )
            else:
                self._json({"error": f"not known: {path}"}, 404)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _entry(name: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
    }  # fmt: skip
    if name.endswith(LFS):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found
