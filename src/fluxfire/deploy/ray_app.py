"""Ray Serve: the server of `fluxfire.serve` on every GPU of a cluster, as many as the queue asks for.

    serve run fluxfire.deploy.ray_app:build model=black-forest-labs/FLUX.1-Kontext-dev max_replicas=8

A replica is the whole server and its worker, with a GPU of its own; it takes requests once its worker is warm. Ray's
proxies hold the queue: a replica gets at most `max_ongoing_requests`, `max_queued_requests` wait at each proxy, and
what comes on top is answered with 429 and Retry-After. How many requests are under way and waiting decides how many
replicas there are, down to none. What is counted in a server is counted in each replica: metrics, quotas,
Idempotency-Keys. Secrets are no arguments, since Ray shows those in its dashboard: each node's environment has them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fluxfire import ArgumentError
from fluxfire.serve.app import create_app
from fluxfire.serve.redact import log_to_stderr
from fluxfire.serve.settings import Settings, read_settings, secret_names

try:
    from ray import serve
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"fluxfire on Ray needs {error.name}: pip install 'fluxfire[ray,serve]'") from None

log = logging.getLogger("fluxfire.serve")

CONSTRUCTIONS: Final = 3  # of a replica, before Ray gives up: a model that cannot be loaded stays so


class Options(BaseModel):
    """What a deployment is; every other argument is a setting of the server (`Settings`)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    gpus: NonNegativeFloat = 1  # of a replica
    cpus: NonNegativeFloat = 2
    min_replicas: NonNegativeInt = 0
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 4  # a replica, under way or waiting: a batch
    max_ongoing_requests: PositiveInt = 8  # a batch and the one after it, so that the GPU never waits
    max_queued_requests: PositiveInt = 64  # at each proxy
    retry_after_s: PositiveInt = 5
    upscale_delay_s: NonNegativeFloat = 10
    downscale_delay_s: NonNegativeFloat = 600  # a new replica has to load its weights
    drain_s: PositiveFloat = 120


def build(options: Options) -> serve.Application:
    """The application, as `serve run`, `serve deploy` and `serve.run` take it.

    Raises:
        ArgumentError: an argument is no setting, or a secret.
    """
    settings = options.model_extra or {}
    if secret := sorted(settings.keys() & secret_names()):
        raise ArgumentError(f"{secret[0]} is a secret: set it in the environment of every node, not as an argument")
    if unknown := sorted(settings.keys() - Settings.model_fields.keys()):
        known = sorted((Options.model_fields.keys() | Settings.model_fields.keys()) - secret_names())
        raise ArgumentError(f"found {unknown[0]}, needed one of {', '.join(known)}")
    deployment = serve.deployment(
        name="fluxfire",
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_ongoing_requests,
            "upscale_delay_s": options.upscale_delay_s,
            "downscale_delay_s": options.downscale_delay_s,
        },
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": options.retry_after_s},
        graceful_shutdown_timeout_s=options.drain_s,
        max_constructor_retry_count=CONSTRUCTIONS,
    )
    return deployment(Replica).bind(settings)


@serve.ingress()
class Replica:
    """A server, built and warmed where it runs.

    Args:
        given: settings that go before those of the node's environment.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self._settings = read_settings(given)
        log_to_stderr(self._settings.secrets())
        self._reason: str | None = None  # why the model could not be loaded
        self._ready_at = time.monotonic()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray hands requests to."""
        app = create_app(self._settings, self._cannot_start)
        self._engine = app.state.desk.engine
        running = app.router.lifespan_context

        @asynccontextmanager
        async def warm(app: FastAPI) -> AsyncIterator[None]:
            async with running(app):
                while not self._engine.ready:
                    if self._reason:
                        raise RuntimeError(f"the model could not be loaded: {self._reason}")
                    await asyncio.sleep(0.1)
                yield

        app.router.lifespan_context = warm
        return app

    async def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that fails three times: a worker that dies is the server's to replace.

        Raises:
            RuntimeError: no worker has been warm for as long as one may be silent.
        """
        now = time.monotonic()
        if self._engine.ready:
            self._ready_at = now
        elif now - self._ready_at > self._settings.silence_s:
            raise RuntimeError(f"no warm worker for {now - self._ready_at:.0f} s")

    def _cannot_start(self, reason: str) -> None:
        log.error("the model could not be loaded: %s", reason)
        self._reason = reason
