"""Finds the cache's threshold on your own prompts, from a budget: how much pictures may differ, or how many calls go.

    setting = fluxfire.tune(pipe, prompts, max_error=0.02)   # or speedup=1.5
    fluxfire.optimize_pipeline(pipe, cache_threshold=setting)

What is asked is one of these:

- `max_error`: the most that a picture may differ from the one that the same pipeline makes without hits (threshold 0,
  so rounding of compilation or quantization is not counted): the root mean square difference of its pixels, as a share
  of the way from black to white. 0.02 is 2 %, 34 dB PSNR. It holds for the share `quantile` of the prompts, not on
  average: one bad picture is not made good by many that are the same. Found is the largest threshold that holds it.
- `speedup`: denoiser calls made, divided by those computed, over all prompts: counted, not timed, so it is what a
  picture can gain at most. Found is the smallest threshold that reaches it, and what it costs is in the result.

How it works. `LADDER` is bisected: each picture once without hits, then the prompts in turn at a threshold, the worst
so far first, only until the budget is out of reach: a threshold that is too high costs a picture or two, one that holds
a picture for each prompt. So the one in the result was measured on every prompt. Errors mostly grow with the
threshold; where they do not, what is found is within the budget still, but may not be the largest.

What it costs: those pictures' time, and the first pictures (8 bits a value) on the host. Peers have no such thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Final

import torch

from fluxfire.cache import apply_cache, borrowed_cache, cache_knobs, cache_stats, set_cache_threshold
from fluxfire.errors import ArgumentError
from fluxfire.patches import handle_of
from fluxfire.setting import Setting, fingerprint

LADDER: Final = tuple(float(f"{0.01 * 100 ** (rung / 31):.2g}") for rung in range(32))  # 0.01 to 1, 16 % apart

Job = dict[str, Any]  # the arguments of one call of the pipeline


@dataclass(frozen=True, slots=True)
class Trial:
    """The picture (or pictures) of one prompt at one threshold, with its error to the one at 0 and its calls.

    Examples:
        >>> trials = []
        >>> setting = fluxfire.tune(pipe, [prompt | {"output_type": "pil"}], max_error=0.5, on_trial=trials.append)
        >>> trials[0].threshold, trials[0].error, trials[0].calls
        (0.0, 0.0, 6)
    """

    prompt: int  # its place among the prompts
    threshold: float
    pictures: tuple[Any, ...]  # PIL
    error: float
    calls: int
    computed: int


@dataclass(frozen=True, slots=True)
class _Budget:
    """What was asked; `lost` ends a race."""

    max_error: float | None
    speedup: float | None
    quantile: float
    baseline: list[Trial]

    @property
    def allowed(self) -> int:
        """How many prompts may exceed `max_error`."""
        return math.floor((1 - self.quantile) * len(self.baseline) + 1e-9)

    def lost(self, trials: list[Trial]) -> bool:
        """Whether the budget is out of reach, whatever the prompts that are left come to."""
        if self.max_error is not None:
            return sum(trial.error > self.max_error for trial in trials) > self.allowed
        assert self.speedup is not None
        left = len(self.baseline) - len(trials)  # a picture's first call is always computed
        computed = sum(trial.computed for trial in trials) + left
        return computed * self.speedup > sum(trial.calls for trial in self.baseline) + 1e-9

    def badness(self, trial: Trial) -> float:
        """The larger, the sooner this prompt spoils a threshold."""
        return trial.error if self.max_error is not None else trial.computed / trial.calls


def tune(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    max_error: float | None = None,
    speedup: float | None = None,
    quantile: float = 0.9,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_trial: Callable[[Trial], object] | None = None,
    progress: bool | None = None,
    apply: bool = False,
) -> Setting:
    """Finds the cache's threshold on your prompts: the fastest within an error, or the nearest at a speed.

    The pipeline is left as it was, also after an error or Ctrl-C; with a cache on it, that cache is tuned, with its
    settings. `fluxfire.bench.sheet.ContactSheet` is an `on_trial` that shows all pictures beside each other.

    Args:
        pipe: a FLUX pipeline as it will be used: compiled, quantized, with its LoRAs.
        prompts: what to draw, as you use it: texts, or the arguments of a call, such as
            `{"prompt": "in fluent style", "image": picture}`. 8 or more tell something; all with the same steps.
        max_error: the most that a picture may differ, root mean square, 1 from black to white: 0.02.
        speedup: denoiser calls by computed ones, over all prompts: 1.5 computes two thirds of them.
        quantile: the share of prompts for which `max_error` holds; with 0.9 and less than 10 prompts for all.
        call: arguments of every call, such as `{"num_inference_steps": 28, "height": 1024, "width": 1024}`.
        seed: picture i is made from the noise of seed + i. A `generator` in a prompt's arguments counts instead; it is
            not advanced.
        on_trial: called with every picture that is made; those without hits come first, with threshold 0.
        progress: whether a bar is shown; None: in a terminal.
        apply: put the setting on the pipeline: as its cache's threshold, or with a new cache.

    Returns:
        The setting, for `cache_threshold=`, `threshold=` and `set_cache_threshold`; `save` writes it. Its threshold is
        0 if any hit goes beyond `max_error`.

    Raises:
        ArgumentError: an argument that no pipeline could take, or a speedup that no threshold reaches.
        NotFluxError, StepError: no cache goes on this pipeline.

    Examples:
        >>> setting = fluxfire.tune(pipe, [prompt | {"output_type": "pil"}], max_error=0.5)
        >>> (setting.prompts, setting.calls)
        (1, 6)
    """
    _check(max_error, speedup, quantile)
    jobs = [_job(index, prompt, call or {}, seed) for index, prompt in enumerate(_listed(prompts))]
    with ExitStack() as stack:
        cache = stack.enter_context(borrowed_cache(pipe))
        knobs = tuple(cache_knobs(pipe).items())
        pipe.set_progress_bar_config(disable=True)
        studio = stack.enter_context(closing(_Studio(pipe, cache, jobs, on_trial, progress)))
        budget = _Budget(max_error, speedup, quantile, studio.baseline())
        best = _search(studio, budget)
    errors = sorted(trial.error for trial in best)
    setting = Setting(
        threshold=best[0].threshold,
        steps=studio.steps,
        model=fingerprint(pipe),
        cache=knobs,
        max_error=max_error,
        speedup=speedup,
        quantile=quantile,
        error=errors[-1 - budget.allowed],
        worst_error=errors[-1],
        calls=sum(trial.calls for trial in best),
        computed=sum(trial.computed for trial in best),
        prompts=len(best),
        pictures=studio.pictures,
    )
    if apply:
        handle = handle_of(pipe)
        put = set_cache_threshold if handle and "cache" in handle.states else apply_cache
        put(pipe, setting)
    return setting


class _Studio:
    """Makes pictures, one after the other, measures and counts them, and moves the bar."""

    def __init__(
        self, pipe: Any, cache: Any, jobs: list[Job], on_trial: Callable[[Trial], object] | None, progress: bool | None
    ) -> None:
        from tqdm.auto import tqdm

        self._pipe, self._cache, self._jobs, self._on_trial = pipe, cache, jobs, on_trial
        self._first: list[Trial] = []
        self.pictures = self.steps = 0
        self._bar = tqdm(unit="picture", disable=None if progress is None else not progress)
        self.at_most(1 + len(LADDER).bit_length())

    def close(self) -> None:
        """Takes the bar off."""
        self._bar.close()

    def baseline(self) -> list[Trial]:
        """Every prompt's picture without hits."""
        for index in range(len(self._jobs)):
            self._first.append(self._make(index, 0.0))
            steps = len(self._pipe.scheduler.timesteps)
            if self.steps not in (0, steps):
                found = f"{self.steps} denoising steps, and {steps} in prompt {index}"
                raise ArgumentError(f"prompts: found {found}, needed the same in all: tune once for each")
            self.steps = steps
        return self._first

    def race(self, threshold: float, order: list[int], budget: _Budget) -> tuple[list[Trial], bool]:
        """The prompts in this order, until the budget is out of reach; whether it is held."""
        trials: list[Trial] = []
        for index in order:
            trials.append(self._make(index, threshold))
            if budget.lost(trials):
                return trials, False
        return trials, True

    def at_most(self, races: int) -> None:
        """Tells the bar how much can be left."""
        self._bar.total = self.pictures + races * len(self._jobs)
        self._bar.refresh()

    def _make(self, index: int, threshold: float) -> Trial:
        self._bar.set_description(f"threshold {threshold:g}")
        self._cache.threshold = threshold
        before = cache_stats(self._pipe)
        job = dict(self._jobs[index])
        job["generator"] = _copied(job["generator"])  # every picture of this prompt from the same noise
        pictures = tuple(self._pipe(**job).images)
        after = cache_stats(self._pipe)
        computed = after.computed - before.computed
        calls = computed + after.hits - before.hits
        if not calls:
            raise ArgumentError(f"prompts: found no denoiser call in prompt {index}, needed a picture that is drawn")
        first = self._first[index].pictures if threshold else pictures
        error = max(_error(a, b) for a, b in zip(first, pictures, strict=True))
        trial = Trial(index, threshold, pictures, error, calls, computed)
        self.pictures += 1
        self._bar.update()
        if self._on_trial:
            self._on_trial(trial)
        return trial


def _search(studio: _Studio, budget: _Budget) -> list[Trial]:
    """The trials of all prompts at the threshold that is found, by bisection of the ladder."""
    found = budget.baseline if budget.max_error is not None else None
    low, high = -1, len(LADDER)  # rungs below which all hold the budget's side, and from which on none does
    worst = {trial.prompt: 0.0 for trial in budget.baseline}
    while high - low > 1:
        studio.at_most((high - low - 1).bit_length())
        rung = (low + high) // 2
        order = sorted(worst, key=lambda prompt: -worst[prompt])
        trials, held = studio.race(LADDER[rung], order, budget)
        worst |= {trial.prompt: budget.badness(trial) for trial in trials}
        if held:
            found = trials
        if held == (budget.max_error is not None):
            low = rung
        else:
            high = rung
    studio.at_most(0)
    if found is None:
        raise ArgumentError(
            f"speedup: found {budget.speedup!r}, needed one that a threshold up to {LADDER[-1]:g} reaches on these "
            "prompts: ask for less, or for more denoising steps"
        )
    return found


def _check(max_error: float | None, speedup: float | None, quantile: float) -> None:
    if (max_error is None) == (speedup is None):
        raise ArgumentError(
            f"found max_error={max_error!r} and speedup={speedup!r}, needed one: max_error=0.02 (they may differ by "
            "2 % of the way from black to white) or speedup=1.5 (two thirds of the calls are computed)"
        )
    if max_error is not None and not (_is_number(max_error) and 0 <= max_error <= 1):
        raise ArgumentError(f"max_error: found {max_error!r}, needed a share from 0 to 1, such as 0.02")
    if speedup is not None and not (_is_number(speedup) and 1 < speedup < math.inf):
        raise ArgumentError(f"speedup: found {speedup!r}, needed a number above 1, such as 1.5")
    if not (_is_number(quantile) and 0 < quantile <= 1):
        raise ArgumentError(f"quantile: found {quantile!r}, needed a share above 0, up to 1, such as 0.9")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(prompts: Any) -> list[Any]:
    """The prompts as a list of at least one."""
    if isinstance(prompts, str | Mapping):
        raise ArgumentError(f"prompts: found one {type(prompts).__name__}, needed a list of them: [{prompts!r:.60}]")
    listed = list(prompts)
    if not listed:
        raise ArgumentError("prompts: found none, needed what you draw with this pipeline, 8 or more to tell something")
    return listed


