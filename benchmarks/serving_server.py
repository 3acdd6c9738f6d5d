"""For `serving.py`: servers in processes of their own, and what its parts do with them and their figures.

Servers are forked from a process that has imported everything: a hundred starts are not a hundred imports.
"""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "src"), str(ROOT / "tests")]

PROMPT = "teapot, noto style"
KEY = "benchmark-0123456789"
WAIT_S = 600
FORKS = multiprocessing.get_context("forkserver")


def _serve(settings: dict[str, Any], environment: dict[str, str], stub: bool, folder: str) -> None:
    """In the server's process."""
    os.environ.update(environment)
    sys.stdout, sys.stderr = open(f"{folder}/out", "w"), open(f"{folder}/log", "w")  # noqa: SIM115
    from fluxfire.serve import process, server
    from fluxfire.serve.settings import Settings

    if stub:
        process.COMMAND = (sys.executable, "-S", str(ROOT / "tests" / "stub_worker.py"))
    reason = server.serve(Settings(_env_file=None, **settings))  # type: ignore[call-arg]
    sys.exit(reason)


class Server:
    """A running server. It is warm once `wait_ready` returns."""

    def __init__(self, *, stub: bool = False, shut: bool = False, **settings: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fluxfire-serving-"))
        self.held(shut)
        small = {"device": "cpu", "compile": False, "warm_sizes": [[48, 32]], "port": 0}
        settings = small | {"storage_dir": str(self.folder / "pictures")} | settings
        paths = [*(str(ROOT / name) for name in ("src", "tests", "benchmarks")), os.environ.get("PYTHONPATH", "")]
        environment = {"FLUXTEST_GATES": str(self.folder), "PYTHONPATH": os.pathsep.join(paths)}
        self._process = FORKS.Process(target=_serve, args=(settings, environment, stub, str(self.folder)))
        self._process.start()

    def wait_ready(self) -> Server:
        """Until it has made pictures to warm up."""
        out = self.folder / "out"
        wait_until(lambda: self._ended() or (out.exists() and out.read_text().endswith("\n")))
        self.url = json.loads(out.read_text())["url"]
        self.http = httpx2.Client(base_url=self.url, timeout=WAIT_S, headers={"Authorization": f"Bearer {KEY}"})
        with suppress(httpx2.TransportError):  # it may end between two questions
            wait_until(lambda: self._ended() or self.http.get("/readyz").status_code == 200)
            self.process = psutil.Process(self._process.pid)
            return self
        self._process.join(WAIT_S)
        raise RuntimeError(self.log())

    def _ended(self) -> bool:
        assert self._process.exitcode is None, self.log()
        return False

    def log(self) -> str:
        """What it has said."""
        return (self.folder / "log").read_text()

    @property
    def worker(self) -> psutil.Process:
        """Its worker's process."""
        return self.process.children()[0]

    def ask(self, **fields: Any) -> httpx2.Response:
        """`POST /inference`."""
        return self.http.post("/inference", json={"prompt": PROMPT} | fields)

    def metrics(self) -> dict[str, float]:
        """Every number of /metrics by its name with labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}

    def metric(self, name: str) -> float:
        """One of them."""
        return self.metrics().get(f"fluxfire_{name}", 0.0)

    def held(self, shut: bool) -> None:
        """Whether the stub's requests that say "held" stay where they are, and models for throughput are not made."""
        gate = self.folder / "held"
        gate.touch() if shut else gate.unlink(missing_ok=True)

    def terminate(self) -> None:
        """SIGTERM, and its end."""
        self._process.terminate()
        self.join()

    def join(self) -> int | None:
        """Its exit status, when it has ended."""
        self._process.join(WAIT_S)
        if "http" in vars(self):
            self.http.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return self._process.exitcode


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """A server, warm, until the end of this."""
    server = Server(**settings)
    try:
        yield server.wait_ready()
    finally:
        server.terminate()


def wait_until(true: Callable[[], Any]) -> None:
    """Waits for another process."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def mib(process: psutil.Process) -> float:
    """Resident memory."""
    return float(round(process.memory_info().rss / 2**20, 1))


def quantile(values: list[float], share: float) -> float:
    """The value below which this share of the values is."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def ms(seconds: float) -> float:
    """Milliseconds, rounded."""
    return round(seconds * 1000, 2)


def png(side: int, colour: str) -> str:
    """A picture in base64."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def post(url: str, fields: dict[str, Any]) -> socket.socket:
    """A request whose answer is not read."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(fields).encode()
    head = f"POST /inference HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection((host, int(port)), timeout=WAIT_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.sendall(f"{head}\r\n\r\n".encode() + body)
    return connection
