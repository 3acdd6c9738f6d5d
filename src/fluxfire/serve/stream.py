"""Server-sent events: what happens to a job, as it happens.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fluxfire.serve.desk import ClientGone, Desk
from fluxfire.serve.errors import ServeError
from fluxfire.serve.jobs import Event, Job

Told = tuple[str, dict[str, Any]]  # an event's name and values
QUIET_S: Final = 15.0  # after which a comment is sent: proxies close what says nothing for long, nginx after 60 s


def stream(
    desk: Desk, job: Job, request: Request, tell: Callable[[Event], Told | None], *first: Told
) -> StreamingResponse:
    """The answer that carries a job's events.

    Args:
        desk: where the job is followed.
        job: gets given up when the client goes.
        request: of the client.
        tell: an event as it is sent; None: it is not.
        first: what is sent before anything happens.
    """

    async def body() -> AsyncIterator[bytes]:
        for told in first:
            yield _packed(*told)
        try:
            async with aclosing(desk.follow(job, request, QUIET_S)) as events:
                async for event in events:
                    if event is None:
                        yield b": still waiting\n\n"
                    elif news := tell(event):
                        yield _packed(*news)
        except ServeError as error:  # the status is sent already
            desk.metrics.rejections.labels(error.code).inc()
            yield _packed("error", error.body())
        except ClientGone:
            return

    return _Followed(desk, job, body())


class _Followed(StreamingResponse):
    """Lets go of the job in the end, also when the client went before the first event."""

    def __init__(self, desk: Desk, job: Job, body: AsyncIterator[bytes]) -> None:
        # A proxy that gathers answers before it passes them on (nginx) would gather this one too.
        super().__init__(body, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._desk, self._job = desk, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._desk.engine.release(self._job)


def _packed(name: str, values: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(values)}\n\n".encode()
