"""Pictures made only so that everything is compiled, and kept by the mega-cache, before the first real one.

A picture of two steps (of a cache's schedule: all of its steps) for each size and batch: with dynamic sizes all sizes
share their graphs, but batch 1 and batch >= 2 do not, and what is compiled whole, or with `dynamic=False`, has graphs
for each size.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch

from fluxfire.errors import ArgumentError, NotOptimizedError
from fluxfire.patches import handle_of

STEPS: Final = 2  # the first computes all blocks, the second may be the cache's
_PICTURES: Final = ("image", "mask_image", "control_image")


def warm(
    pipe: Any,
    sizes: Iterable[str | tuple[int, int]],
    *,
    batch: Iterable[int] = (1,),
    call: Mapping[str, Any] | None = None,
) -> dict[tuple[int, int, int], float]:
    """Makes a small picture of each size and batch, so that later ones compile nothing.

    Args:
        pipe: an optimized pipeline, on its device.
        sizes: (width, height), or "1024x768".
        batch: pictures at once.
        call: more arguments of the pipeline's call, such as `prompt_embeds` where it has no text encoder. A class that
            takes pictures gets black ones unless told otherwise here.

    Returns:
        The seconds of each (width, height, batch).

    Raises:
        ArgumentError: no size or batch that could be.
        NotOptimizedError: fluxfire has not touched this pipeline.

    Examples:
        >>> made = fluxfire.warm(fluxfire.apply_cache(pipe), ["48x32"], batch=(1,), call=prompt)
        >>> list(made)
        [(48, 32, 1)]
    """
    if handle_of(pipe) is None:
        raise NotOptimizedError("found a pipeline as it was: call fluxfire.optimize_pipeline(pipe) before warm")
    wanted, counts = [size_of(size) for size in sizes], list(batch)
    if bad := [count for count in counts if type(count) is not int or count < 1]:
        raise ArgumentError(f"batch: found {bad[0]!r}, needed pictures at once: 1 or more")
    seconds: dict[tuple[int, int, int], float] = {}
    for width, height in wanted:
        for count in counts:
            start = time.perf_counter()
            with torch.no_grad():
                pipe(**(_arguments(pipe, width, height, count) | dict(call or {})))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds[width, height, count] = time.perf_counter() - start
    return seconds


def scheduled_steps(pipe: Any) -> int | None:
    """The only number of denoising steps that the pipeline takes, if its cache has a schedule; None: any."""
    handle = handle_of(pipe)
    cache = [dict(step.settings) for step in handle.steps if step.name == "cache"] if handle else []
    marks = cache[0].get("schedule") if cache else None
    return len(marks) if marks else None


def size_of(size: object) -> tuple[int, int]:
    """Width and height, from a pair or from "1024x768".

    Raises:
        ArgumentError: neither.
    """
    if isinstance(size, str) and (found := re.fullmatch(r"(\d+)x(\d+)", size)):
        size = int(found[1]), int(found[2])
    match size:
        case (int(width), int(height)) if width > 0 < height:
            return width, height
    raise ArgumentError(f'sizes: found {size!r}, needed (width, height) or "1024x768"')


def _arguments(pipe: Any, width: int, height: int, count: int) -> dict[str, Any]:
    known = inspect.signature(type(pipe).__call__).parameters
    found: dict[str, Any] = {
        "width": width,
        "height": height,
        "num_inference_steps": scheduled_steps(pipe) or STEPS,
        "output_type": "pt",
    }
    found |= {"num_images_per_prompt": count}
    if getattr(pipe, "text_encoder", None) is not None:
        found["prompt"] = "a"
    if "max_area" in known:  # Kontext makes larger sizes of both, unless told otherwise
        found |= {"max_area": width * height, "_auto_resize": False}
    if pictures := [name for name in _PICTURES if name in known]:
        from PIL import Image

        found |= dict.fromkeys(pictures, Image.new("RGB", (width, height)))
    return found
