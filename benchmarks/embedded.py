"""The cache on the embedded model: hits and distance to the uncached pictures over thresholds.

    python benchmarks/embedded.py --cases 40 --out benchmarks/results

Real denoising dynamics, unlike random weights: committed prompts and seeds, text to image and edits of held-out things,
28 steps, float32. Each picture is compared with the same stack's without the cache, so rounding is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

import fluxfire
from fluxfire import demo
from fluxfire.bench import quality, results
from fluxfire.demo import compare

THRESHOLDS = (0.0, 0.05, 0.12, 0.25)


def make(pipe: Any, job: compare.Job, steps: int) -> np.ndarray:
    """One picture as (H, W, 3) in 0..255."""
    image = {} if job.reference is None else {"image": job.reference}
    generator = torch.Generator().manual_seed(job.seed)
    call = demo.call_kwargs() | image
    return np.asarray(pipe(prompt=job.prompt, num_inference_steps=steps, generator=generator, **call).images[0])


def measure(pipe: Any, kind: str, jobs: list[compare.Job], steps: int) -> list[dict[str, Any]]:
    """A row a threshold: share of hits, PSNR and SSIM to the pictures at threshold 0."""
    rows, baselines = [], []
    for threshold in THRESHOLDS:
        fluxfire.set_cache_threshold(pipe, threshold)
        shares, psnr, ssim = [], [], []
        for index, job in enumerate(tqdm(jobs, desc=f"{kind} at {threshold:g}")):
            picture = make(pipe, job, steps)
            if not threshold:
                baselines.append(picture)
            shares.append(fluxfire.cache_stats(pipe).marks().count(".") / steps)
            psnr.append(quality.psnr(picture, baselines[index]))
            ssim.append(quality.ssim(picture, baselines[index]))
        row = {"workload": f"embedded-{kind}", "threshold": threshold, "steps": steps, "pictures": len(shares)}
        row |= {"hits": round(mean(shares), 3), "hits_sd": round(stdev(shares), 3)}
        if threshold:
            same = sum(math.isinf(value) for value in psnr)  # pictures without a single hit that mattered
            lower = {"psnr_median": median(psnr), "psnr_min": min(psnr)}  # infinite where the pictures are equal
            row |= {name: None if math.isinf(value) else round(value, 2) for name, value in lower.items()}
            row |= {"identical": same, "ssim_median": round(median(ssim), 4)}
        rows.append(row)
    return rows


def arguments(what: str) -> argparse.Namespace:
    """Of a script on the embedded model."""
    parser = argparse.ArgumentParser(description=what.splitlines()[0])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def write(script: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    """A results file of its own."""
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
    command = f"python benchmarks/{script}.py --cases {options.cases}"
    about = versions | {"command": command, "date": datetime.date.today().isoformat()}
    path = results.new_path(options.out, script.replace("_", "-"), "cpu")
    path.write_text(json.dumps({"run": about, "rows": rows}, indent=1) + "\n")
    return path


def main() -> None:
    """Runs both jobs and writes one results file and a table."""
    options = arguments(__doc__)
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    fluxfire.apply_cache(pipe, 0)
    jobs = compare.example_jobs(options.cases)
    of_kind = {"t2i": [job for job in jobs if job.kind == "text"], "edit": [job for job in jobs if job.kind == "edit"]}
    rows = [row for kind in of_kind for row in measure(pipe, kind, of_kind[kind], options.steps)]
    path = write("embedded", rows, options)
    for row in rows:
        print(row)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
