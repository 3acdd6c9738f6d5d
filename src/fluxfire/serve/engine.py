"""Between requests and the worker: the queue, batches, deadlines, cancellation.

All of it runs on the server's event loop; nothing here blocks. One batch is under way at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final

from fluxfire.serve.errors import ServeError, unavailable
from fluxfire.serve.jobs import Begun, Event, Facts, Job, Order, Picture, Pixels, Stepped, Waiting
from fluxfire.serve.metrics import Metrics
from fluxfire.serve.queue import PictureQueue
from fluxfire.serve.results import Finisher
from fluxfire.serve.settings import Settings
from fluxfire.serve.supervisor import Supervisor
from fluxfire.serve.wire import Message

log = logging.getLogger("fluxfire.serve")

NO_MEMORY: Final = "the memory was not enough for this picture: ask for a smaller one"


class Engine:
    """Takes orders, gives jobs.

    Args:
        settings: limits and times.
        metrics: is told what happens.
        finisher: makes files of pixels.
        cannot_start: called with the reason when the first worker cannot load its model.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, finisher: Finisher, cannot_start: Callable[[str], None] = log.error
    ) -> None:
        self._settings, self._metrics, self._finisher = settings, metrics, finisher
        self._cannot_start = cannot_start
        self.queue = PictureQueue(settings.queue_cost)
        self.facts: Facts | None = None
        self.ready = self.draining = False
        self.supervisor = Supervisor(self, settings)
        self._jobs: set[Job] = set()  # that have not ended
        self._running: dict[str, Picture] = {}  # by the name that the worker knows
        self._wanted = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._life: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the first worker; `ready` tells when it is warm."""
        self._life = asyncio.create_task(self.supervisor.live())

    async def drain(self, seconds: float) -> None:
        """Takes no more orders and waits until all that were taken are done, this long at most."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._jobs:
                    await asyncio.sleep(0.02)
        for job in list(self._jobs):
            self._give_up(job, _stopping())

    async def stop(self) -> None:
        """Ends the worker."""
        self.draining = True
        tasks = [task for task in (self._life, *self._tasks) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def submit(self, order: Order, *, keeps: bool = False) -> Job:
        """Puts an order into the queue.

        Args:
            order: what to make.
            keeps: whether it goes on when nobody follows it.

        Raises:
            ServeError: 503 when the server is stopping, 429 when the queue is full.
        """
        if self.draining:
            raise _stopping()
        loop = asyncio.get_running_loop()
        job = Job(secrets.token_hex(8), order, loop.time(), keeps)
        self.queue.add(job)
        self._jobs.add(job)
        late = ServeError(504, "not finished within this server's deadline", code="deadline_exceeded")
        timer = loop.call_later(self._settings.deadline_s, self._give_up, job, late)
        job.on_end = lambda: self._ended(job, timer)
        self._wanted.set()
        self._live(job, Waiting(len(self.queue) + len(self._running) - len(order.seeds)))
        self._count()
        return job

    def release(self, job: Job) -> None:
        """One who followed the job has gone; when nobody is left it is given up, unless its client comes back."""
        job.followers -= 1
        if job.followers <= 0 and not job.keeps and not job.ended:
            self._metrics.rejections.labels("client_gone").inc()  # other errors are counted where they are answered
            self._give_up(job, ServeError(499, "the client has gone", code="client_gone"))

    def _live(self, job: Job, event: Event) -> None:
        """Tells a job what only those want to know who look on."""
        if job.order.live:
            job.tell(event)

    def _give_up(self, job: Job, error: ServeError) -> None:
        """Ends a job before its time, if it has not ended: out of the queue, out of the batch."""
        if job.ended:
            return
        for name, picture in self._running.items():
            if picture.job is job:
                self._spawn(self.supervisor.send(Message("cancel", {"picture": name})))
        job.fail(error)

    def _ended(self, job: Job, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        self.queue.remove(job)
        self._jobs.discard(job)
        job.order = replace(job.order, reference=None)  # megabytes, and a job that may be repeated is kept
        self._count()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _count(self) -> None:
        self._metrics.ready.set(self.ready)
        self._metrics.queue_pictures.set(len(self.queue))
        self._metrics.queue_cost.set(self.queue.cost)
        self._metrics.running.set(len(self._running))

    # What the supervisor asks and tells (`supervisor.Owner`).

    async def next_run(self) -> Message:
        """The next batch, when there is one."""
        assert self.facts
        while not (batch := self.queue.take(self._settings.max_batch, self.facts.pixels_at_once)):
            self._wanted.clear()
            await self._wanted.wait()
        self._running = {f"{picture.job.name}.{picture.index}": picture for picture in batch}
        self.queue.under_way = batch[0].job.order.shape.cost * len(batch), asyncio.get_running_loop().time()
        self._metrics.batches.observe(len(batch))
        for picture in batch:
            self._live(picture.job, Begun(picture.index, len(batch)))
        for job, ahead in self.queue.places().items():
            self._live(job, Waiting(ahead + len(batch)))
        self._count()
        orders = {name: picture.job.order for name, picture in self._running.items()}
        pictures = [
            {"name": name, "prompt": order.prompt, "seed": order.seeds[picture.index], "previews": order.previews}
            for (name, order), picture in zip(orders.items(), batch, strict=True)
        ]
        references = tuple(order.reference.rgb for order in orders.values() if order.reference)
        return Message("run", {"shape": asdict(batch[0].job.order.shape), "pictures": pictures}, references)

    def warm(self, message: Message) -> None:
        """A worker is warm."""
        facts = self.facts = Facts(**message.values["facts"])
        if self.queue.pace.seconds_per_cost is None:
            self.queue.pace.seconds_per_cost = facts.seconds_per_cost
        else:
            self._metrics.restarts.inc()
        self.ready = True
        self._counters(message)
        self._count()
        log.info("ready: %s", facts)

    def refused(self, reason: str) -> None:
        """A worker could not load its model."""
        if self.facts is None:
            self._cannot_start(reason)

    def died(self) -> None:
        """The worker is gone: who waited for its batch is told to try again, who waits in the queue goes on waiting."""
        self.ready = False
        self.queue.under_way = None
        running, self._running = self._running, {}
        for picture in running.values():
            picture.job.fail(unavailable("the worker died, a new one starts: try again", code="worker_died"))
        self._count()

    def act(self, message: Message) -> None:
        """The worker says something about its batch."""
        values = message.values
        match message.kind:
            case "step":
                self._metrics.steps.inc()
                for name, hit, distance in values["decisions"]:
                    picture = self._running[name]
                    self._live(picture.job, Stepped(picture.index, values["step"], hit, distance))
            case "preview":
                picture = self._running[values["picture"]]
                pixels = Pixels(values["width"], values["height"], message.blobs[0])
                preview = partial(self._finisher.preview, picture.job, picture.index, values["number"], pixels)
                self._after(picture, preview)
            case "done":
                self._done(message)
            case "failed":
                self._failed(values["pictures"], values["error"])
            case "idle":
                self._running, self.queue.under_way = {}, None
                self._counters(message)
                self._count()

    def _done(self, message: Message) -> None:
        seconds: dict[str, float] = message.values["seconds"]
        assert self.queue.under_way
        cost, begun = self.queue.under_way
        self.queue.pace.add(cost, asyncio.get_running_loop().time() - begun)
        for (name, hits, computed), rgb in zip(message.values["pictures"], message.blobs, strict=True):
            picture = self._running[name]
            order = picture.job.order
            self._metrics.count_calls(hits, computed)
            pixels = Pixels(order.shape.width, order.shape.height, rgb)
            counts, stages = (hits, computed), {"queue": begun - picture.job.queued_at} | seconds
            self._after(picture, partial(self._finisher.picture, picture.job, picture.index, pixels, counts, stages))

    def _failed(self, names: list[str], error: str) -> None:
        for name in names:
            if error == "out_of_memory":
                self._running[name].job.fail(unavailable(NO_MEMORY, code="out_of_memory"))
            else:
                failure = ServeError(500, "the picture could not be made", code="generation_failed")
                self._running[name].job.fail(failure)

    def _after(self, picture: Picture, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Does the work after the picture's earlier work, so that a client sees previews first."""
        earlier = picture.finishing

        async def in_turn() -> None:
            if earlier:
                await earlier
            try:
                await work()
            except ServeError as error:
                self._give_up(picture.job, error)
            except Exception:
                log.exception("a picture could not be finished")
                self._give_up(picture.job, ServeError(500, "the picture could not be made", code="generation_failed"))

        picture.finishing = self._spawn(in_turn())

    def _counters(self, message: Message) -> None:
        self._metrics.recompilations.set(message.values["recompilations"])
        if "gpu_used_bytes" in message.values:
            self._metrics.gpu_used.set(message.values["gpu_used_bytes"])
            self._metrics.gpu_total.set(message.values["gpu_total_bytes"])


def _stopping() -> ServeError:
    return unavailable("the server is stopping", code="stopping", retry_after_s=5)
