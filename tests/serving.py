"""A server for tests: the real one on a real socket, in a thread, with its worker in a process."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2
import uvicorn
from PIL import Image

from fluxfire.serve.app import create_app
from fluxfire.serve.connection import connections
from fluxfire.serve.engine import Engine
from fluxfire.serve.server import Server
from fluxfire.serve.settings import Settings

TESTS = Path(__file__).parent
PROMPT = "teapot, noto style"
WAIT_S = 300  # for what comes in an instant, unless the machine is busy


class Served:
    """A running server, seen from outside (`http`) and from inside (`engine`)."""

    def __init__(self, settings: Settings) -> None:
        self._gates = tempfile.TemporaryDirectory()
        with patch.dict(os.environ, FLUXTEST_GATES=self._gates.name):
            self.server = Server(settings)
        self.engine: Engine = self.server._engine
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        wait_until(lambda: self.server.started)
        self.url = url_of(self.server)
        self.http = httpx2.Client(base_url=self.url, timeout=WAIT_S)
        self.cold = self.cold_answers()

    def cold_answers(self) -> dict[str, int]:
        """What is answered before the worker is warm."""
        inference = self.http.post("/inference", json={"prompt": "early"})
        return {path: self.http.get(path).status_code for path in ("/livez", "/readyz")} | {
            "/inference": inference.status_code
        }

    def stop(self) -> None:
        self.http.close()
        self._gates.cleanup()
        self.server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def gate(self, word: str) -> Path:
        """While there is this file, requests with the word in their prompt stay in their present denoising step."""
        return Path(self._gates.name, word)

    @contextmanager
    def shut(self, word: str = "held") -> Iterator[None]:
        """Shuts a gate ("held" or "kept") until the end of this."""
        self.gate(word).touch()
        try:
            yield
        finally:
            self.gate(word).unlink()

    @contextmanager
    def held(self, **fields: Any) -> Iterator[Future[httpx2.Response]]:
        """A request that is being made, and stays in its first denoising step until the end of this."""
        fields = {"prompt": "held", "steps": 2, "width": 16} | fields
        with ThreadPoolExecutor(1) as pool, self.shut():
            running = pool.submit(self.http.post, "/inference", json=fields)
            wait_until(lambda: metric(self, "fluxfire_running_pictures") == 1)
            yield running

    @contextmanager
    def beside(self, **settings: Any) -> Iterator[httpx2.Client]:
        """Another application on a port of its own, with other settings and the same worker."""
        given = make_settings(**settings)
        app = create_app(given)
        app.state.desk.engine = self.engine
        protocol = connections(given, app.state.desk.metrics)
        config = uvicorn.Config(
            app, port=0, http=protocol, ws="none", log_config=None, lifespan="off", timeout_graceful_shutdown=5
        )
        server = uvicorn.Server(config)
        running = asyncio.run_coroutine_threadsafe(server.serve(), self.server._loop)
        wait_until(lambda: server.started)
        with httpx2.Client(base_url=url_of(server), timeout=WAIT_S) as client:
            yield client
        server.should_exit = True
        running.result(WAIT_S)


def make_settings(**changes: Any) -> Settings:
    """Settings that no environment and no .env changes."""
    known = {"model": "serve_pipes:make", "device": "cpu", "port": 0, "compile": False}
    return Settings(_env_file=None, **(known | changes))


def url_of(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def wait_until(true: Any, seconds: float = WAIT_S) -> None:
    """Waits for something of another thread or process; fails when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def with_tests_on_path() -> dict[str, str]:
    """The environment in which a worker finds `serve_pipes`, and computes with one thread as the tests do."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "OMP_NUM_THREADS": "1"}


def ask(served: Served, **fields: Any) -> httpx2.Response:
    return served.http.post("/inference", json={"prompt": PROMPT, "steps": 2} | fields)


def open_picture(data: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def png(size: tuple[int, int] = (128, 128), colour: str = "teal") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def lines(log: Path, start: str, prompt: str = "") -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith(start) and prompt in line]


def batch_counts(served: Served) -> float:
    return metric(served, "fluxfire_batch_pictures_count")


def metric(served: Served, name: str) -> float:
    for line in served.http.get("/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[-1])
    assert "{" in name  # with labels: not counted yet
    return 0.0


def post_by_hand(served: Served, path: str, body: bytes) -> socket.socket:
    """A request whose answer is not read."""
    connection = socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection
