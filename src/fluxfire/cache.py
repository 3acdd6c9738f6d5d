"""The cache as a step: put it on, change its threshold, read its counts.

How it works stands in `first_block.py`; `paraattn.py` is the same with ParaAttention's own code deciding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, Literal, cast

from typing_extensions import TypeIs

from fluxfire.blocks import compiled_by_others, denoiser_of, family_of, parallel
from fluxfire.errors import ArgumentError, NotOptimizedError
from fluxfire.first_block import Batch, FirstBlockCache
from fluxfire.paraattn import ParaAttnCache, check_paraattn
from fluxfire.patches import applying, handle_of
from fluxfire.plan import Handle, Step
from fluxfire.stats import CacheStats

Backend = Literal["fluxfire", "para-attn"]
BACKENDS: Final = ("fluxfire", "para-attn")


def check_cache(
    pipe: Any,
    threshold: float = 0.12,
    *,
    warmup_steps: int = 0,
    max_consecutive_hits: int | None = None,
    batch: Batch = "sample",
    backend: Backend = "fluxfire",
) -> str | None:
    """Why `apply_cache` with these arguments would refuse this pipeline, or None.

    Raises:
        ArgumentError: an argument that no pipeline could take.
        NotFluxError: `pipe` is no FLUX pipeline.
    """
    _check_threshold(threshold)
    if not _is_count(warmup_steps, 0):
        raise ArgumentError(f"warmup_steps: found {warmup_steps!r}, needed a number of steps, 0 or more")
    if max_consecutive_hits is not None and not _is_count(max_consecutive_hits, 1):
        raise ArgumentError(
            f"max_consecutive_hits: found {max_consecutive_hits!r}, needed 1 or more, or None: no limit"
        )
    if batch not in ("sample", "any"):
        raise ArgumentError(f'batch: found {batch!r}, needed "sample" (each decides) or "any" (one miss computes all)')
    if backend not in BACKENDS:
        raise ArgumentError(f"backend: found {backend!r}, needed one of {', '.join(map(repr, BACKENDS))}")
    denoiser = denoiser_of(pipe)
    blocks = family_of(pipe).blocks(denoiser)
    if len(blocks) < 2:
        return f"found {len(blocks)} block in {type(denoiser).__name__}, needed at least 2: there is nothing to skip"
    if getattr(denoiser, "is_cache_enabled", False):
        return "a cache of diffusers is enabled: call pipe.transformer.disable_cache() first"
    if reason := compiled_by_others((denoiser, *blocks)) or parallel(denoiser):
        return reason
    if backend == "para-attn":
        return check_paraattn(pipe, warmup_steps=warmup_steps, max_consecutive_hits=max_consecutive_hits)
    return None


def apply_cache(
    pipe: Any,
    threshold: float = 0.12,
    *,
    warmup_steps: int = 0,
    max_consecutive_hits: int | None = None,
    batch: Batch = "sample",
    backend: Backend = "fluxfire",
) -> Any:
    """First-block cache: skips blocks 2..n where block 1's residual hardly changed. Approximate.

    Args:
        pipe: a FLUX pipeline, changed in place.
        threshold: relative L1 distance below which a call is a hit. 0 never hits and is bit-identical. 0.12 is what
            ParaAttention's article uses for FLUX.1-dev with float8 (its own measurements, 28 steps at 1024x1024).
        warmup_steps: the first steps of every run that are always computed.
        max_consecutive_hits: most hits in a row for one sample; None for no limit.
        batch: "sample": each sample of a batch decides for itself; "any": one miss computes all.
        backend: "fluxfire"; or "para-attn", whose own code decides then (one decision a batch): for comparison.

    Returns:
        The same pipe.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.
    """
    own = backend == "fluxfire"
    knobs: dict[str, Any] = {"warmup_steps": warmup_steps, "max_consecutive_hits": max_consecutive_hits}
    reason = check_cache(pipe, threshold, batch=batch, backend=backend, **knobs)
    knobs = knobs | {"batch": batch} if own else {"backend": backend}
    with applying(pipe, Step("cache", "approximate", (("threshold", threshold), *knobs.items())), reason) as handle:
        cache = FirstBlockCache(pipe, warmup_steps, max_consecutive_hits, batch) if own else ParaAttnCache(pipe)
        cache.threshold = float(threshold)
        cache.install(handle)
        handle.states["cache"] = cache
    return pipe


def set_cache_threshold(pipe: Any, threshold: float) -> Any:
    """Changes the threshold of an applied cache, from the next denoiser call on: no rewrapping, no recompilation.

    Raises:
        ArgumentError: not a number of 0 or more.
        NotOptimizedError: the pipeline has no cache.
    """
    _check_threshold(threshold)
    _cache_of(pipe).threshold = float(threshold)
    steps = cast(Handle, handle_of(pipe)).steps
    index = next(i for i, step in enumerate(steps) if step.name == "cache")
    settings = dict(steps[index].settings) | {"threshold": threshold}
    steps[index] = replace(steps[index], settings=tuple(settings.items()))
    return pipe


def cache_stats(pipe: Any) -> CacheStats:
    """Hits and computed calls since `apply_cache`, and the last run's decisions.

    Raises:
        NotOptimizedError: the pipeline has no cache.
    """
    return _cache_of(pipe).stats()


def _cache_of(pipe: Any) -> FirstBlockCache:
    handle = handle_of(pipe)
    cache = handle.states.get("cache") if handle else None
    if not isinstance(cache, FirstBlockCache):
        raise NotOptimizedError("found no cache on this pipeline: call fluxfire.apply_cache(pipe) first")
    return cache


def _is_count(value: object, least: int) -> TypeIs[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_threshold(threshold: float) -> None:
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not threshold >= 0:  # nan is not >= 0
        raise ArgumentError(f"threshold: found {threshold!r}, needed a number of 0 (never hits) or more, such as 0.12")
