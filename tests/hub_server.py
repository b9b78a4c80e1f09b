"""A small loopback server that speaks the parts of the hub's HTTP API the installed huggingface_hub client uses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit


def commit_id(label: str) -> str:
    """A 40-digit commit id that stands for `label`."""
    return hashlib.sha1(label.encode()).hexdigest()


@dataclass
class Repo:
    """refs: branch or tag -> commit; trees: commit -> path -> bytes."""

    refs: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        base = self.trees.get(self.refs.get(ref, ""), {})
        commit = commit_id(f"{ref}{len(self.trees)}")
        self.trees[commit] = {**base, **files}
        self.refs[ref] = commit
        return commit


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class HubServer:
    """`with HubServer() as server:` serves `repos` (hub API) and `files` (plain paths) on a loopback port.

    cuts: path -> byte counts; each GET of the path takes one and drops the connection after that many body bytes.
    no_range: paths that ignore Range. token: what uploads must carry.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.redirects: dict[str, str] = {}
        self.status: dict[str, list[int]] = {}
        self.cuts: dict[str, list[int]] = {}
        self.no_range: set[str] = set()
        self.token = "hf_test"
        self.log: list[Request] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        # serve_forever looks for the stop flag once per interval, so the default costs half a second per test
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def gets(self, path: str) -> list[Request]:
        return [each for each in self.log if each.method == "GET" and each.path == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._record()
        if path == "/api/validate-yaml":  # asked before the upload proper, without a token
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._json({"error": "Invalid credentials"}, 401)
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            ask = json.loads(body)
            name = f"{ask['organization']}/{ask['name']}" if ask.get("organization") else f"me/{ask['name']}"
            if name in self.hub.repos:
                return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            self.hub.repos[name] = Repo(refs={"main": commit_id("empty")}, trees={commit_id("empty"): {}})
            return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        repo = self.hub.repos.get("/".join(parts[2:4]))
        if repo is None:
            return self._error(404, "RepoNotFound")
        action, ref = parts[4], unquote("/".join(parts[5:]))
        if action == "branch":
            repo.refs[ref] = repo.refs["main"]
            return self._json({})
        if action == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]
            return self._json({"files": modes})
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            commit = repo.commit({each["path"]: base64.b64decode(each["content"]) for each in values}, ref)
            return self._json(
                {"commitUrl": f"{self.hub.url}/{'/'.join(parts[2:4])}/commit/{commit}", "commitOid": commit}
            )
        return self._json({"error": f"unknown action {action}"}, 404)

    def _record(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(Request(self.command, path, dict(self.headers.items())))
        return path

    def _answer(self) -> None:
        path = self._record()
        if self.hub.status.get(path):
            return self._error(self.hub.status[path].pop(0), "")
        if path in self.hub.redirects:
            self.send_response(302)
            self.send_header("Location", self.hub.redirects[path])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if path in self.hub.files:
            return self._bytes(path, self.hub.files[path], self.hub.headers.get(path, {}))
        parts = path.strip("/").split("/")
        if path.startswith("/api/models/"):
            return self._api(parts)
        return self._resolve(path, parts)

    def _api(self, parts: list[str]) -> None:
        """/api/models/{org}/{name}/(revision|tree)/{revision}"""
        repo = self.hub.repos.get("/".join(parts[2:4]))
        if repo is None:
            return self._error(404, "RepoNotFound")
        kind, ref = (parts[4], "/".join(parts[5:])) if len(parts) > 4 else ("revision", "main")
        commit = repo.refs.get(ref, ref)
        if commit not in repo.trees:
            return self._error(404, "RevisionNotFound")
        tree = repo.trees[commit]
        if kind == "tree":
            rows = [
                {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for p, b in tree.items()
            ]
            return self._json(rows)
        siblings = [{"rfilename": name} for name in tree]
        return self._json({"id": "/".join(parts[2:4]), "sha": commit, "siblings": siblings})

    def _resolve(self, path: str, parts: list[str]) -> None:
        """/{org}/{name}/resolve/{revision}/{file}"""
        repo = self.hub.repos.get("/".join(parts[:2]))
        if repo is None or len(parts) < 5 or parts[2] != "resolve":
            return self._error(404, "RepoNotFound")
        commit = repo.refs.get(parts[3], parts[3])
        if commit not in repo.trees:
            return self._error(404, "RevisionNotFound")
        body = repo.trees[commit].get("/".join(parts[4:]))
        if body is None:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        return self._bytes(path, body, {"ETag": etag, "X-Repo-Commit": commit})

    def _bytes(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        start = 0
        asked = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, headers.get("ETag"), headers.get("Last-Modified"))
        if asked and same and path not in self.hub.no_range:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start >= len(body):
                return self._error(416, "", {"Content-Range": f"bytes */{len(body)}"})
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Accept-Ranges", "bytes")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cuts.get(path)
        if cuts:
            self.wfile.write(body[start : start + cuts.pop(0)])
            self.close_connection = True  # the promised Content-Length is never met
            return
        self.wfile.write(body[start:])

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        for name, value in {"X-Error-Code": code, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
