"""The worker's process, as the server sees it: started, spoken with, ended."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

from fluxfire.serve import wire
from fluxfire.serve.wire import Message

COMMAND = (sys.executable, "-m", "fluxfire.serve.worker")

log = logging.getLogger("fluxfire.serve")


class WorkerProcess:
    """A running worker. What it prints to standard error goes to the log, line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin and process.stdout and process.stderr
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self._printing = asyncio.create_task(_log_lines(process.stderr))

    @classmethod
    async def start(cls, options: dict[str, Any], environment: dict[str, str]) -> WorkerProcess:
        """Starts one; it is ready when it says so."""
        process = await asyncio.create_subprocess_exec(
            *(*COMMAND, json.dumps(options)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def send(self, message: Message) -> None:
        """Hands a message over; to a dead worker it is lost, and `receive` tells of the death."""
        try:
            self._stdin.write(message.pack())
            await self._stdin.drain()
        except ConnectionError:
            pass

    async def receive(self) -> Message | None:
        """The next message; None when the worker has died."""
        return await wire.read_async(self._stdout)

    def kill(self) -> None:
        """Ends the process, whatever it does at the moment."""
        if self._process.returncode is None:
            self._process.kill()

    async def end(self) -> int:
        """Ends the process and waits for that, also when cancelled meanwhile; its exit status."""
        self.kill()
        ending = asyncio.ensure_future(self._ended())
        try:
            return await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending  # else its pipes would outlive the event loop
            raise

    async def _ended(self) -> int:
        status = await self._process.wait()
        await self._printing
        return status


async def _log_lines(stream: asyncio.StreamReader) -> None:
    while line := await _line(stream):
        log.info("worker: %s", line.decode(errors="replace").rstrip())


async def _line(stream: asyncio.StreamReader) -> bytes:
    """A line, or as much of one as the stream's buffer takes; empty at the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)
