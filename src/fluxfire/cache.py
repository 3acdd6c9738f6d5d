"""The cache as a step: put it on, change its threshold, read its counts.

How it works stands in `first_block.py`; `paraattn.py` is the same with ParaAttention's own code deciding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Literal, cast

from typing_extensions import TypeIs

from fluxfire.blocks import compiled_by_others, denoiser_of, family_of, parallel
from fluxfire.errors import ArgumentError, NotOptimizedError
from fluxfire.first_block import Batch, FirstBlockCache
from fluxfire.paraattn import ParaAttnCache, check_paraattn
from fluxfire.patches import applying, handle_of, unmark
from fluxfire.plan import Handle, Step
from fluxfire.setting import Setting, Threshold, threshold_of
from fluxfire.stats import CacheStats

Backend = Literal["fluxfire", "para-attn"]
BACKENDS: Final = ("fluxfire", "para-attn")


def check_cache(
    pipe: Any,
    threshold: Threshold = 0.12,
    *,
    warmup_steps: int = 0,
    max_consecutive_hits: int | None = None,
    batch: Batch = "sample",
    extrapolate: int = 0,
    schedule: str | None = None,
    backend: Backend = "fluxfire",
) -> str | None:
    """Why `apply_cache` with these arguments would refuse this pipeline, or None.

    Raises:
        ArgumentError: an argument that no pipeline could take, or a setting found on another model.
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_cache(fluxfire.apply_compile(pipe, backend="eager"))  # None: nothing is against it
    """
    _, setting = threshold_of(threshold)
    if not _is_count(warmup_steps, 0):
        raise ArgumentError(f"warmup_steps: found {warmup_steps!r}, needed a number of steps, 0 or more")
    if max_consecutive_hits is not None and not _is_count(max_consecutive_hits, 1):
        raise ArgumentError(
            f"max_consecutive_hits: found {max_consecutive_hits!r}, needed 1 or more, or None: no limit"
        )
    if batch not in ("sample", "any"):
        raise ArgumentError(f'batch: found {batch!r}, needed "sample" (each decides) or "any" (one miss computes all)')
    if not _is_count(extrapolate, 0) or extrapolate > 3:
        raise ArgumentError(f"extrapolate: found {extrapolate!r}, needed 0 (hold the residual), 1 (a line), 2 or 3")
    if schedule is not None and (not isinstance(schedule, str) or set(schedule) - set("#.") or schedule[:1] != "#"):
        raise ArgumentError(
            f'schedule: found {schedule!r}, needed a mark for each step, # computed and . skipped, first #: "##.#.#"'
        )
    if backend not in BACKENDS:
        raise ArgumentError(f"backend: found {backend!r}, needed one of {', '.join(map(repr, BACKENDS))}")
    denoiser = denoiser_of(pipe)
    if setting:
        own: dict[str, Any] = {
            "warmup_steps": warmup_steps,
            "max_consecutive_hits": max_consecutive_hits,
            "batch": batch,
        }
        own |= {"extrapolate": extrapolate, "schedule": schedule}
        setting.check(pipe, own if backend == "fluxfire" else {"backend": backend})
    blocks = family_of(pipe).blocks(denoiser)
    if len(blocks) < 2:
        return f"found {len(blocks)} block in {type(denoiser).__name__}, needed at least 2: there is nothing to skip"
    if getattr(denoiser, "is_cache_enabled", False):
        return "a cache of diffusers is enabled: call pipe.transformer.disable_cache() first"
    if reason := compiled_by_others((denoiser, *blocks)) or parallel(denoiser):
        return reason
    if backend == "para-attn":
        knobs: dict[str, Any] = {"warmup_steps": warmup_steps, "max_consecutive_hits": max_consecutive_hits}
        return check_paraattn(pipe, **knobs, extrapolate=extrapolate, schedule=schedule)
    return None


def apply_cache(
    pipe: Any,
    threshold: Threshold = 0.12,
    *,
    warmup_steps: int = 0,
    max_consecutive_hits: int | None = None,
    batch: Batch = "sample",
    extrapolate: int = 0,
    schedule: str | None = None,
    backend: Backend = "fluxfire",
) -> Any:
    """First-block cache: skips blocks 2..n where block 1's residual hardly changed. Approximate.

    Args:
        pipe: a FLUX pipeline, changed in place.
        threshold: relative L1 distance below which a call is a hit. 0 never hits and is bit-identical. 0.12 is what
            ParaAttention's article uses for FLUX.1-dev with float8 (its own measurements, 28 steps at 1024x1024).
            Or what `tune` found, or the path of its file: another model is refused, and runs with another number of
            steps are computed without hits.
        warmup_steps: the first steps of every run that are always computed.
        max_consecutive_hits: most hits in a row for one sample; None for no limit.
        batch: "sample": each sample of a batch decides for itself; "any": one miss computes all.
        extrapolate: what a hit adds: 0 the last computed residual; 1 to 3 the line, parabola or cubic in sigma through
            the last computed ones, with what that missed made good at the next computed call (`forecast.py`).
        schedule: which steps are computed, whatever the distances say: a mark for each step, as `cache_stats(pipe)`
            prints them, "##.#.#.#". No transfer to the host in any step. The threshold then only says 0 or not.
        backend: "fluxfire"; or "para-attn", whose own code decides then (one decision a batch): for comparison.

    Returns:
        The same pipe.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.

    Examples:
        >>> latents = fluxfire.apply_cache(pipe, 0.5, max_consecutive_hits=1)(**prompt).images
        >>> fluxfire.cache_stats(pipe).marks()
        '#.#.#.'
    """
    own = backend == "fluxfire"
    number, setting = threshold_of(threshold)
    own_knobs: dict[str, Any] = {"warmup_steps": warmup_steps, "max_consecutive_hits": max_consecutive_hits}
    own_knobs |= {"batch": batch, "extrapolate": extrapolate, "schedule": schedule}
    reason = check_cache(pipe, setting or number, backend=backend, **own_knobs)
    settings = _settings(number, setting, own_knobs if own else {"backend": backend})
    with applying(pipe, Step("cache", "approximate", settings), reason) as handle:
        cache = FirstBlockCache(pipe, **own_knobs) if own else ParaAttnCache(pipe)
        cache.threshold, cache.steps = float(number), setting.steps if setting else None
        cache.install(handle)
        handle.states["cache"] = cache
    return pipe


def set_cache_threshold(pipe: Any, threshold: Threshold) -> Any:
    """Changes the threshold of an applied cache, from the next denoiser call on: no rewrapping, no recompilation.

    Raises:
        ArgumentError: not a number of 0 or more, nor a setting, or one that was found on another model or cache.
        NotOptimizedError: the pipeline has no cache.

    Examples:
        >>> pipe = fluxfire.set_cache_threshold(fluxfire.apply_cache(pipe), 0.08)
    """
    number, setting = threshold_of(threshold)
    cache, knobs = _cache_of(pipe), cache_knobs(pipe)
    if setting:
        setting.check(pipe, knobs)
    cache.threshold, cache.steps = float(number), setting.steps if setting else None
    steps = cast(Handle, handle_of(pipe)).steps
    index = next(i for i, step in enumerate(steps) if step.name == "cache")
    steps[index] = replace(steps[index], settings=_settings(number, setting, knobs))
    return pipe


def cache_knobs(pipe: Any) -> dict[str, Any]:
    """The settings of an applied cache, the threshold apart."""
    step = next(step for step in cast(Handle, handle_of(pipe)).steps if step.name == "cache")
    return {name: value for name, value in step.settings if name not in ("threshold", "tuned")}


def cache_stats(pipe: Any) -> CacheStats:
    """Hits and computed calls since `apply_cache`, and the last run's decisions.

    Raises:
        NotOptimizedError: the pipeline has no cache.

    Examples:
        >>> latents = fluxfire.apply_cache(pipe, 0)(**prompt).images
        >>> fluxfire.cache_stats(pipe).hit_rate
        0.0
    """
    return _cache_of(pipe).stats()


@contextmanager
def borrowed_cache(pipe: Any) -> Iterator[FirstBlockCache]:
    """The pipeline's cache, or one for as long as this lasts; what runs leave behind meanwhile goes with it.

    Runs put other values at attributes of the pipeline, the scheduler and the cache (tables, counts), and write into
    none, so that putting the old ones back is enough. Offload hooks, which diffusers makes anew with every run, stay.
    """
    before = handle_of(pipe)
    start = len(before.patch) if before else 0
    own = not before or "cache" not in before.states
    if own:
        apply_cache(pipe, 0)
    handle, cache = cast(Handle, handle_of(pipe)), _cache_of(pipe)
    found = [(owner, dict(vars(owner))) for owner in (pipe, pipe.scheduler, cache, cache._reader, handle.denoiser)]
    cache.steps = None
    try:
        yield cache
    finally:
        for owner, attributes in found:
            for name in vars(owner).keys() - attributes.keys():
                delattr(owner, name)
            if owner is not handle.denoiser:
                vars(owner).update((name, value) for name, value in attributes.items() if name != "_all_hooks")
        if own:
            handle.patch.undo(start)
            del handle.states["cache"]
            handle.steps.pop()
            if not before:
                unmark(handle)


def _cache_of(pipe: Any) -> FirstBlockCache:
    handle = handle_of(pipe)
    cache = handle.states.get("cache") if handle else None
    if not isinstance(cache, FirstBlockCache):
        raise NotOptimizedError("found no cache on this pipeline: call fluxfire.apply_cache(pipe) first")
    return cache


def _is_count(value: object, least: int) -> TypeIs[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _settings(threshold: float, setting: Setting | None, knobs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Of the step, as the report shows them."""
    tuned = (("tuned", str(setting)),) if setting else ()
    return (("threshold", threshold), *knobs.items(), *tuned)
