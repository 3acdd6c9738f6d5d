"""What clients may send, field by field, and how it becomes an `Order`.

The models here bound what can be bounded without knowing the server; `order()` checks the rest against the settings and
against what the model can do. Unknown fields are refused: a misspelt one would otherwise be ignored silently.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from fluxfire.serve import pictures
from fluxfire.serve.errors import ServeError, invalid
from fluxfire.serve.jobs import Facts, Format, Order, Output, Shape
from fluxfire.serve.settings import Settings

Prompt = Annotated[str, Field(min_length=1, max_length=8000, description="What to draw, or what to change.")]
Count = Annotated[int, Field(ge=1, description="How many pictures.")]
Steps = Annotated[int, Field(ge=1, description="Denoising steps; the model's own number when left out.")]
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, description="Embedded guidance.")]
Seed = Annotated[
    int, Field(ge=0, lt=2**53, description="Of the first picture; the next ones count up. Random if absent.")
]
Threshold = Annotated[
    float, Field(ge=0, le=10, allow_inf_nan=False, description="The cache's for this request; 0 computes every step.")
]
Quality = Annotated[int, Field(ge=1, le=100, description="Of JPEG and WebP.")]

STREAM_PREVIEWS: Final = 3  # as OpenAI
MAX_PREVIEWS: Final = 10  # each costs a decoding
DECODING: Final = ThreadPoolExecutor(2)  # so few: a file of some kB may be a picture of 200 MB


class Ask(BaseModel):
    """What every kind of request comes to."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt
    steps: Steps | None = None
    guidance: Guidance | None = None
    seed: Seed | None = None
    cache_threshold: Threshold | None = None


class Inference(Ask):
    """`POST /inference`."""

    image: str | None = Field(None, description="A picture to edit, as data URI or base64: PNG, JPEG or WebP.")
    num_images: Count = 1
    width: Annotated[int, Field(ge=1)] | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    format: Format = "png"
    quality: Quality = 90
    output: Output = Field("base64", description="`bytes`: the answer is the picture itself.")
    stream: bool = Field(False, description="Answer in server-sent events: place in the queue, steps, pictures.")
    previews: Annotated[int, Field(ge=0, le=MAX_PREVIEWS, description="Pictures on the way, in a stream.")] = 0


class Generation(Ask):
    """`POST /v1/images/generations`: OpenAI's fields that mean something here, and four of our own."""

    model: str | None = None
    n: Count | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=1, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=STREAM_PREVIEWS)] | None = None
    user: str | None = None

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """Width and height, if the size says them."""
        found = re.fullmatch(r"(\d+)x(\d+)", self.size or "")
        return (int(found[1]), int(found[2])) if found else (None, None)


async def order_of_inference(ask: Inference, settings: Settings, facts: Facts) -> Order:
    """Checks a request of `/inference`.

    Raises:
        ServeError: which field cannot be used, and why.
    """
    if ask.output == "bytes" and ask.num_images > 1:
        raise invalid("num_images", "found more than 1, and an answer in bytes has one picture")
    if ask.stream and ask.output == "bytes":
        raise invalid("output", "a stream carries text: use base64 or url")
    if ask.previews and not ask.stream:
        raise invalid("previews", "only a stream has previews: add stream=true")
    data = pictures.from_text(ask.image, "image") if ask.image is not None else None
    checks = _Checks(ask, "num_images", settings, facts)
    shape = checks.shape(ask.num_images, (ask.width, ask.height), data)
    previews = _preview_steps(ask.previews, shape.steps)
    output = ask.format, ask.quality, ask.output
    return await checks.order(shape, data, ask.num_images, previews, *output, live=ask.stream)


async def order_of_generation(ask: Generation, data: bytes | None, settings: Settings, facts: Facts) -> Order:
    """Checks a request of OpenAI's kinds; `data` is the picture to edit.

    Raises:
        ServeError: which field cannot be used, and why.
    """
    if ask.model is not None and ask.model != facts.name:
        raise ServeError(404, f"this server has the model {facts.name} alone", code="model_not_found", param="model")
    if ask.output_compression is not None and ask.output_format in (None, "png"):
        raise invalid("output_compression", "PNG has none: ask for output_format jpeg or webp")
    if ask.stream and ask.response_format == "url":
        raise invalid("response_format", "a stream carries the pictures themselves: use b64_json")
    if ask.partial_images and not ask.stream:
        raise invalid("partial_images", "only a stream has partial pictures: add stream=true")
    checks = _Checks(ask, "n", settings, facts)
    count = ask.n or 1
    shape = checks.shape(count, ask.sides, data)
    previews = _preview_steps(ask.partial_images or 0, shape.steps)
    output: Output = "url" if ask.response_format == "url" else "base64"
    quality = ask.output_compression or 90
    return await checks.order(shape, data, count, previews, ask.output_format or "png", quality, output)


