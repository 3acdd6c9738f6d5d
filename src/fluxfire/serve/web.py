"""The page at `/`, for people: plain files in `page/`, and what the page has to know of this server.

It loads nothing from elsewhere and asks for pictures as every other client does, by `/inference`. The policy below lets
a browser run its scripts and no others, and lets no script turn text into markup.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

import fluxfire
from fluxfire.serve.desk import Desk
from fluxfire.serve.errors import ServeError

router = APIRouter()

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
KINDS: Final = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
FILES: Final = (
    *("index.html", "page.css", "icon.svg"),
    *("main.js", "form.js", "server.js", "run.js", "compare.js", "charts.js", "dom.js"),
)


class About(BaseModel):
    """What can be asked of this server."""

    version: str
    model: str
    device: str
    side: int
    steps: int
    guidance: float
    cache_threshold: float | None
    takes_picture: bool
    multiple: int
    styles: tuple[str, ...]
    examples: tuple[str, ...]
    max_steps: int
    max_pixels: int
    max_body_bytes: int


@router.get("/", response_class=Response, include_in_schema=False)
def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/page/{name}", response_class=Response, include_in_schema=False)
def part(name: str) -> Response:
    """One of the page's files."""
    return _file(name)


@router.get("/about")
async def about(request: Request) -> About:
    """The model and the limits."""
    desk: Desk = request.app.state.desk
    facts, settings = desk.facts, desk.settings
    return About(
        version=fluxfire.__version__,
        model=facts.name,
        device=facts.device,
        side=facts.side,
        steps=facts.steps,
        guidance=facts.guidance,
        cache_threshold=facts.cache_threshold,
        takes_picture=facts.takes_picture,
        multiple=facts.multiple,
        styles=facts.styles,
        examples=facts.examples,
        max_steps=settings.max_steps,
        max_pixels=settings.max_pixels,
        max_body_bytes=settings.max_body_bytes,
    )


def _file(name: str) -> Response:
    if name not in FILES:  # so no name leads out of the folder
        raise ServeError(404, "the page has no such file", code="not_found")
    data = (files("fluxfire.serve") / "page" / name).read_bytes()
    return Response(data, media_type=KINDS[name.rsplit(".", 1)[1]], headers=HEADERS)
