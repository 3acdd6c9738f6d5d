"""What monitors and routers ask: alive, ready, metrics; and the pictures that are kept here."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from fluxfire.serve.desk import Desk
from fluxfire.serve.errors import ServeError, unavailable

router = APIRouter()


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Answers as long as the server runs, also while the model is loaded or computes."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, str]:
    """200 when the worker is warm; 503 before, after it died, and as soon as the server is told to stop."""
    engine = request.app.state.desk.engine
    if engine.draining:
        raise unavailable("the server is stopping", code="stopping")
    if not engine.ready:
        raise unavailable("the worker is not warm", code="not_ready")
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(request.app.state.desk.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/pictures/{name}", response_class=Response)
def picture(name: str, request: Request) -> Response:
    """A picture that is kept here, until it expires."""
    desk: Desk = request.app.state.desk
    data = desk.keeper.local.find(name)
    if data is None:
        raise ServeError(404, "no such picture, or not any more", code="not_found")
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private"}
    return Response(data, media_type=f"image/{name.rsplit('.', 1)[1]}", headers=headers)
