"""From the worker's pixels to what a client gets: encoded in a thread, kept if a URL is asked for."""

from __future__ import annotations

import asyncio
import time

from fluxfire.serve import pictures
from fluxfire.serve.jobs import Job, Made, Pixels, Preview
from fluxfire.serve.metrics import Metrics
from fluxfire.serve.storage import Keeper


class Finisher:
    """Encodes and keeps pictures while the worker is at the next batch."""

    def __init__(self, keeper: Keeper, metrics: Metrics) -> None:
        self._keeper, self._metrics = keeper, metrics

    async def preview(self, job: Job, index: int, number: int, pixels: Pixels) -> None:
        """Tells the job of a preview."""
        data = await asyncio.to_thread(pictures.encode, pixels, job.order.format, job.order.quality)
        job.tell(Preview(index, number, data))

    async def picture(
        self, job: Job, index: int, pixels: Pixels, counts: tuple[int, int], seconds: dict[str, float]
    ) -> None:
        """Tells the job of a finished picture.

        Args:
            job: whose picture.
            index: which of its pictures.
            pixels: of the size that was asked.
            counts: the cache's hits and computed calls.
            seconds: of the stages so far; "encode" is added.

        Raises:
            ServeError: it could not be kept, and that is configured to be an error.
        """
        begin = time.monotonic()
        data = await asyncio.to_thread(pictures.encode, pixels, job.order.format, job.order.quality)
        url = await self._keeper.keep(data, job.order.format) if job.order.output == "url" else None
        seconds["encode"] = time.monotonic() - begin
        self._metrics.pictures.inc()
        for stage, value in seconds.items():
            self._metrics.stages.labels(stage).observe(value)
        job.tell(Made(index, job.order.seeds[index], data, url, *counts, seconds))
