"""Other ways to decide which calls hit, on the tuning pictures of `front.py`: does one move the front?

    python benchmarks/front_ideas.py --work ~/front

- `plain`: the distance to the last computed call, below one threshold.
- `accumulated`: the distances from call to call since the last computed one, summed (as TeaCache does).
- `falling`, `rising`: the threshold goes along a line over the run, from 1.5 to 0.5 times its value, or the other way.

Each holds the residual (`extrapolate` 0) or forecasts it (1, 2). PSNR is read off at the front's targets, by a line
between the thresholds on either side.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from front import KINDS, TARGETS, Job, Kind, Work, decode, fresh, inputs

import fluxfire
from fluxfire.first_block import FirstBlockCache
from fluxfire.patches import handle_of

LADDER: Final = (0.03, 0.04, 0.055, 0.075, 0.1, 0.13, 0.18)


class Accumulated(FirstBlockCache):
    """Sums the distances from call to call, for one guidance branch."""

    def _distances(self, kept: Any, first: torch.Tensor) -> tuple[float, ...]:
        sums = getattr(self, "sums", [0.0] * len(first))
        if sum(kept.consecutive_hits) == 0 or self.before.shape != first.shape:
            self.before = kept.first
        step = (first - self.before).abs().sum((1, 2)) / self.before.abs().sum((1, 2))
        counts = kept.consecutive_hits
        self.sums = [d + (s if n else 0.0) for d, s, n in zip(step.tolist(), sums, counts, strict=True)]
        self.before = first
        return tuple(self.sums)


class Sloped(FirstBlockCache):
    """Its threshold changes over the run: by `slope` to either side of its value."""

    slope = 0.5

    def _hits_of(self, call: Any, distances: tuple[float, ...], consecutive: list[int]) -> tuple[bool, ...]:
        factor = 1 + self.slope * (2 * call.step / (call.steps - 1) - 1)
        return super()._hits_of(call, tuple(d / factor for d in distances), consecutive)


class Falling(Sloped):
    """Bolder at the start."""

    slope = -0.5


IDEAS: Final = {"plain": FirstBlockCache, "accumulated": Accumulated, "falling": Falling, "rising": Sloped}


def measured(work: Work, idea: str, order: int, kind: Kind, steps: int, threshold: float) -> tuple[float, float]:
    """Share of calls saved, and PSNR, means over the tuning pictures."""
    pipe, given = fresh(), inputs(work.folder, kind, -1)
    fluxfire.apply_cache(pipe, threshold, extrapolate=order)
    handle = handle_of(pipe)
    assert handle
    handle.states["cache"].__class__ = IDEAS[idea]
    latents = pipe(num_inference_steps=steps, **given.call(slice(None))).images.float().numpy()
    hits = np.mean([c.hits for c in fluxfire.cache_stats(pipe).last_run])
    squares = ((decode(latents) - work.baseline(kind, steps, -1)).astype(np.float64) ** 2).mean((1, 2, 3))
    return float(hits), float(np.mean(-10 * np.log10(np.maximum(squares, 1e-12))))


def main() -> None:
    """Prints a line an idea."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Work(options.work)
    for kind in KINDS:
        work.make(Job("baseline", {}, kind, options.steps, -1))
        for order in options.orders:
            for idea in IDEAS:
                found = [measured(work, idea, order, kind, options.steps, threshold) for threshold in LADDER]
                at = np.interp(TARGETS, *zip(*sorted(found), strict=True))
                told = ", ".join(f"{psnr:.1f} dB at {target:.0%}" for target, psnr in zip(TARGETS, at, strict=True))
                span = f"{min(found)[0]:.0%} to {max(found)[0]:.0%} saved"
                print(f"{kind} extrapolate={order} {idea}: {told} ({span})", flush=True)


if __name__ == "__main__":
    main()
