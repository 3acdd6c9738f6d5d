"""What is made, as plain values: a `Job` is one request, and its `Picture`s are what batches are made of.

A job collects *events*: previews, pictures, an end; for a `live` order also its place in the queue and its steps. Any
number of requests may follow it (those that repeat an `Idempotency-Key`), each from the first event on; the server
forgets it when nobody can ask for it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from fluxfire.serve.errors import ServeError

Format = Literal["png", "jpeg", "webp"]
Output = Literal["base64", "url", "bytes"]
STAGES: Final = ("queue", "prepare", "denoise", "previews", "decode", "encode")  # as a picture passes them


@dataclass(frozen=True, slots=True)
class Facts:
    """What the worker says of its model once it is warm."""

    name: str
    side: int  # of a picture when no size is asked
    steps: int
    guidance: float
    multiple: int  # sides are multiples of this
    text_tokens: int
    takes_picture: bool
    cache_threshold: float | None  # when none is asked; None: there is no cache
    device: str
    pixels_at_once: int | None  # most pixels of one batch that fit into the GPU's memory; None: no limit known
    seconds_per_cost: float  # measured while warming up, until requests are measured
    steps_only: int | None = None  # the cache's schedule takes no other number; None: any
    styles: tuple[str, ...] = ()  # words for the page to offer; "" is none
    examples: tuple[str, ...] = ()  # prompts for the page to offer


@dataclass(frozen=True, slots=True)
class Pixels:
    """An RGB picture: 3 bytes a pixel, row by row."""

    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True, slots=True)
class Shape:
    """All that has to be equal for pictures to be made in one batch."""

    width: int
    height: int
    steps: int
    guidance: float
    cache_threshold: float | None
    reference: tuple[int, int] | None  # width, height

    @property
    def pixels(self) -> int:
        """Pixels that the denoiser sees for one picture, its reference included."""
        return self.width * self.height + (self.reference[0] * self.reference[1] if self.reference else 0)

    @property
    def cost(self) -> int:
        """Of one picture, in pixels x steps."""
        return self.pixels * self.steps


@dataclass(frozen=True, slots=True)
class Order:
    """One request, checked: what to make, and how to hand it over."""

    prompt: str
    shape: Shape
    seeds: tuple[int, ...]  # one a picture
    reference: Pixels | None
    previews: tuple[int, ...]  # steps after which a preview is made
    format: Format
    quality: int  # of JPEG and WebP, 1 to 100
    output: Output
    live: bool = False  # whether each step is told

    @property
    def cost(self) -> int:
        """In pixels x steps."""
        return self.shape.cost * len(self.seeds)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The job's first picture waits."""

    ahead: int  # pictures that wait before it or are being made


@dataclass(frozen=True, slots=True)
class Begun:
    """A picture's batch has begun."""

    index: int  # which picture of the job
    batch: int  # how many pictures are made with it


@dataclass(frozen=True, slots=True)
class Stepped:
    """A denoising step of a picture is done."""

    index: int
    step: int  # from 0
    hit: bool | None  # whether the cache skipped it; None: there is no cache
    distance: float | None  # to the last computed step; None: nothing to compare with


@dataclass(frozen=True, slots=True)
class Preview:
    """A picture on the way: what the denoiser would end with, seen from one of its steps."""

    index: int  # which picture of the job
    number: int  # which preview of that picture, from 0
    data: bytes


@dataclass(frozen=True, slots=True)
class Made:
    """One finished picture."""

    index: int
    seed: int
    data: bytes
    url: str | None  # where it is kept, if that was asked and worked
    hits: int  # denoiser calls that the cache skipped
    computed: int
    seconds: dict[str, float]  # by stage


Event = Waiting | Begun | Stepped | Preview | Made


@dataclass(slots=True, eq=False)
class Picture:
    """One picture of a job, waiting or being made."""

    job: Job
    index: int
    finishing: asyncio.Task[None] | None = None  # what was begun last of encoding and keeping


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way."""

    name: str
    order: Order
    queued_at: float  # seconds of the event loop's clock
    keeps: bool = False  # goes on when its client has gone: an Idempotency-Key says that the client comes back
    followers: int = 0
    events: list[Event] = field(default_factory=list)
    error: ServeError | None = None
    ended: bool = False
    on_end: Callable[[], None] = lambda: None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pictures(self) -> list[Made]:
        """What is finished, in the order of the seeds."""
        return sorted((event for event in self.events if isinstance(event, Made)), key=lambda made: made.index)

    def tell(self, event: Event) -> None:
        """Adds an event; the last picture ends the job."""
        if self.ended:
            return
        self.events.append(event)
        if len(self.pictures) == len(self.order.seeds):
            self.ended = True
            self.on_end()
        self._wake()

    def fail(self, error: ServeError) -> None:
        """Ends the job with an error, unless it has ended."""
        if not self.ended:
            self.ended, self.error = True, error
            self.on_end()
            self._wake()

    async def follow(self) -> AsyncIterator[Event]:
        """Every event from the first on, as they come.

        Raises:
            ServeError: how the job failed.
        """
        seen = 0
        while True:
            news = self._news
            while seen < len(self.events):
                seen += 1
                yield self.events[seen - 1]
            if self.ended and seen == len(self.events):
                break
            await news.wait()
        if self.error:
            raise self.error

    async def result(self) -> list[Made]:
        """All pictures.

        Raises:
            ServeError: how the job failed.
        """
        async for _ in self.follow():
            pass
        return self.pictures

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
