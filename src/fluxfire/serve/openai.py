"""OpenAI's images API, so that its clients work unmodified: generations, edits, models; plain and streamed.

Left out of it, refused by name instead of ignored: masks, several references, transparent backgrounds, qualities.
Added to it: `steps`, `guidance`, `seed`, `cache_threshold` (clients send them by `extra_body`). *Usage* counts what the
denoiser saw: its text tokens, and a token for 16 x 16 pixels of picture.
"""

from __future__ import annotations

import base64
import time
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from fluxfire.serve.asks import Generation, order_of_generation
from fluxfire.serve.desk import Desk
from fluxfire.serve.errors import ServeError, invalid
from fluxfire.serve.jobs import Event, Facts, Job, Made, Preview
from fluxfire.serve.stream import Told, stream

router = APIRouter(prefix="/v1")

MAX_FORM_FIELDS: Final = 32
EDIT_FORM: Final[dict[str, Any]] = Generation.model_json_schema()
EDIT_FORM["properties"]["image"] = {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP."}
EDIT_FORM["required"].append("image")
EDIT_DOCS: Final = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": EDIT_FORM}}}}


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(request.app.state.desk.facts)]}


@router.get("/models/{name}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """The one model that is served, by its name."""
    facts: Facts = request.app.state.desk.facts
    if name != facts.name:
        raise ServeError(404, f"this server has the model {facts.name} alone", code="model_not_found", param="model")
    return _model(facts)


@router.post("/images/generations", response_model=None)
async def generations(ask: Generation, request: Request) -> Response:
    """Pictures from a prompt."""
    return await _answer(ask, None, request, "image_generation")


@router.post("/images/edits", openapi_extra=EDIT_DOCS, response_model=None)
async def edits(request: Request) -> Response:
    """A picture changed by a prompt; the request is a multipart form."""
    ask, data = await _form(request)
    return await _answer(ask, data, request, "image_edit")


async def _form(request: Request) -> tuple[Generation, bytes]:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise invalid(None, "needed a multipart form with the fields image and prompt")
    fields: dict[str, str] = {}
    files: list[bytes] = []
    async with request.form(max_files=16, max_fields=MAX_FORM_FIELDS) as form:
        for name, value in form.multi_items():
            if name in ("image", "image[]"):
                if not isinstance(value, UploadFile):
                    raise invalid("image", "found text, needed a file; URLs are not fetched")
                files.append(await value.read())
            elif isinstance(value, UploadFile):
                meant = "masks are not supported: the whole picture is edited" if name == "mask" else "unknown file"
                raise invalid(name, meant)
            elif name in fields:
                raise invalid(name, "found twice")
            else:
                fields[name] = value
    if len(files) != 1:
        raise invalid("image", f"found {len(files)} pictures, needed 1")
    try:
        return Generation.model_validate(fields), files[0]
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


async def _answer(ask: Generation, data: bytes | None, request: Request, kind: str) -> Response:
    desk: Desk = request.app.state.desk
    order = order_of_generation(ask, data, desk.settings, desk.facts)
    job = await desk.take(request, (ask.model_dump_json().encode(), data or b""), order)
    if ask.stream:
        return stream(desk, job, request, lambda event: _event(event, job, desk.facts, kind))
    made = await desk.pictures(job, request)
    pictures = [{"url": desk.url(one, request)} if one.url else {"b64_json": _text(one)} for one in made]
    return JSONResponse(
        {
            "created": int(time.time()),
            "background": "opaque",
            "data": pictures,
            "output_format": job.order.format,
            "size": _size(job),
            "seeds": job.order.seeds,
            "usage": _usage(job, desk.facts, len(made)),
        }
    )


def _event(event: Event, job: Job, facts: Facts, kind: str) -> Told | None:
    if not isinstance(event, Preview | Made):
        return None
    name = f"{kind}.completed" if isinstance(event, Made) else f"{kind}.partial_image"
    values: dict[str, Any] = {
        "type": name,
        "b64_json": _text(event),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": job.order.format,
        "quality": "auto",
        "size": _size(job),
    }
    if isinstance(event, Made):
        return name, values | {"seed": event.seed, "usage": _usage(job, facts, 1)}
    return name, values | {"partial_image_index": event.number}


def _text(event: Preview | Made) -> str:
    return base64.b64encode(event.data).decode()


def _size(job: Job) -> str:
    return f"{job.order.shape.width}x{job.order.shape.height}"


def _usage(job: Job, facts: Facts, pictures: int) -> dict[str, Any]:
    shape, token = job.order.shape, facts.multiple**2
    made = shape.width * shape.height // token * pictures
    text, seen = facts.text_tokens * pictures, shape.pixels // token * pictures
    given = {"text_tokens": text, "image_tokens": seen - made}
    total = text + seen
    return {"input_tokens": total - made, "input_tokens_details": given, "output_tokens": made, "total_tokens": total}


def _model(facts: Facts) -> dict[str, Any]:
    return {"id": facts.name, "object": "model", "created": 0, "owned_by": "fluxfire"}
