"""Where every request for pictures comes together: repeated ones are recognised, quotas spent, jobs followed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable

from fastapi import Request

from fluxfire.serve.access import Access
from fluxfire.serve.engine import Engine
from fluxfire.serve.errors import ServeError, invalid, unavailable
from fluxfire.serve.jobs import Event, Facts, Job, Made, Order
from fluxfire.serve.metrics import Metrics
from fluxfire.serve.repeats import Repeats, fingerprint
from fluxfire.serve.settings import Settings
from fluxfire.serve.storage import Keeper


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Desk:
    """What the routes share."""

    def __init__(self, settings: Settings, engine: Engine, keeper: Keeper, metrics: Metrics) -> None:
        self.settings, self.engine, self.keeper, self.metrics = settings, engine, keeper, metrics
        self.access = Access(settings.api_keys)
        self._repeats = Repeats(settings.idempotency_s, settings.idempotency_bytes)

    @property
    def facts(self) -> Facts:
        """Of the model.

        Raises:
            ServeError: 503 until a worker has been warm once.
        """
        if self.engine.facts is None:
            raise unavailable("the model is still being loaded", code="not_ready", retry_after_s=5)
        return self.engine.facts

    async def take(self, request: Request, parts: tuple[bytes, ...], order: Awaitable[Order]) -> Job:
        """A job for a request, or the one that an earlier request with the same key has begun.

        Args:
            request: for its key and its path.
            parts: all that makes it the same request.
            order: what to make.

        Raises:
            ServeError: 409, 422, 429, 503.
        """
        wanted = await order
        owner: str = request.state.owner
        key = request.headers.get("idempotency-key")
        if key is not None and not 1 <= len(key) <= 255:
            raise invalid("Idempotency-Key", f"found {len(key)} characters, needed 1 to 255")
        digest = fingerprint(request.url.path.encode(), *parts)
        job = self._repeats.find(owner, key, digest) if key else None
        if job is None:
            count = len(wanted.seeds)
            self.access.spend(owner, count)
            try:
                job = self.engine.submit(wanted, keeps=key is not None)
            except ServeError:
                self.access.spend(owner, -count)  # given back
                raise
            if key:
                self._repeats.keep(owner, key, digest, job)
        job.followers += 1
        return job

    def url(self, made: Made, request: Request) -> str | None:
        """Where a picture is kept; one that is kept here has only a path."""
        if made.url is None or not made.url.startswith("/"):
            return made.url
        return (self.settings.public_url or str(request.base_url)).rstrip("/") + made.url

    async def pictures(self, job: Job, request: Request) -> list[Made]:
        """The job's pictures, as soon as all are there.

        Raises:
            ClientGone: it did not wait.
            ServeError: how the job failed.
        """
        try:
            async for _ in self.follow(job, request):
                pass
        finally:
            self.engine.release(job)
        return job.pictures

    async def follow(self, job: Job, request: Request, quiet_s: float | None = None) -> AsyncGenerator[Event | None]:
        """The job's events; whoever follows it has to `release` it afterwards.

        Args:
            job: which.
            request: of who follows.
            quiet_s: seconds without an event after which None is given.

        Raises:
            ClientGone: it did not wait.
            ServeError: how the job failed.
        """
        gone = asyncio.create_task(_gone(request))
        events = job.follow()
        try:
            while True:
                event = asyncio.ensure_future(anext(events, None))
                while not (await asyncio.wait({event, gone}, timeout=quiet_s, return_when=asyncio.FIRST_COMPLETED))[0]:
                    yield None
                if not event.done():
                    raise ClientGone
                if (found := event.result()) is None:
                    return
                yield found
        finally:
            gone.cancel()
            event.cancel()
            with contextlib.suppress(asyncio.CancelledError, ServeError):
                await event


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
