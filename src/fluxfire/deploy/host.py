"""The server in a thread of this process, for platforms that freeze a process and wake copies of it elsewhere.

Frozen in one of two states. *Held*: the worker has imported everything and touched no GPU; awake, it loads its model.
*Warm*: the model is on the GPU. Waking a GPU's memory is new, and what comes back is not always what went to sleep, so
a picture of a fixed prompt and seed is made before and after; if the two differ, or the second does not come, the
worker is replaced by a new one, which loads the model as if nothing had been frozen.
"""

from __future__ import annotations

import asyncio
import io
import logging
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from PIL import Image, ImageChops, ImageStat

from fluxfire.serve.errors import ServeError
from fluxfire.serve.jobs import Order, Shape
from fluxfire.serve.redact import log_to_stderr
from fluxfire.serve.server import Server
from fluxfire.serve.settings import Settings

log = logging.getLogger("fluxfire.serve")

TEST_PROMPT: Final = "a red bicycle in front of a yellow wall"
TEST_STEPS: Final = 4
TEST_S: Final = 60.0  # for the picture after waking
MOST_DIFFERENCE: Final = 1.0  # of 256 levels, on average: the same kernels on another GPU of the kind round the same


class Host:
    """One server, started, frozen, woken and stopped by hooks.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: Settings) -> None:
        log_to_stderr(settings.secrets())
        self._settings, self._server = settings, Server(settings)
        self._engine = self._server._engine
        self._thread = threading.Thread(target=self._server.run, name="fluxfire-server", daemon=True)
        self._before: Image.Image | None = None

    def start(self, *, hold: bool = False) -> None:
        """Starts the server; returns when it is warm or, to be held, when its worker has imported everything.

        Raises:
            RuntimeError: the model could not be loaded.
        """
        supervisor = self._engine.supervisor
        if hold:
            supervisor.let_go.clear()
        self._thread.start()
        self._wait(supervisor.held.is_set if hold else lambda: self._engine.ready)

    def let_go(self) -> None:
        """Lets a held worker load its model; returns when it is warm.

        Raises:
            RuntimeError: the model could not be loaded.
        """
        assert self._server._loop
        self._server._loop.call_soon_threadsafe(self._engine.supervisor.let_go.set)
        self._wait(lambda: self._engine.ready)

    def remember(self) -> None:
        """Makes the picture to compare with, before the process is frozen."""
        self._before = self._call(self._picture(), self._settings.deadline_s)

    def check(self) -> bool:
        """After waking: whether the same picture comes out; if not, a new worker has been started and is warm.

        Raises:
            RuntimeError: the model could not be loaded again.
        """
        assert self._before
        begin = time.monotonic()
        try:
            difference = _difference(self._before, self._call(self._picture(), TEST_S))
            problem = f"differ by {difference:.2f} levels on average" if difference > MOST_DIFFERENCE else ""
        except (ServeError, TimeoutError) as error:
            problem = f"the second did not come: {error or 'too late'}"
        if not problem:
            log.info("awake: the same picture as before, after %.1f s", time.monotonic() - begin)
            return True
        log.error("awake, but the pictures before and after are not the same (%s): a new worker is started", problem)
        self._call(self._replace(), TEST_S)
        self._wait(lambda: self._engine.ready)
        return False

    def stop(self) -> None:
        """Finishes what was taken, then ends."""
        self._server.handle_exit(signal.SIGTERM, None)
        self._thread.join(self._settings.drain_s + 10)

    async def _picture(self) -> Image.Image:
        facts = self._engine.facts
        assert facts
        width, height = (*self._settings.warm_sizes, (facts.side, facts.side))[0]
        threshold = None if facts.cache_threshold is None else 0.0  # every step computed
        shape = Shape(width, height, TEST_STEPS, facts.guidance, threshold, None)
        order = Order(TEST_PROMPT, shape, (0,), None, (), "png", 90, "base64")
        made = await self._engine.submit(order).result()
        return Image.open(io.BytesIO(made[0].data))

    async def _replace(self) -> None:
        if self._engine.ready and (worker := self._engine.supervisor.worker):  # else one is being loaded already
            self._engine.ready = False
            worker.kill()

    def _call(self, work: Coroutine[Any, Any, Any], seconds: float) -> Any:
        assert self._server._loop
        return asyncio.run_coroutine_threadsafe(work, self._server._loop).result(seconds)

    def _wait(self, so: Callable[[], bool]) -> None:
        while not (self._server.started and so()):
            if not self._thread.is_alive() or self._server.reason:
                self._thread.join()
                raise RuntimeError(f"the model could not be loaded: {self._server.reason or 'the log tells why'}")
            time.sleep(0.02)


def _difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, in levels of 256."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3
