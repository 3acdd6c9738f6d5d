"""Finds which denoising steps to compute: once for a model, a number of steps and a budget, from a few prompts.

    marks = fluxfire.find_schedule(pipe, prompts, computed=14, call={"num_inference_steps": 28})
    fluxfire.apply_cache(pipe, schedule=marks, extrapolate=2)

Every prompt's picture is made once, uncached, and the denoiser's outputs v_0, v_1, ... are compared with each other.
If step k is computed after steps i and j before it, what `forecast.py` would have made of the steps between is a
weighted sum of outputs that are known, and so is its error. With d_m the Euler step of sigma,

    pred = sum over skipped m of d_m (v_m - forecast from i, j)          until k the picture is off by this
    owed = sum over skipped m of d_m (v_m - read back through i, j, k)   this stays
    cost(i, j, k) = exp(2 sigma_j) (|owed|^2 + 0.05 |pred|^2)

and dynamic programming finds the marks with the smallest sum of costs. All is a quadratic form in the steps' Gram
matrix, <v_m, v_n>, which is all that is kept of a picture. 0.05 was set by hand; 0.3 gives nearly the same marks.
exp(2 sigma) stands for how an early error grows: fitted to 176 schedules measured on the embedded model (docs/log.md).

What it costs: the prompts' pictures, and some seconds on the host. Nothing of the pipeline is changed. Errors add up as
if steps did not change each other's direction, so a schedule is a good guess and no proof: look at the pictures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from fluxfire.blocks import family_of
from fluxfire.errors import ArgumentError, StepError
from fluxfire.forecast import lagrange
from fluxfire.patches import handle_of
from fluxfire.run import RunReader

_PRED: Final = 0.05
_GROWTH: Final = 2.0
_LONGEST: Final = 9  # steps from one computed call to the next, at most


def find_schedule(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    computed: int,
    extrapolate: int = 2,
    warmup_steps: int = 2,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> str:
    """The steps to compute, as marks for `apply_cache(pipe, schedule=...)`: "#" computed, "." skipped.

    Args:
        pipe: a FLUX pipeline without a cache, as it will be used otherwise.
        prompts: what to draw, as you use it: texts, or arguments of a call. 8 tell enough.
        computed: how many steps.
        extrapolate: what `apply_cache` will get.
        warmup_steps: the first steps, computed in any case. An error there turns the whole way: on the embedded model's
            edits a schedule free to skip the second step lost 7 dB, and the costs hardly see that.
        call: arguments of every call, such as `{"num_inference_steps": 28}`.
        seed: picture i is made from the noise of seed + i.

    Raises:
        ArgumentError: no prompts, prompts of different numbers of steps, or fewer steps than `computed`.
        StepError: the pipeline has a cache.
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> marks = fluxfire.find_schedule(pipe, [prompt], computed=4)
        >>> (len(marks), marks.count("#"))
        (6, 4)
    """
    if isinstance(prompts, str) or not prompts:
        raise ArgumentError(f"prompts: found {prompts!r}, needed a list of texts or of arguments of a call")
    handle = handle_of(pipe)
    if handle and "cache" in handle.states:
        raise StepError("find_schedule: found a cache on this pipeline: call fluxfire.restore_pipeline(pipe) first")
    record = _Record(pipe)
    hook = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    try:
        for index, prompt in enumerate(prompts):
            job = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
            generator = {"generator": torch.Generator().manual_seed(seed + index), "output_type": "latent"}
            pipe(**(dict(call or {}) | generator | job))
            record.close()
    finally:
        hook.remove()
    steps = len(record.sigmas) - 1
    if not max(warmup_steps, 1) < computed <= steps:
        raise ArgumentError(f"computed: found {computed}, needed {max(warmup_steps, 1) + 1} to {steps}, a run's steps")
    start = tuple(range(max(warmup_steps, 1)))
    marked = _cheapest(_costs(record.gram, record.sigmas, extrapolate + 1), steps, computed, start)
    return "".join("#" if step in marked else "." for step in range(steps))


class _Record:
    """A forward hook on the denoiser: the outputs of a run, then their inner products, summed over runs."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._reader: RunReader[object] = RunReader(pipe, family_of(pipe), object)
        self._outputs: dict[int, list[torch.Tensor]] = {}  # by guidance branch
        self.sigmas: list[float] = []
        self.gram: Any = 0.0  # (steps, steps), float64

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self._reader.read(args, kwargs)
        if call.state is not None:
            self._outputs.setdefault(call.branch, []).append(output[0][:, : call.noise_tokens].detach())

    def close(self) -> None:
        """The run is over."""
        sigmas = self._pipe.scheduler.sigmas.tolist()
        if self.sigmas and sigmas != self.sigmas:
            found = f"prompts: found runs of {len(self.sigmas) - 1} and of {len(sigmas) - 1} steps, or of other sigmas"
            raise ArgumentError(f"{found}, needed the same for all: the sizes and steps of one schedule")
        self.sigmas = sigmas
        for outputs in self._outputs.values():
            if len(outputs) != len(sigmas) - 1:
                found = f"prompts: found {len(outputs)} denoiser calls in a run of {len(sigmas) - 1} steps"
                raise ArgumentError(f"{found}, needed one a step: runs that begin in the middle have no schedule")
            flat = torch.stack(outputs).float().flatten(1)
            self.gram = self.gram + (flat @ flat.T).double().cpu() / flat.shape[1]
        self._outputs = {}


def _costs(gram: torch.Tensor, sigmas: list[float], length: int) -> Callable[[tuple[int, ...], int], float]:
    """cost(computed steps before, next computed step), where the last `length` before count."""
    steps = len(sigmas) - 1
    products: list[list[float]] = gram.tolist()

    def square(weights: dict[int, float]) -> float:
        return math.fsum(a * b * products[m][n] for m, a in weights.items() for n, b in weights.items())

    @functools.cache
    def cost(before: tuple[int, ...], after: int) -> float:
        pred: dict[int, float] = dict.fromkeys((*before, *range(before[-1] + 1, min(after + 1, steps))), 0.0)
        owed = dict(pred)
        for m in range(before[-1] + 1, after):
            step = sigmas[m + 1] - sigmas[m]
            for weights, known in ((pred, before), (owed, (*before, after) if after < steps else before)):
                weights[m] += step
                for k, weight in zip(known, lagrange([sigmas[k] for k in known], sigmas[m]), strict=True):
                    weights[k] -= step * weight
        return math.exp(_GROWTH * sigmas[before[-1]]) * (square(owed) + _PRED * square(pred))

    return lambda before, after: cost(before[-length:], after)


def _cheapest(
    cost: Callable[[tuple[int, ...], int], float], steps: int, computed: int, start: tuple[int, ...]
) -> tuple[int, ...]:
    """The computed steps with the smallest sum of costs; of paths with the same last two, the best is followed."""
    paths: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {start[-2:]: (0.0, start)}
    for left in range(computed - len(start) - 1, -1, -1):
        longer: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for total, path in paths.values():
            for k in range(path[-1] + 1, min(path[-1] + _LONGEST, steps - left - 1) + 1):
                found = (total + cost(path, k), (*path, k))
                longer[found[1][-2:]] = min(found, longer.get(found[1][-2:], found))
        paths = longer
    return min((total + cost(path, steps), path) for total, path in paths.values())[1]
