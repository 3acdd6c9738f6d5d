"""In the worker: one batch of pictures through the pipeline, with its previews, its cancellation and its times.

Every picture of a batch has a generator of its own, so its noise does not depend on who it was batched with. The
pipeline's own call is used; what the server needs to see happens in `callback_on_step_end`:

- Cancellation: when nobody waits for any picture of the batch, the call is left by an exception after the present step,
  before the decoder runs. When some are left, those that nobody waits for are taken out before decoding.
- A preview is decoded from the estimate of the end that the last step implies: with latents x at noise level s,
  v = (x - x') / (s - s') and x0 = x - s v, where ' is the step before. It costs one decode of one picture.

Times are seconds: *prepare* until the first denoiser call (text encoders, the reference picture), *denoise*, *previews*
(which are no part of *denoise*), *decode*.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

import fluxfire
from fluxfire.serve.jobs import Pixels, Shape
from fluxfire.serve.model import Model


class Cancelled(Exception):
    """Nobody waits for any picture of this batch."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture of a batch."""

    name: str
    prompt: str
    seed: int
    reference: Pixels | None = None
    previews: tuple[int, ...] = ()


@dataclass(slots=True)
class Output:
    """What came of one picture."""

    name: str
    pixels: Pixels
    hits: int
    computed: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What the cache did with one picture in one step."""

    name: str
    hit: bool | None  # None: there is no cache
    distance: float | None  # None: nothing to compare with


@dataclass(slots=True)
class Watch:
    """Who looks on: which pictures nobody waits for, and who is told of steps and previews."""

    cancelled: Callable[[str], bool] = lambda name: False
    step: Callable[[int, list[Decision]], None] = lambda step, decisions: None
    preview: Callable[[str, int, Pixels], None] = lambda name, number, pixels: None


def generate(
    model: Model, shape: Shape, samples: Sequence[Sample], watch: Watch
) -> tuple[list[Output], dict[str, float]]:
    """Makes a batch.

    Returns:
        The pictures that somebody still waits for, and the seconds of each stage.

    Raises:
        Cancelled: there was none.
    """
    run = _Run(model, shape, list(samples), watch)
    threshold = shape.cache_threshold
    if threshold is not None and threshold != fluxfire.cache_stats(model.pipe).threshold:  # else a tuned setting stays
        fluxfire.set_cache_threshold(model.pipe, threshold)
    hook = model.pipe.transformer.register_forward_pre_hook(run.on_denoiser)
    try:
        images = model.pipe(**_arguments(model, shape, samples), callback_on_step_end=run.on_step).images
    finally:
        hook.remove()
    decoded = _now(model)
    seconds = {
        "prepare": run.first - run.begin,
        "denoise": run.last - run.first - run.previews_s,
        "previews": run.previews_s,
        "decode": decoded - run.last,
    }
    outputs = [
        Output(sample.name, pixels, *_cache_counts(model, samples.index(sample), shape.cache_threshold))
        for sample, pixels in zip(run.left, map(_pixels, images), strict=True)
    ]
    for output in outputs:
        given = (output.pixels.width, output.pixels.height)
        if given != (shape.width, shape.height):
            raise RuntimeError(f"asked for {shape.width}x{shape.height}, the pipeline gave {given[0]}x{given[1]}")
    return outputs, seconds


def _arguments(model: Model, shape: Shape, samples: Sequence[Sample]) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": [sample.prompt for sample in samples],
        "generator": [torch.Generator().manual_seed(sample.seed) for sample in samples],
        "width": shape.width,
        "height": shape.height,
        "num_inference_steps": shape.steps,
        "guidance_scale": shape.guidance,
        "max_sequence_length": model.text_tokens,
    }
    if model.takes_picture:  # Kontext would scale every picture to max_area, and every reference to its own sizes
        arguments |= {"max_area": shape.width * shape.height, "_auto_resize": False}
    references = [sample.reference for sample in samples if sample.reference]
    if references:
        arguments["image"] = [Image.frombytes("RGB", (r.width, r.height), r.rgb) for r in references]
    return arguments | model.call


def _cache_counts(model: Model, row: int, threshold: float | None) -> tuple[int, int]:
    """Hits and computed denoiser calls of one sample of the last run."""
    if threshold is None:
        return 0, 0
    hits = [call.hits[row] for call in fluxfire.cache_stats(model.pipe).last_run]
    return sum(hits), len(hits) - sum(hits)


def _pixels(image: Image.Image) -> Pixels:
    return Pixels(image.width, image.height, image.convert("RGB").tobytes())


def _now(model: Model) -> float:
    """The time when all that was asked of the device is done."""
    if model.pipe.device.type == "cuda":
        torch.cuda.synchronize(model.pipe.device)
    return time.monotonic()


@dataclass(slots=True)
class _Run:
    """What is known of the run under way."""

    model: Model
    shape: Shape
    left: list[Sample]
    watch: Watch
    begin: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    previews_s: float = 0.0
    before: torch.Tensor | None = None  # the latents after the step before, (B, N, C)

    def on_denoiser(self, *_: object) -> None:
        if not self.first:
            self.first = _now(self.model)

    def on_step(self, pipe: Any, step: int, timestep: object, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.watch.step(step, self._decisions())
        waiting = [row for row, sample in enumerate(self.left) if not self.watch.cancelled(sample.name)]
        if not waiting:
            raise Cancelled
        latents: torch.Tensor = kwargs["latents"]
        if any(sample.previews for sample in self.left):
            self._previews(pipe, step, latents)
            self.before = latents
        if step == self.shape.steps - 1:
            self.last = _now(self.model)
            if len(waiting) < len(self.left):
                self.left = [self.left[row] for row in waiting]
                return {"latents": latents[waiting]}
        return {}

    def _decisions(self) -> list[Decision]:
        if self.shape.cache_threshold is None:
            return [Decision(sample.name, None, None) for sample in self.left]
        call = fluxfire.cache_stats(self.model.pipe).last_run[-1]
        return [
            Decision(sample.name, hit, distance if math.isfinite(distance) else None)
            for sample, hit, distance in zip(self.left, call.hits, call.distances, strict=True)
        ]

    def _previews(self, pipe: Any, step: int, latents: torch.Tensor) -> None:
        rows = [row for row, sample in enumerate(self.left) if step in sample.previews]
        if not rows or self.before is None:
            return
        begin = _now(self.model)
        index = pipe.scheduler.step_index
        noise, noise_before = pipe.scheduler.sigmas[index], pipe.scheduler.sigmas[index - 1]
        velocity = (latents - self.before) / (noise - noise_before)
        end = (latents - noise * velocity)[rows].to(latents.dtype)
        for row, image in zip(rows, _decode(pipe, self.shape, end), strict=True):
            sample = self.left[row]
            self.watch.preview(sample.name, sample.previews.index(step), _pixels(image))
        self.previews_s += _now(self.model) - begin


def _decode(pipe: Any, shape: Shape, latents: torch.Tensor) -> list[Image.Image]:
    """Latents (B, N, C) as pictures, as the pipeline does it at its end."""
    unpacked = pipe._unpack_latents(latents, shape.height, shape.width, pipe.vae_scale_factor)
    unpacked = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(unpacked, return_dict=False)[0]
    images: list[Image.Image] = pipe.image_processor.postprocess(decoded, output_type="pil")
    return images
