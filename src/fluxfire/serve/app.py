"""The application: routes, the guard around them, and errors as OpenAI's clients read them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import fluxfire
from fluxfire.serve import inference, openai, status, web
from fluxfire.serve.desk import ClientGone, Desk
from fluxfire.serve.engine import Engine
from fluxfire.serve.errors import ServeError
from fluxfire.serve.guard import Guard
from fluxfire.serve.metrics import Metrics
from fluxfire.serve.results import Finisher
from fluxfire.serve.settings import Settings
from fluxfire.serve.storage import Keeper

log = logging.getLogger("fluxfire.serve")


def create_app(settings: Settings, cannot_start: Callable[[str], None] = log.error) -> FastAPI:
    """The server as an ASGI application; its worker lives as long as its lifespan.

    Args:
        settings: all there is to set.
        cannot_start: called with the reason when the model cannot be loaded.
    """
    metrics = Metrics()
    keeper = Keeper(settings, metrics)
    engine = Engine(settings, metrics, Finisher(keeper, metrics), cannot_start)
    desk = Desk(settings, engine, keeper, metrics)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(
        title="fluxfire", version=fluxfire.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )  # no pages that load scripts from elsewhere
    app.state.desk = desk
    for routes in (inference.router, openai.router, status.router, web.router):
        app.include_router(routes)
    app.add_exception_handler(ServeError, _told)
    app.add_exception_handler(RequestValidationError, _unprocessable)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGone, _nobody)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Guard, desk=desk)
    return app


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    request.app.state.desk.metrics.rejections.labels(error.code).inc()
    return error.response()


async def _unprocessable(request: Request, error: Exception) -> Response:
    """The first thing that pydantic found, without what it was given: that can be megabytes, or secret."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid" or first["loc"] == ("body",):
        message = "this needs a JSON object, sent as Content-Type: application/json"
        return await _told(request, ServeError(422, message, code="invalid_value"))
    where = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(where) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    code = "unknown_field" if first["type"] == "extra_forbidden" else "invalid_value"
    return await _told(request, ServeError(422, message, code=code, param=param))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = ServeError(error.status_code, str(error.detail), code="http_error").response()
    response.headers.update(error.headers or {})
    return response


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # sent to a closed connection; counted as such


async def _unexpected(request: Request, error: Exception) -> Response:
    """An error of ours: the log has it, the client only that it happened."""
    return ServeError(500, "the server failed on this request", code="internal_error").response()
