"""One connection: what uvicorn leaves unbounded. Their number, the time for a request's head, and unread answers.

A client that sends a byte now and then, or nothing, would keep a connection for ever, and one that reads nothing of its
answer a place among the open requests too. The body has its own bound (`guard.py`).
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from fluxfire.serve.metrics import Metrics
from fluxfire.serve.settings import Settings


class Connection(H11Protocol):
    """uvicorn's, with an end to patience."""

    def __init__(self, settings: Settings, metrics: Metrics, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._settings, self._metrics = settings, metrics
        self._head: asyncio.TimerHandle | None = None  # runs while no request is being answered
        self._reader: asyncio.TimerHandle | None = None  # runs while its answer waits for the client

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts it."""
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            self._give_up("too_many_connections")
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Part of a request."""
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        """What is to be sent is more than the client takes."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """It has taken it."""
        super().resume_writing()
        self._cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        super().connection_lost(exc)
        self._cancel()
        if self._head:
            self._head.cancel()

    def _watch_head(self) -> None:
        """The time begins with the connection, or with what comes after an answer, and ends with the head."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._head and answering:
            self._head.cancel()
            self._head = None
        elif not self._head and not answering and not self.transport.is_closing():
            self._head = self.loop.call_later(self._settings.head_s, self._give_up, "head_timeout")

    def _watch_reader(self, before: int | None = None) -> None:
        """Most answers are written in one piece, and writing resumes near its end: what is left shows a slow client.

        That shrinks in the system's steps: on Linux a third of the socket's buffer, 1.4 MB of 4 MiB at most.
        """
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self._give_up("answer_not_read")
        else:
            self._reader = self.loop.call_later(self._settings.read_s, self._watch_reader, left)

    def _cancel(self) -> None:
        if self._reader:
            self._reader.cancel()
            self._reader = None

    def _give_up(self, code: str) -> None:
        self._metrics.rejections.labels(code).inc()
        self.transport.abort()  # closing would wait until all is sent


def connections(settings: Settings, metrics: Metrics) -> type[asyncio.Protocol]:
    """What uvicorn makes for each connection."""
    return cast(type[asyncio.Protocol], partial(Connection, settings, metrics))
