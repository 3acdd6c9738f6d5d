"""The Hugging Face Hub's protocol on loopback, for one repository: listing, reading by ranges, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repository: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Runs the server; gives its address and its files."""
    files: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": files, "name": repository}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if path.startswith(prefix := f"/{self.name}/resolve/main/"):
            return self._file(path.removeprefix(prefix))
        if path.startswith(prefix := f"/api/models/{self.name}/tree/main/"):
            folder = path.removeprefix(prefix).rstrip("/") + "/"
            found = [self._info(name) for name in self.files if name.startswith(folder)]
            return self._json(found) if found else self._error("EntryNotFound")
        if path.startswith(f"/api/models/{self.name}"):
            return self._json({"id": self.name, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        return self._error("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.path.removeprefix(f"/api/models/{self.name}/").split("/")[0]
        if kind == "paths-info":
            form = body.decode()
            asked = json.loads(form)["paths"] if form.startswith("{") else [unquote(p[6:]) for p in form.split("&")]
            self._json([self._info(name) for name in asked if name in self.files])
        elif kind == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif kind == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitUrl": f"http://127.0.0.1/{self.name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._error("RepoNotFound")

    def _file(self, name: str) -> None:
        if name not in self.files:
            return self._error("EntryNotFound")
        data, status = self.files[name], 200
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        self._answer(status, data, {"ETag": f'"{self._info(name)["oid"]}"', "X-Repo-Commit": COMMIT})

    def _info(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, code: str) -> None:
        self._answer(404, b'{"error":"not found"}', {"X-Error-Code": code, "Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
