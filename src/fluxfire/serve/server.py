"""The server's process: the application on a socket, told to stop by SIGTERM or Ctrl-C.

At the first signal it is not ready any more and takes no new orders, but still listens and answers: routers need a
moment to notice. When all that was taken is done, or the time for that is up, the socket is closed and the worker
ended. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from types import FrameType

import uvicorn

from fluxfire.serve.app import create_app
from fluxfire.serve.connection import connections
from fluxfire.serve.redact import log_to_stderr
from fluxfire.serve.settings import Settings

log = logging.getLogger("fluxfire.serve")


class Server(uvicorn.Server):
    """One application on one address, drained before it ends."""

    def __init__(self, settings: Settings) -> None:
        self.reason: str | None = None  # why it could not start
        self._loop: asyncio.AbstractEventLoop | None = None  # once it runs
        self._settings = settings
        app = create_app(settings, self._cannot_start)
        self._engine = app.state.desk.engine
        super().__init__(
            uvicorn.Config(
                app,
                settings.host,
                settings.port,
                loop="asyncio",  # these three as tested, whatever else is installed
                http=connections(settings, app.state.desk.metrics),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(settings.drain_s) + 1,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says on standard output where it listens."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            where = f"[{host}]" if ":" in host else host
            print(json.dumps({"url": f"http://{where}:{port}"}), flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self._engine.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._engine.draining = True
        log.info("told to stop: finishing what was taken")
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    async def _drain(self) -> None:
        await self._engine.drain(self._settings.drain_s)
        self.should_exit = True

    def _cannot_start(self, reason: str) -> None:
        self.reason = reason
        self.should_exit = True


def serve(settings: Settings) -> str | None:
    """Runs until a signal; the reason when the model could not be loaded."""
    log_to_stderr(settings.secrets())
    if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.api_keys:
        log.warning("listening on %s without API keys: everybody who reaches it can ask for pictures", settings.host)
    server = Server(settings)
    server.run()
    return server.reason