def _job(index: int, prompt: Any, call: Mapping[str, Any], seed: int) -> Job:
    """The arguments of this prompt's call."""
    if not isinstance(prompt, str | Mapping):
        found = f"found a {type(prompt).__name__} at {index}"
        raise ArgumentError(f'prompts: {found}, needed a text, or a call\'s arguments such as {{"prompt": "a cat"}}')
    job: Job = {**call, **({"prompt": prompt} if isinstance(prompt, str) else prompt)}
    if job.setdefault("output_type", "pil") != "pil" or not job.get("return_dict", True):
        raise ArgumentError(
            f"prompts: found output_type or return_dict at {index}: leave both out, pictures are compared"
        )
    job.setdefault("generator", torch.Generator("cpu").manual_seed(seed + index))
    return job


def _copied(generator: Any) -> Any:
    """A generator, or a list of them, in the same state."""
    if isinstance(generator, list | tuple):
        return [_copied(one) for one in generator]
    return generator.clone_state() if isinstance(generator, torch.Generator) else generator


def _error(a: Any, b: Any) -> float:
    """The root mean square difference of two pictures, 1 from black to white."""
    import numpy as np

    pixels = [np.asarray(picture, dtype=np.float32) for picture in (a, b)]
    return float(np.sqrt(np.mean((pixels[0] - pixels[1]) ** 2, dtype=np.float64)) / 255)
