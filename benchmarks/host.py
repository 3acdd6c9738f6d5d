"""What the host takes for one block of each kind, which is what a step takes where the GPU waits for it.

    python benchmarks/host.py --variants fluxfire,lossless-all+kernels,float8-all+kernels --out benchmarks/results

Runs of pictures so small that the GPU is done with a block before the host has launched the next, at three depths: what
two more blocks take is theirs alone. The time is until the call returns, and until the GPU is done beside it: where the
two are far apart, the GPU was behind after all. One loop of Python before each row tells how fast the host was, since
hosts differ, and change while other work is on them. On a CPU `--workload tiny-t2i` tries it out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from step import device
from tqdm import tqdm

from fluxfire.bench import results, timing, variants, workloads
from fluxfire.bench.workloads import WORKLOADS, Picture, Workload

DEPTHS = {"double": (3, 1), "single": (1, 3)}  # beside (1, 1)
BLOCKS = {"double": 19, "single": 38}
STEPS = 8


def loop_s() -> float:
    """Seconds of one loop of Python."""
    start, total = time.perf_counter(), 0
    for number in range(1_000_000):
        total += number * number
    return time.perf_counter() - start


def run_ms(workload: Workload, name: str, depth: tuple[int, int], repeats: int) -> tuple[float, float]:
    """Milliseconds a step of a pipeline of this depth: until the call returns, and until the GPU is done."""
    torch._dynamo.reset()
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    pipe = workloads.build(workload, device(), dtype, depth=depth)
    variants.VARIANTS[name].apply(pipe, STEPS)
    job = Picture(workload, pipe, None, 1)
    reference = job.random_reference()
    job.denoise(STEPS, reference)
    returned, done = [], []
    for _ in range(repeats):
        timing.synchronize(device())
        start = time.perf_counter()
        job.denoise(STEPS, reference)
        returned.append(time.perf_counter() - start)
        timing.synchronize(device())
        done.append(time.perf_counter() - start)
    return median(returned) / STEPS * 1e3, median(done) / STEPS * 1e3


def measure(workload: Workload, name: str, repeats: int) -> dict[str, Any]:
    """A row: ms of the host for each kind of block, and for FLUX.1's blocks."""
    row: dict[str, Any] = {"variant": name, "loop_s": loop_s()}
    base = run_ms(workload, name, (1, 1), repeats)
    for kind, depth in DEPTHS.items():
        more = run_ms(workload, name, depth, repeats)
        row[kind], row[f"{kind}_done"] = ((b - a) / 2 for a, b in zip(base, more, strict=True))
    row["step"] = sum(row[kind] * number for kind, number in BLOCKS.items())
    return {key: results.plain(value) for key, value in row.items()}


def main() -> None:
    """A row a variant; one results file and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="fluxfire,lossless-all+kernels,float8-all+kernels")
    parser.add_argument("--workload", default="t2i-512", choices=[name for name in WORKLOADS if "embedded" not in name])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    if workload.model == "full":
        workload = replace(workload, side_px=256, text_tokens=128)
    names = [variant.name for variant in variants.named(options.variants)]
    rows = [measure(workload, name, options.repeats) for name in tqdm(names)]
    for row in rows:
        double, single = (f"{kind} {row[kind]:.3f} (GPU {row[f'{kind}_done']:.3f})" for kind in BLOCKS)
        print(f"{row['variant']:32} {double}, {single}, step {row['step']:.1f} ms; loop {row['loop_s']:.3f} s")
    if options.out:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        about = {"gpu": gpu, "torch": torch.__version__, "diffusers": diffusers.__version__}
        about["command"] = f"python benchmarks/host.py --variants {options.variants} --repeats {options.repeats}"
        about["date"] = datetime.date.today().isoformat()
        options.out.mkdir(parents=True, exist_ok=True)
        results.new_path(options.out, "host", gpu).write_text(json.dumps({"run": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
