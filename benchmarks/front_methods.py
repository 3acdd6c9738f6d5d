"""What `front.py` compares: each cache by its own code, with the knobs that it is tuned over.

A method is applied to a fresh pipeline with plain settings. `splits`: whether a batch can be computed at once, since
the method decides for every picture alone, or by the step alone; the others decide once a batch and get one picture a
call.

diffusers' caches need a `cache_context` around each denoiser call, which the Kontext pipeline does not open: it is
opened here. TaylorSeer is diffusers' in lite mode, the one that skips whole calls (the other computes every MLP).
MagCache has its ratios by its own calibration, on the tuning pictures of each kind and number of steps.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final

import torch

import fluxfire

Settings = dict[str, Any]
ARTICLE: Final = {"threshold": 0.12}  # of ParaAttention's article


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the front; `apply(pipe, settings, steps)` changes a fresh pipeline."""

    name: str
    apply: Callable[[Any, Settings, int], None]
    splits: bool
    grid: Callable[[int], list[Settings]]  # what is tried on the tuning pictures, by number of steps
    ours: bool = False
    always: tuple[Settings, ...] = ()  # what is measured in any case
    late: bool = False  # after the others
    follows: bool = False  # not tuned: with the marks that were chosen for fluxfire, and their order


def _nothing(pipe: Any, settings: Settings, steps: int) -> None:
    """Fewer steps: `front.py` reads `steps` from the settings."""


def _ours(pipe: Any, settings: Settings, steps: int) -> None:
    fluxfire.apply_cache(pipe, **settings)


def _para_attn(pipe: Any, settings: Settings, steps: int) -> None:
    fluxfire.apply_cache(pipe, settings["threshold"], backend="para-attn")


def _in_context(pipe: Any) -> None:
    forward = pipe.transformer.forward

    @wraps(forward)
    def in_context(*args: Any, **kwargs: Any) -> Any:
        with pipe.transformer.cache_context("cond"):
            return forward(*args, **kwargs)

    pipe.transformer.forward = in_context


def _first_block_cache(pipe: Any, settings: Settings, steps: int) -> None:
    from diffusers import FirstBlockCacheConfig

    _in_context(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(**settings))


def _taylorseer(pipe: Any, settings: Settings, steps: int) -> None:
    from diffusers import TaylorSeerCacheConfig

    _in_context(pipe)
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(use_lite_mode=True, taylor_factors_dtype=torch.float32, **settings)
    )


def _magcache(pipe: Any, settings: Settings, steps: int) -> None:
    from diffusers import MagCacheConfig

    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=steps, **settings))


def calibrate_magcache(pipe: Any, steps: int, run: Callable[[], object]) -> list[float]:
    """The ratios that MagCache prints after a run with `calibrate=True`."""
    from diffusers import MagCacheConfig

    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run()
    pipe.transformer.disable_cache()
    found = re.search(r"\[[-\d., e]+\]\s*$", printed.getvalue().strip())
    assert found, "MagCache printed no ratios"
    ratios: list[float] = json.loads(found.group())
    return ratios


def _dbcache(pipe: Any, settings: Settings, steps: int) -> None:
    import cache_dit

    config = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "num_inference_steps": steps} | settings
    order = config.pop("taylorseer_order", 0)
    if bins := config.pop("bins", None):
        config |= {
            "steps_computation_mask": cache_dit.steps_mask(compute_bins=bins[0], cache_bins=bins[1], total_steps=steps)
        }
    if marks := config.pop("marks", None):
        config |= {"steps_computation_mask": [int(mark == "#") for mark in marks]}
    if policy := config.pop("mask", None):
        config |= {"steps_computation_mask": cache_dit.steps_mask(mask_policy=policy, total_steps=steps)}
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(**config),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None,
    )


def _product(**values: list[Any]) -> list[Settings]:
    rows: list[Settings] = [{}]
    for name, some in values.items():
        rows = [row | {name: value} for row in rows for value in some]
    return rows


def _masks(starts: tuple[int, ...], steps: int) -> list[Settings]:
    """cache-dit's own masks near the targets, and bins like them: a computed start, then one call to so many cached."""
    rows: list[Settings] = [{"mask": name} for name in ("medium", "fast")]
    for start in starts:
        for gap in (1, 2):
            count = -(-(steps - start) // (gap + 1))
            rows.append({"bins": [[start] + [1] * count, [gap] * count]})
    return [row | {"steps_computation_policy": "static"} for row in rows]


def _dbcache_grid(steps: int, warmup_steps: int, orders: tuple[int, ...]) -> list[Settings]:
    """Thresholds without a limit of cached calls in a row, and a limit of two with a threshold that always hits."""
    values = (0.065, 0.08, 0.1, 0.13, 0.17) if steps < 40 else (0.04, 0.05, 0.065, 0.08, 0.1)
    rows: list[Settings] = [{"residual_diff_threshold": value} for value in values]
    limited: Settings = {"residual_diff_threshold": 1e9, "max_continuous_cached_steps": 2}
    rows = [{"taylorseer_order": orders[0]} | row for row in rows]
    rows += [{"taylorseer_order": order} | limited for order in orders]
    return [row | {"max_warmup_steps": warmup_steps} for row in rows]


THRESHOLDS: Final = {28: [0.07, 0.08, 0.1, 0.12], 50: [0.04, 0.05, 0.06, 0.08, 0.12]}
# (schedule, extrapolate): even ones, even ones less a mark, and candidates by the costs of `fluxfire.find_schedule` on
# the tuning pictures of each kind, with warmup_steps 1 or 2 and extrapolate 1 or 2, without and with the growth of
# early errors in them (`front_schedules.py` prints those with it). Which one counts is chosen as for the peers; those
# with the fewest marks are for what is as near as para-attn at 0.12.
SCHEDULES: Final = {
    28: [
        ("##.#.#.#.#.#.#.#.#.#.#.#.#.#", 1),
        ("##.#.#.#.#.#.#.#.#.#.#.#.#.#", 2),
        ("##..#..#..#..#..#..#..#..#.#", 1),
        ("##..#..#..#..#..#..#..#..#.#", 2),
        ("#.#.#..#...#...#..#.####.###", 1),
        ("#.#..#.#..#..#...#..#####.##", 2),
        ("##.#.#..#..#..#..#..####.#.#", 2),
        ("#..#...#....#....#..###.#..#", 1),
        ("#....#....#....#....####.#.#", 2),
        ("##..#..#...#...#...#..#.#.#.", 2),
        ("#.#.#.#.#.#.#.#.#.#..#.#.#.#", 1),
        ("#.#.#.#.#.#.#.#.#.#..#.#.#.#", 2),
        ("##.#.#.#.#.#.#..#.#..#.#.#.#", 2),
        ("#..#..#..#..#..#..#...#..#.#", 1),
        ("#..#..#..#..#..#..#...#..#.#", 2),
        ("##...#..#..#..#..#...#..#..#", 2),
        ("#......#.....#.....#..#.#..#", 1),
        ("##...#......#.....#...#...#.", 1),
        ("#......#.....#....#...#.#..#", 2),
        ("##....#...#......#.....#..#.", 2),
        ("#.....#.....#.....#...#...#.", 1),
        ("##......#........#....#...#.", 1),
        ("#........#.......#....#.#..#", 2),
        ("##.......#....#.......#...#.", 2),
        ("#........#.......#....#...#.", 1),
        ("##.....#........#.......#...", 1),
        ("#........#.......#.....#..#.", 2),
        ("##........#.....#........#..", 2),
        ("#....#...#...#...#....#...#.", 1),
        ("##....#....#....#....#....#.", 1),
        ("#....#....#...#...#...#...#.", 2),
        ("##.....#...#....#....#....#.", 2),
        ("#.....#....#....#....#....#.", 1),
        ("##.....#.....#.....#......#.", 1),
        ("#......#.....#...#....#...#.", 2),
        ("##......#....#.....#.....#..", 2),
        ("#.......#.....#.....#.....#.", 1),
        ("##.......#.......#.......#..", 1),
        ("#.......#.....#....#.....#..", 2),
        ("##........#.....#.......#...", 2),
        ("##.#.#.#.#.#.#.#.#.#...#.#.#", 1),
        ("##.#.#.#.#.#.#.#.#.#...#.#.#", 2),
        ("##.#.#.#..#.#..#.#.#.#.#.#.#", 1),
        ("##.#.#.#..#.#..#.#.#.#.#.#.#", 2),
        ("##.#.#.#.#.#..#.#.#.#..#.#.#", 1),
        ("##.#.#.#.#.#..#.#.#.#..#.#.#", 2),
        ("##.#.#.#.#.#.#.#.#..#.#.#..#", 1),
        ("##.#.#.#.#.#.#.#.#..#.#.#..#", 2),
        ("#.#.#..#...#..#..#..####.###", 1),
        ("##.#..#..#..#..#..#.####.#.#", 1),
        ("#..#...#....#...#...###.#..#", 1),
        ("##..#.....#....#....###.#..#", 1),
        ("#.#.#.#.#.#.#.#.#..#..#.#.##", 1),
        ("##.#.#.#.#.#..#.#..#..#.#.##", 1),
        ("##..#...#..#..#...#...#..#.#", 1),
        ("#.#.#.#..#..#..#..#.####.#.#", 1),
        ("##.#.#..#..#..#..#..####.#.#", 1),
        ("#.#.#.#.#..#..#..#..####.#.#", 2),
        ("##.#.#.#..#..#...#..####.#.#", 2),
        ("#..#..#....#....#...###.#..#", 1),
        ("##.#...#...#...#...#..#.#..#", 1),
        ("#..#...#..#....#...#.#.#.#.#", 2),
        ("##..#.#...#...#....#..#.#.#.", 2),
        ("###.#.#.#.#.#.#.#..#..#..#.#", 1),
        ("##.#.#.#.#.#.#.#..#..#.#.#.#", 2),
        ("#.#..#..#..#..#...#...#..#.#", 1),
        ("##..#..#..#..#...#...#...#.#", 1),
        ("#..#..#.#..#..#..#...#..#..#", 2),
        ("##..#.#..#..#..#..#...#...#.", 2),
    ],
    50: [
        ("##.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#", 1),
        ("##.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#", 2),
        ("##..#..#..#..#..#..#..#..#..#..#..#..#..#..#..#..#", 1),
        ("##..#..#..#..#..#..#..#..#..#..#..#..#..#..#..#..#", 2),
        ("###.#.#..#..#..#..#..#..#..#..#.#.#.####.#.#.#.###", 1),
        ("###.#.#..#..#..#..#..#..#..#..#.#.#.#####.#.#.#.##", 2),
        ("#.#.#...#...#...#....#...#...#...#..####..#..#.#.#", 1),
        ("##.#..#....#....#....#...#...#...#..####..#..#.#.#", 1),
        ("#.#..#..#...#...#....#....#....#...#.####..#..#.##", 2),
        ("##.#.#..#...#...#....#....#....#...#.####..#...#.#", 2),
        ("#.....#......#........#.......#.....#..#.#....#..#", 1),
        ("##...#.......#.......#.......#.....#...#..#.....#.", 1),
        ("#......#......#......#......#......#...#.#..#...#.", 2),
        ("##....#...#.......#.......#.......#.....#..#....#.", 2),
        ("#........#........#........#.......#...#.#....#..#", 1),
        ("##.....#........#........#........#....#..#.....#.", 1),
        ("#........#........#.......#........#...#.#..#...#.", 2),
        ("##......#.....#........#........#.......#..#....#.", 2),
        ("#........#........#........#.......#...#..#.....#.", 1),
        ("##....#........#........#........#.......#.....#..", 1),
        ("#.......#.......#.......#........#......#...#...#.", 2),
        ("##......#.....#........#........#........#....#...", 2),
        ("#......#.......#........#........#.......#.....#..", 1),
        ("##......#........#........#........#........#.....", 1),
        ("#.......#.......#.......#.......#........#....#...", 2),
        ("##........#.......#........#........#........#....", 2),
        ("##.#.#.#.#..#.#.#.#.#..#.#..#..#..#..###.#.#.#.###", 1),
        ("##.#.#.#.#..#.#.#..#.#.#.#..#.#...#..####.#.#.#.##", 2),
        ("#.#.#..#..#..#..#..#..#..#..#..#...#...#..#..#.#.#", 1),
        ("##.#..#..#..#..#..#..#..#...#..#...#...#..#..#.#.#", 1),
        ("#.#.#..#..#..#..#..#..#..#..#..#...#...#.#..#..#.#", 2),
        ("##.#.#...#..#..#..#..#..#..#...#...#...#.#..#..#.#", 2),
        ("#....#....#.....#.....#.....#.....#......#....#..#", 1),
        ("##....#.....#.....#.....#......#......#.....#...#.", 1),
        ("#.....#.....#....#....#....#....#......#....#...#.", 2),
        ("##.....#...#.....#.....#.....#.....#......#.....#.", 2),
        ("#......#.....#.....#.....#......#......#.....#..#.", 1),
        ("##.....#......#......#......#......#.......#....#.", 1),
        ("#......#......#....#.....#.....#......#.....#...#.", 2),
        ("##......#....#......#......#......#.......#.....#.", 2),
        ("#......#......#......#......#......#.......#....#.", 1),
        ("##.....#........#.......#........#........#.....#.", 1),
        ("#........#......#.....#.....#......#......#.....#.", 2),
        ("##.......#.....#.......#.......#.......#.......#..", 2),
        ("#........#.......#.......#.......#........#.....#.", 1),
        ("##........#........#........#........#........#...", 1),
        ("#........#........#......#......#.......#......#..", 2),
        ("##.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#...#.#.#.#.#", 1),
        ("##.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#...#.#.#.#.#", 2),
        ("##.#.#.#.#.#..#.#.#.#..#.#.#.#.#.#.#.#.#.#.#.#.#.#", 1),
        ("##.#.#.#.#.#..#.#.#.#..#.#.#.#.#.#.#.#.#.#.#.#.#.#", 2),
        ("##.#.#.#.#.#.#.#.#..#.#.#.#.#.#.#.#..#.#.#.#.#.#.#", 1),
        ("##.#.#.#.#.#.#.#.#..#.#.#.#.#.#.#.#..#.#.#.#.#.#.#", 2),
        ("##.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#..#.#.#.#.#.#..#.#", 1),
        ("##.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#..#.#.#.#.#.#..#.#", 2),
        ("###.#.#.#.#..#.#..#..#..#..#..#.#.#.####.#..#.#.##", 1),
        ("####.#.#.#.#.#.#..#..#..#..#..#..#..#####.#.#..#.#", 2),
        ("##.#..#...#...#...#...#....#...#...#.###..#..#.#.#", 1),
        ("#.#.#.#...#...#...#...#...#....#...#.####..#...#.#", 2),
        ("##.#.#..#...#...#....#...#....#....#.####..#...#.#", 2),
        ("##.#.#.#.#.#.#.#.#.#.#.#.#..#..#..#..###.#..#.#.##", 1),
        ("###.#.#.#.#.#.#.#.#.#..#.#..#.#..#..#.#.#.#.#.#.##", 2),
        ("##.#..#..#..#..#..#..#..#..#...#...#...#..#..#.#.#", 1),
        ("#.#.#.#..#..#..#..#..#..#..#...#...#...#.#..#..#.#", 2),
        ("##.#.#..#..#..#..#..#..#...#..#....#...#.#..#..#.#", 2),
    ],
}
METHODS: Final = {
    method.name: method
    for method in (
        Method("fewer steps", _nothing, True, lambda steps: _product(steps=sorted({steps // 2, steps * 9 // 25}))),
        Method("para-attn", _para_attn, False, lambda steps: _product(threshold=THRESHOLDS[steps]), always=(ARTICLE,)),
        Method(
            "diffusers FirstBlockCache",
            _first_block_cache,
            False,
            lambda steps: _product(threshold=THRESHOLDS[steps]),
            late=True,
        ),
        Method(
            "diffusers MagCache",
            _magcache,
            True,
            lambda steps: _product(threshold=[0.12, 1.0], max_skip_steps=[1, 2], retention_ratio=[0.05, 0.15]),
        ),
        Method(
            "diffusers TaylorSeer",
            _taylorseer,
            True,
            lambda steps: _product(cache_interval=[2, 3, 4], max_order=[1, 2], disable_cache_before_step=[2, 4]),
        ),
        Method("cache-dit DBCache", _dbcache, False, lambda steps: _dbcache_grid(steps, 1, (0,))),
        Method("cache-dit DBCache + TaylorSeer", _dbcache, False, lambda steps: _dbcache_grid(steps, 2, (1, 2))),
        Method("cache-dit step mask", _dbcache, True, lambda steps: _masks((1, 2, 4), steps)),
        Method(
            "cache-dit step mask + TaylorSeer",
            _dbcache,
            True,
            lambda steps: [row | {"taylorseer_order": order} for row in _masks((2, 3), steps) for order in (1, 2)],
        ),
        Method(
            "fluxfire",
            _ours,
            True,
            lambda steps: [{"schedule": marks, "extrapolate": order} for marks, order in SCHEDULES[steps]],
            ours=True,
        ),
        Method(
            "fluxfire, threshold",
            _ours,
            True,
            lambda steps: [],
            ours=True,
            always=tuple({"threshold": value} for value in (0.05, 0.12, 0.25)),
            late=True,
        ),
        Method("JPEG", _nothing, True, lambda steps: [], always=({"quality": 95}, {"quality": 50})),
        Method("another seed", _nothing, True, lambda steps: [], always=({"seed": 5000},), late=True),
        Method("cache-dit, fluxfire's marks + TaylorSeer", _dbcache, True, lambda steps: [], late=True, follows=True),
    )
}