class _Checks:
    def __init__(self, ask: Ask, count_field: str, settings: Settings, facts: Facts) -> None:
        self._ask, self._count_field, self._settings, self._facts = ask, count_field, settings, facts

    def shape(self, count: int, sides: tuple[int | None, int | None], data: bytes | None) -> Shape:
        """The shape of the pictures, with everything bounded before a picture is decoded."""
        ask, settings, facts = self._ask, self._settings, self._facts
        if count > settings.max_pictures:
            raise invalid(self._count_field, f"found {count}, at most {settings.max_pictures} are made at once")
        if ask.steps is not None and ask.steps > settings.max_steps:
            raise invalid("steps", f"found {ask.steps}, at most {settings.max_steps} are made")
        threshold = facts.cache_threshold if ask.cache_threshold is None else ask.cache_threshold
        if facts.steps_only and threshold and ask.steps not in (None, facts.steps_only):
            needed = f"needed {facts.steps_only}, for which this server's cache has a schedule, or cache_threshold 0"
            raise invalid("steps", f"found {ask.steps}, {needed}")
        if ask.cache_threshold is not None and facts.cache_threshold is None:
            raise invalid("cache_threshold", "this server runs without the cache: leave it out")
        if data is not None and not facts.takes_picture:
            raise invalid("image", f"{facts.name} makes pictures from text alone")
        width, height = self._size(sides, data)
        reference = _fitted(data, width * height, facts.multiple) if data is not None else None
        guidance = facts.guidance if ask.guidance is None else ask.guidance
        shape = Shape(width, height, ask.steps or facts.steps, guidance, threshold, reference)
        if facts.pixels_at_once is not None and shape.pixels > facts.pixels_at_once:
            found = f"found {shape.pixels} pixels with the reference, the memory of this server's GPU is enough for"
            raise invalid("size", f"{found} about {facts.pixels_at_once}", code="picture_too_large")
        return shape

    async def order(
        self,
        shape: Shape,
        data: bytes | None,
        count: int,
        previews: tuple[int, ...],
        format: Format,
        quality: int,
        output: Output,
        live: bool = False,
    ) -> Order:
        """The whole order; the picture is decoded in a thread."""
        reference = None
        if data is not None:
            most, area = self._settings.max_input_pixels, shape.width * shape.height
            work = partial(pictures.reference, data, "image", most, area, self._facts.multiple)
            reference = await asyncio.get_running_loop().run_in_executor(DECODING, work)
            shape = replace(shape, reference=(reference.width, reference.height))  # its EXIF may have turned it
        first = secrets.randbelow(2**32) if self._ask.seed is None else self._ask.seed
        seeds = tuple(range(first, first + count))
        return Order(self._ask.prompt, shape, seeds, reference, previews, format, quality, output, live)

    def _size(self, sides: tuple[int | None, int | None], data: bytes | None) -> tuple[int, int]:
        """What is asked; else the reference's aspect at the model's own area; else the model's own size."""
        side, multiple = self._facts.side, self._facts.multiple
        if sides == (None, None) and data is not None:
            return _fitted(data, side * side, multiple)
        width, height = (side if given is None else given for given in sides)
        for name, value in (("width", width), ("height", height)):
            if value % multiple:
                below = value // multiple * multiple
                near = f"{below} or {below + multiple}" if below else str(multiple)
                raise invalid(name, f"found {value}, needed a multiple of {multiple}, such as {near}")
        if width * height > self._settings.max_pixels:
            found = f"found {width}x{height} pixels, at most {self._settings.max_pixels} are made"
            raise invalid("size", found, code="picture_too_large")
        if max(width, height) > pictures.MAX_ASPECT * min(width, height):
            raise invalid("size", f"found {width}x{height}, needed sides of at most 1 to {pictures.MAX_ASPECT}")
        return width, height


def _fitted(data: bytes, area: int, multiple: int) -> tuple[int, int]:
    return pictures.fitted(pictures.size_of(data, "image"), area, multiple)


def _preview_steps(count: int, steps: int) -> tuple[int, ...]:
    """Evenly over the steps; not the first (nothing to extrapolate from), not the last (that is the picture)."""
    wanted = (round(steps * (number + 1) / (count + 1)) - 1 for number in range(count))
    return tuple(sorted({step for step in wanted if 1 <= step < steps - 1}))
