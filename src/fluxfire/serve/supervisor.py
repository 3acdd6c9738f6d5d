"""The worker's life: started, warmed, fed with batches, watched, and replaced when it dies.

A worker that says nothing for too long in the middle of a batch is taken for hung and ended: a death like another.
While `let_go` is not set a worker is *held*: it has imported what it needs and touched no GPU, and loads its model when
told. That is where a process can be frozen, to go on later in other places (`fluxfire.deploy`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from fluxfire.serve.process import WorkerProcess
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import Message

log = logging.getLogger("fluxfire.serve")

LONGEST_PAUSE_S: Final = 30.0  # between workers that die before they are warm; none after one that was


class Owner(Protocol):
    """Who has work for the worker."""

    async def next_run(self) -> Message:
        """The next batch, when there is one."""
        ...

    def warm(self, message: Message) -> None:
        """The worker is warm: its "ready"."""
        ...

    def refused(self, reason: str) -> None:
        """The worker could not load its model."""
        ...

    def act(self, message: Message) -> None:
        """The worker says something about its batch; "idle" ends it."""
        ...

    def died(self) -> None:
        """The worker is gone, and what it was at is lost."""
        ...


class Supervisor:
    """Keeps one worker alive.

    Args:
        owner: who has work.
        settings: what the worker is started with, and how long it may say nothing in the middle of a batch.
    """

    def __init__(self, owner: Owner, settings: Settings) -> None:
        self._owner, self._silence_s = owner, settings.silence_s
        self._options, self._environment = settings.worker_options(), settings.worker_environment()
        self.worker: WorkerProcess | None = None
        self.held, self.let_go = asyncio.Event(), asyncio.Event()
        self.let_go.set()
        self._idle = asyncio.Event()
        self._heard = 0.0

    async def live(self) -> None:
        """Until cancelled."""
        pause = 0.0
        while True:
            options = self._options | {"hold": not self.let_go.is_set()}
            worker = self.worker = await WorkerProcess.start(options, self._environment)
            try:
                if await self._warm(worker):
                    pause = 0.0
                    await self._work(worker)
            finally:
                self.worker = None
                self._owner.died()
                status = await worker.end()
            log.error("the worker ended with status %s; a new one starts in %.0f s", status, pause)
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE_S, 2 * pause or 1.0)

    async def send(self, message: Message) -> None:
        """To the worker, if there is one."""
        if self.worker:
            await self.worker.send(message)

    async def _warm(self, worker: WorkerProcess) -> bool:
        message = await worker.receive()
        if message and message.kind == "held":
            self.held.set()
            await self.let_go.wait()
            await worker.send(Message("load"))
            message = await worker.receive()
        if message is None:
            return False
        if message.kind == "refused":
            self._owner.refused(message.values["reason"])
            return False
        self._owner.warm(message)
        return True

    async def _work(self, worker: WorkerProcess) -> None:
        """Until it dies or is taken for hung."""
        self._idle.set()
        tasks = [asyncio.create_task(part(worker)) for part in (self._feed, self._listen, self._watch)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for problem in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(problem, Exception):
                    log.error("the worker is given up", exc_info=problem)

    async def _feed(self, worker: WorkerProcess) -> None:
        while True:
            message = await self._owner.next_run()
            self._idle.clear()
            self._heard = asyncio.get_running_loop().time()
            await worker.send(message)
            await self._idle.wait()

    async def _listen(self, worker: WorkerProcess) -> None:
        while (message := await worker.receive()) is not None:
            self._heard = asyncio.get_running_loop().time()
            self._owner.act(message)
            if message.kind == "idle":
                self._idle.set()

    async def _watch(self, worker: WorkerProcess) -> None:
        while self._idle.is_set() or asyncio.get_running_loop().time() - self._heard < self._silence_s:
            await asyncio.sleep(min(1.0, self._silence_s / 4))
        log.error("the worker %d has said nothing for %.0f s", worker.pid, self._silence_s)
