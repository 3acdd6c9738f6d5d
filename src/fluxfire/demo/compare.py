"""The same pictures from the same seeds, without and with fluxfire, and how they differ in time and in pixels.

Two copies of the embedded pipeline are loaded; one is optimized. Each first makes a short warm-up run of every kind, in
which the optimized one compiles: those seconds are counted apart. Then the two take turns picture by picture, so that a
machine that gets slower or busier does so for both. A picture's time is that of the whole call: text encoders,
denoising steps, decoding.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Final, Literal

import numpy as np
import torch
from PIL import Image

import fluxfire
from fluxfire import demo
from fluxfire.bench.quality import psnr, ssim

Kind = Literal["text", "edit"]
KINDS: Final[tuple[Kind, ...]] = ("text", "edit")
Advance = Callable[[str], None]  # told "warm-up", "baseline" or "optimized" after each denoising step

WARM_UP_STEPS: Final = 2  # the second step may hit, so that both ways through the blocks are warm


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to make; an edit has a reference picture."""

    kind: Kind
    prompt: str
    seed: int
    reference: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """The picture of one job, made twice, with the seconds of each call and the distance of the two."""

    job: Job
    baseline: Image.Image
    optimized: Image.Image
    baseline_s: float
    optimized_s: float
    computed_steps: int
    cached_steps: int
    psnr_db: float  # math.inf: the same to the last bit
    ssim: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All pairs, and what holds for the whole run. `compile_s` lies before the timed calls and is in none of them."""

    pairs: tuple[Pair, ...]
    report: fluxfire.Report
    compile_s: float
    graphs: int

    def of(self, kind: Kind) -> tuple[Pair, ...]:
        """The pairs of one kind: edits carry their reference's tokens and take longer."""
        return tuple(pair for pair in self.pairs if pair.job.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """Plain values. JSON has no infinity: `psnr_db` is None where the two pictures are the same to the last bit."""
        return {
            "compile_s": round(self.compile_s, 3),
            "graphs": self.graphs,
            **{kind: medians(self.of(kind)) for kind in KINDS},
            "applied": [str(step) for step in self.report.steps],
            "left_out": [asdict(skip) for skip in self.report.skips],
            "pictures": [
                {
                    "kind": pair.job.kind,
                    "prompt": pair.job.prompt,
                    "seed": pair.job.seed,
                    "baseline_s": round(pair.baseline_s, 3),
                    "optimized_s": round(pair.optimized_s, 3),
                    "computed_steps": pair.computed_steps,
                    "cached_steps": pair.cached_steps,
                    "psnr_db": None if math.isinf(pair.psnr_db) else round(pair.psnr_db, 2),
                    "ssim": round(pair.ssim, 4),
                }
                for pair in self.pairs
            ],
        }


def medians(pairs: Sequence[Pair]) -> dict[str, float]:
    """Median seconds of a picture without and with fluxfire, and the first over the second."""
    baseline_s = statistics.median(pair.baseline_s for pair in pairs)
    optimized_s = statistics.median(pair.optimized_s for pair in pairs)
    values = {"baseline_s": baseline_s, "optimized_s": optimized_s, "speedup": baseline_s / optimized_s}
    return {name: round(value, 3) for name, value in values.items()}


def example_jobs(count: int) -> tuple[Job, ...]:
    """The first `count` committed cases from text, and as many edits as far as their reference pictures are shipped."""
    text = [Job("text", case.prompt, case.seed) for case in demo.prompts("t2i")[:count]]
    shipped = demo.references()
    named = [(f"{case.name}-{case.source}", case) for case in demo.prompts("edit")]
    cases = [(name, case) for name, case in named if name in shipped][:count]
    edits = [Job("edit", case.prompt, case.seed, demo.reference(name)) for name, case in cases]
    return (*text, *edits)


def environment(pipe: Any) -> dict[str, Any]:
    """What the seconds depend on."""
    device = pipe.device
    return {
        "fluxfire": fluxfire.__version__,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }


def denoising_steps(jobs: Iterable[Job], steps: int) -> dict[str, int]:
    """How often `compare` will call `advance` with each name."""
    jobs = tuple(jobs)
    return {
        "warm-up": 2 * WARM_UP_STEPS * len({job.kind for job in jobs}),
        "baseline": steps * len(jobs),
        "optimized": steps * len(jobs),
    }


def compare(
    jobs: Iterable[Job],
    baseline: Any,
    optimized: Any,
    call_kwargs: dict[str, Any],
    *,
    steps: int = 28,
    advance: Advance = lambda name: None,
) -> Comparison:
    """Makes every job's picture with both pipelines in turn.

    Args:
        jobs: what to draw.
        baseline: a pipeline as diffusers gives it.
        optimized: another copy of it, after `fluxfire.optimize_pipeline`.
        call_kwargs: further arguments of each call, such as `fluxfire.demo.call_kwargs()`.
        steps: denoising steps of a picture.
        advance: called after each denoising step, for a progress bar.
    """
    jobs = tuple(jobs)
    for pipe in (baseline, optimized):
        for job in {job.kind: job for job in jobs}.values():
            _make(pipe, job, WARM_UP_STEPS, call_kwargs, lambda: advance("warm-up"))
    compiled = fluxfire.report(optimized).compile
    pairs = []
    for job in jobs:
        before, before_s = _make(baseline, job, steps, call_kwargs, lambda: advance("baseline"))
        after, after_s = _make(optimized, job, steps, call_kwargs, lambda: advance("optimized"))
        pairs.append(_pair(job, before, after, before_s, after_s, _cached_steps(optimized), steps))
    report = fluxfire.report(optimized)
    return Comparison(
        tuple(pairs),
        report,
        compile_s=compiled.seconds if compiled else 0.0,
        graphs=report.compile.graphs if report.compile else 0,
    )


def _make(
    pipe: Any, job: Job, steps: int, call_kwargs: dict[str, Any], after_step: Callable[[], None]
) -> tuple[Image.Image, float]:
    """The job's picture and the seconds that the call took."""

    def on_step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        after_step()
        return values

    image = {} if job.reference is None else {"image": job.reference}
    generator = torch.Generator("cpu").manual_seed(job.seed)  # the CPU's: the same noise on every device
    start = time.perf_counter()
    picture = pipe(
        prompt=job.prompt,
        num_inference_steps=steps,
        generator=generator,
        callback_on_step_end=on_step_end,
        **image,
        **call_kwargs,
    ).images[0]  # on the host, so a GPU has finished
    return picture, time.perf_counter() - start


def _pair(
    job: Job, before: Image.Image, after: Image.Image, before_s: float, after_s: float, cached_steps: int, steps: int
) -> Pair:
    a, b = np.asarray(before), np.asarray(after)
    return Pair(job, before, after, before_s, after_s, steps - cached_steps, cached_steps, psnr(a, b), ssim(a, b))


def _cached_steps(pipe: Any) -> int:
    """Denoising steps of the last run in which the cache hit (batch 1, one guidance branch)."""
    cache = fluxfire.report(pipe).cache
    return sum(all(call.hits) for call in cache.last_run) if cache else 0
