"""Attention and weights in 8 bits on the embedded model: how far pictures are from those of the same pipeline without.

    python benchmarks/embedded_8bit.py --cases 40 --out benchmarks/results

Committed prompts and seeds, 28 steps, float32, uncompiled. On a CPU torch's operations do what the kernels do to the
same 8-bit numbers, but for sums, which are float32's here.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from embedded import arguments, make, write
from tqdm import tqdm

import fluxfire
from fluxfire import demo, fused_kernels
from fluxfire.bench import quality
from fluxfire.demo import compare


def attention(pipe: Any) -> None:
    """Attention alone in 8 bits; the other kernels are left to torch's operations."""
    fluxfire.apply_fused_kernels(pipe, parts=("attention",))


def weights(pipe: Any) -> None:
    """The blocks' linear layers in float8."""
    fluxfire.apply_quantization(pipe, "float8")


def both(pipe: Any) -> None:
    """In the order of `optimize_pipeline`."""
    weights(pipe)
    attention(pipe)


def cache(pipe: Any) -> None:
    """For scale."""
    fluxfire.apply_cache(pipe, 0.12)


STACKS: dict[str, Callable[[Any], None]] = {
    "attention in 8 bits": attention,
    "float8 weights": weights,
    "both": both,
    "the cache at 0.12": cache,
}


def main() -> None:
    """Every stack on every job; one results file and a table."""
    options = arguments(__doc__)
    fused_kernels.ON_CPU = True
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    jobs = compare.example_jobs(options.cases)
    plain = [make(pipe, job, options.steps) for job in tqdm(jobs, desc="without")]
    rows = []
    for name, apply in STACKS.items():
        apply(pipe)
        far = [
            quality.psnr(make(pipe, job, options.steps), before)
            for job, before in zip(tqdm(jobs, desc=name), plain, strict=True)
        ]
        fluxfire.restore_pipeline(pipe)
        for kind in compare.KINDS:
            of_kind = [value for job, value in zip(jobs, far, strict=True) if job.kind == kind]
            row = {"stack": name, "kind": kind, "pictures": len(of_kind), "steps": options.steps}
            rows.append(row | {"psnr_median": round(median(of_kind), 2), "psnr_min": round(min(of_kind), 2)})
    write("embedded_8bit", rows, options)
    for row in rows:
        print(f"{row['stack']:20} {row['kind']:5} {row['psnr_median']:6.1f} dB ({row['psnr_min']:.1f})")


if __name__ == "__main__":
    main()
