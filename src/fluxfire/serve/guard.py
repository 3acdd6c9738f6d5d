"""Before any route: who may, how many at once, and how many bytes of a body, read within how long.

A body is read here and nowhere else, so that no route can forget a bound. Without a key nothing of a body is read.
With a full queue it is read and thrown away: the client would not see the answer while it still sends.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxfire.serve.desk import ClientGone, Desk
from fluxfire.serve.errors import ServeError, unavailable

OPEN: Final = ("/", "/livez", "/readyz", "/metrics", "/openapi.json")
OPEN_FOLDERS: Final = ("/page/", "/pictures/")  # who has the URL has the picture


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self._app, self._desk = app, desk
        self._now = 0  # requests with a body that are under way
        self._bytes = 0  # of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._desk.metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        try:
            await self._admit(scope, receive, counted)
        except ServeError as error:
            self._desk.metrics.rejections.labels(error.code).inc()
            response = error.response()
            if error.status in (401, 408, 413) or error.code == "too_many_requests":  # the body's rest is not read
                response.headers["Connection"] = "close"
            await response(scope, receive, counted)
        except ClientGone:
            pass

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        if path not in OPEN and not path.startswith(OPEN_FOLDERS):
            scope.setdefault("state", {})["owner"] = self._desk.access.who(headers.get("authorization"))
        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        if self._now >= self._desk.settings.max_open_requests:
            raise _too_many()
        self._now += 1
        kept: list[int] = []
        try:
            body = await self._body(headers, receive, kept)
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._now -= 1
            self._bytes -= sum(kept)

    async def _body(self, headers: Headers, receive: Receive, kept: list[int]) -> bytes:
        """The body; `kept` gets the bytes of each part that is in memory."""
        settings, queue = self._desk.settings, self._desk.engine.queue
        told = int(headers.get("content-length", "0"))
        if told > settings.max_body_bytes:
            raise self._too_large()
        full = queue.full and "idempotency-key" not in headers
        if not full and self._bytes + told > settings.max_open_bytes:
            raise _too_many()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(settings.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    if size > settings.max_body_bytes:
                        raise self._too_large()
                    if not full:  # counted as it comes: who only tells of a large body keeps nobody out
                        chunks.append(chunk)
                        kept.append(len(chunk))
                        self._bytes += len(chunk)
                        if self._bytes > settings.max_open_bytes:
                            raise _too_many()
        except TimeoutError:
            late = f"the body did not arrive within {settings.body_s:g} s"
            raise ServeError(408, late, code="body_timeout") from None
        if full:
            raise queue.refusal()
        return b"".join(chunks)

    def _too_large(self) -> ServeError:
        most = self._desk.settings.max_body_bytes
        return ServeError(413, f"the body has over {most} bytes", code="body_too_large")


def _too_many() -> ServeError:
    return unavailable("too many requests are open", code="too_many_requests")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then whatever comes after it: a disconnection."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
