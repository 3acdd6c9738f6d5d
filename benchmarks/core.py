"""The core at FLUX.1's full size on one GPU: what a computed and a cached step cost, what is exact.

    python benchmarks/core.py --out benchmarks/results

Random bfloat16 weights: real times and memory, no pictures and no hit rates; cached steps are forced. 1024x1024, batch
1, 4096 image + 512 text tokens. A step's time is the difference between a call of 7 steps and one of 1, so that what a
call costs apart from its steps is left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

import fluxfire

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "gpu"))
from test_full_size import full_size, run

STEPS = 6


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of `work` with the GPU done before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def step_ms(pipe: Any) -> float:
    """Milliseconds of a denoising step, median of three differences."""
    run(pipe, steps=1)
    times = [seconds(lambda: run(pipe, steps=1 + STEPS)) - seconds(lambda: run(pipe, steps=1)) for _ in range(3)]
    return round(median(times) / STEPS * 1e3, 1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    return ((a - b).float().norm() / b.float().norm()).item()


def denoiser() -> list[dict[str, Any]]:
    """Rows for the transformer: eager, compiled, compiled and cached."""
    pipe = full_size()
    baseline = run(pipe)
    rows = [{"variant": "eager", "ms_computed": step_ms(pipe)}]
    fluxfire.apply_compile(pipe)
    first = seconds(lambda: run(pipe, steps=1))
    compiled = run(pipe)
    rows.append({"variant": "compile", "first_call_s": round(first, 1), "ms_computed": step_ms(pipe)})
    rows[-1]["rel_error_to_eager_bf16"] = relative(compiled, baseline)
    fluxfire.apply_cache(pipe, 0)
    rows.append({"variant": "compile + cache", "exact_at_0": torch.equal(run(pipe), compiled)})
    fluxfire.set_cache_threshold(pipe, 1e-9)
    rows[-1]["ms_computed"] = step_ms(pipe)
    fluxfire.set_cache_threshold(pipe, math.inf)
    rows[-1] |= {"ms_cached": step_ms(pipe), "kept_mib": fluxfire.cache_stats(pipe).kept_bytes / 2**20}
    for size in ((512, 512), (832, 1216)):
        run(pipe, size, steps=1)
    rows[-1]["graphs_over_three_sizes"] = fluxfire.report(pipe).compile.graphs
    fluxfire.restore_pipeline(pipe)
    rows[-1]["restored_exactly"] = torch.equal(run(pipe), baseline)
    return rows


@torch.no_grad()
def vae() -> list[dict[str, Any]]:
    """Decoding 1024x1024 with the VAE at full size, in torch's layout and in channels_last."""
    pipe = full_size()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        pipe.vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            layers_per_block=2,
        ).eval()
        latents = torch.randn(1, 16, 128, 128)
    torch.set_default_dtype(torch.float32)
    rows = []
    for variant in ("vae, torch's layout", "vae, channels_last"):
        if "last" in variant:
            fluxfire.apply_memory_format(pipe)
        held = torch.cuda.memory_allocated()
        pipe.vae.decode(latents)
        torch.cuda.reset_peak_memory_stats()
        times = [seconds(lambda: pipe.vae.decode(latents)) for _ in range(9)]
        peak = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
        rows.append({"variant": variant, "ms_decode": round(median(times[2:]) * 1e3, 1), "peak_gib": peak})
    return rows


def main() -> None:
    """Runs everything and writes one results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    gpu = torch.cuda.get_device_name()
    versions = {"gpu": gpu, "torch": torch.__version__, "diffusers": diffusers.__version__}
    date = datetime.date.today().isoformat()
    result = {"run": versions | {"command": "python benchmarks/core.py", "date": date}, "rows": denoiser() + vae()}
    path = out / f"core_{gpu.replace(' ', '-')}_{date}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["rows"], indent=1), f"\nwritten: {path}")


if __name__ == "__main__":
    main()
