"""`POST /inference`: one request with every dial, one answer with pictures, seeds, times and the cache's counts.

With `stream` the answer is server-sent events: "order" (what will be made, with its seeds), "waiting" (pictures ahead
in the queue), "begun", "step" (with what the cache decided), "preview", "picture", and "error" if it fails.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from fluxfire.serve.asks import Inference, order_of_inference
from fluxfire.serve.desk import Desk
from fluxfire.serve.jobs import STAGES, Begun, Event, Job, Made, Preview, Stepped, Waiting
from fluxfire.serve.stream import Told, stream

router = APIRouter()

STREAM_DOCS: Final[dict[int | str, dict[str, Any]]] = {200: {"content": {"text/event-stream": {}}}}


class InferencePicture(BaseModel):
    """One picture: `base64` or, when that was asked and could be kept, `url`."""

    seed: int
    base64: str | None = None
    url: str | None = None
    cached_steps: int
    computed_steps: int
    timings_s: dict[str, float]


class InferenceHead(BaseModel):
    """What is made."""

    id: str
    model: str
    width: int
    height: int
    steps: int
    format: str
    cache_threshold: float | None


class InferenceAnswer(InferenceHead):
    """What `POST /inference` gives."""

    pictures: list[InferencePicture]


@router.post("/inference", response_model=InferenceAnswer, responses=STREAM_DOCS)
async def inference(ask: Inference, request: Request) -> Response:
    """Makes pictures from a prompt, or edits one."""
    desk: Desk = request.app.state.desk
    order = order_of_inference(ask, desk.settings, desk.facts)
    job = await desk.take(request, (ask.model_dump_json().encode(),), order)
    if ask.stream:
        told = ("order", _head(job, desk) | {"seeds": job.order.seeds})
        return stream(desk, job, request, lambda event: _event(event, desk, request), told)
    made = await desk.pictures(job, request)
    if job.order.output == "bytes":
        return Response(made[0].data, media_type=f"image/{job.order.format}", headers=_headers(made[0]))
    pictures = [_picture(one, desk.url(one, request)) for one in made]
    answer = InferenceAnswer(**_head(job, desk), pictures=pictures)
    return Response(answer.model_dump_json(), media_type="application/json")


def _head(job: Job, desk: Desk) -> dict[str, Any]:
    shape = job.order.shape
    return {
        "id": job.name,
        "model": desk.facts.name,
        "width": shape.width,
        "height": shape.height,
        "steps": shape.steps,
        "format": job.order.format,
        "cache_threshold": shape.cache_threshold,
    }


def _event(event: Event, desk: Desk, request: Request) -> Told:
    match event:
        case Waiting() | Begun() | Stepped():
            name = {Waiting: "waiting", Begun: "begun", Stepped: "step"}[type(event)]
            return name, dataclasses.asdict(event)
        case Preview():
            text = base64.b64encode(event.data).decode()
            return "preview", {"index": event.index, "number": event.number, "base64": text}
        case Made():
            return "picture", {"index": event.index} | _picture(event, desk.url(event, request)).model_dump()


def _picture(made: Made, url: str | None) -> InferencePicture:
    return InferencePicture(
        seed=made.seed,
        base64=None if url else base64.b64encode(made.data).decode(),
        url=url,
        cached_steps=made.hits,
        computed_steps=made.computed,
        timings_s={stage: round(made.seconds[stage], 4) for stage in STAGES},
    )


def _headers(made: Made) -> dict[str, str]:
    """What the JSON would say, for an answer that is the picture."""
    times = [f"{stage};dur={made.seconds[stage] * 1000:.1f}" for stage in STAGES]
    cache = {"cached_steps": made.hits, "computed_steps": made.computed}
    return {"X-Seed": str(made.seed), "Server-Timing": ", ".join(times), "X-Cache-Steps": json.dumps(cache)}
