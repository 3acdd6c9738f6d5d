"""What the mega-cache keeps and saves: size, share of what is found again, seconds; modes, static sizes, two at once.

    python benchmarks/megacache.py --time-limit 560      one GPU, FLUX.1's transformer and VAE decoder, random weights
    python benchmarks/megacache.py --tiny                on a CPU, to see that it works

Each row is a process of its own with empty caches of torch and Triton. Of each variant first one that compiles and
keeps ("cold"), then one that finds ("found"); or two at the same moment on an empty store ("both 1", "both 2"), of
which one should compile and the other wait for it. Columns:

- `optimize_s`, `first_s`: `apply_compile`, and the first picture of one step with all it waited for;
- `ms_step`: a later step at 1024x1024, (a picture of 7 steps - one of 1) / 6, the better of two;
- `found_share`: what was found of all that was needed: blocks compiled ahead of time, and graphs of torch's;
- `blocks_found`, `blocks_compiled`, `graphs_found`, `graphs_compiled`: the same by tier;
- `store_mib`: the store after this process; `saved_s` (only "found"): first_s of the variant's cold process - this one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from coldstart import picture, pipeline, transformer_config

# variant: what apply_compile is given, and pictures' sizes in turn, of which the last is measured
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "static": {"dynamic": False},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "static max-autotune": {"mode": "max-autotune-no-cudagraphs", "dynamic": False},
    "decoder": {"vae": True},  # torch's own artifacts, the second tier
    "cuda graphs": {"mode": "reduce-overhead"},  # the second tier alone
}
ORDER = (
    *(("default", ("cold", "found")), ("static", ("cold", "found")), ("decoder", ("cold", "found"))),
    *(("default", ("both",)), ("max-autotune", ("cold", "found")), ("cuda graphs", ("cold", "found"))),
    ("static max-autotune", ("cold", "found")),
)
COLUMNS = ("first_s", "ms_step", "found_share", "blocks_found", "blocks_compiled", "graphs_found", "graphs_compiled")


def measure(variant: str, store: Path, blocks: list[int], tiny: bool) -> dict[str, Any]:
    """One process."""
    import torch

    import fluxfire
    from fluxfire.store import Store

    device, size = ("cpu", 64) if tiny else ("cuda", 1024)
    pipe = make(blocks, tiny, device)
    knobs = VARIANTS[variant]
    start = time.perf_counter()
    fluxfire.apply_compile(pipe, megacache=store, **knobs)
    row: dict[str, Any] = {"optimize_s": round(time.perf_counter() - start, 2)}
    start = time.perf_counter()
    show(pipe, size, 1, knobs)
    row["first_s"] = round(time.perf_counter() - start, 2)
    calls = []
    for _ in range(2):
        times = []
        for steps in (7, 1):
            begin = time.perf_counter()
            picture(pipe, size, steps)
            times.append(time.perf_counter() - begin)
        calls.append(times[0] - times[1])
    row["ms_step"] = round(min(calls) / 6 * 1e3, 2)
    other = dict(fluxfire.report(pipe).other)
    ahead, second = other["megacache"], other["torch_cache"]
    row |= {"blocks_found": ahead.hits, "blocks_compiled": ahead.misses}
    row |= {"graphs_found": second.hits, "graphs_compiled": second.misses}
    found, needed = ahead.hits + second.hits, ahead.hits + ahead.misses + second.hits + second.misses
    row["found_share"] = round(found / needed, 3) if needed else None
    row |= {"load_s": round(ahead.load_s + second.load_s, 2), "waited_s": round(ahead.waited_s, 2)}
    row |= {"reasons": ahead.reasons + second.reasons, "served": ahead.served, "traced": ahead.traced}
    kept = Store(store)
    row |= {"store_mib": round(kept.size() / 2**20, 2), "entries": len(kept.keys())}
    if device == "cuda":
        row["gpu"] = torch.cuda.get_device_name()
    return row | {"torch": torch.__version__}


def make(blocks: list[int], tiny: bool, device: str) -> Any:
    """FLUX.1's transformer with N(0, 0.02) weights, and a decoder of its VAE's size."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**transformer_config(blocks, tiny))
    transformer = transformer.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for tensor in transformer.parameters():
        tensor.normal_(std=0.02)
    pipe = pipeline(transformer)
    if not tiny:
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        shape = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
        quant = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159}
        pipe.vae = AutoencoderKL(**kinds, **shape, **quant, scaling_factor=0.3611).eval().requires_grad_(False)
    pipe.vae.to(device, torch.bfloat16)
    return pipe


def show(pipe: Any, size: int, steps: int, knobs: dict[str, Any]) -> None:
    """A picture; decoded where the decoder is what is measured."""
    import torch

    latents = picture(pipe, size, steps)
    if knobs.get("vae"):
        channels, side = pipe.vae.config.latent_channels, size // pipe.vae_scale_factor
        make = {"device": pipe.vae.device, "dtype": pipe.vae.dtype}
        with torch.no_grad():
            pipe.vae.decode(torch.zeros(1, channels, side, side, **make), return_dict=False)[0].cpu()
    del latents


def start(variant: str, store: Path, options: argparse.Namespace, caches: Path) -> subprocess.Popen[str]:
    """A process with empty caches."""
    fresh = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    command = [sys.executable, __file__, "--variant", variant, "--store", str(store)]
    command += ["--blocks", *map(str, options.blocks), *["--tiny"] * options.tiny]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | fresh, **pipes)


def finish(process: subprocess.Popen[str], left_s: float) -> dict[str, Any]:
    """What it measured."""
    try:
        out, error = process.communicate(timeout=max(left_s, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"failed": f"not done after {left_s:.0f} s"}
    return json.loads(out.splitlines()[-1]) if process.returncode == 0 else {"failed": error[-1500:]}


def rows(options: argparse.Namespace, folder: Path, deadline: float) -> Any:
    """Every row as soon as it is measured."""
    for number, (variant, processes) in enumerate(ORDER):
        if variant not in options.variants.split(","):
            continue
        store, cold = folder / f"store-{number}", None
        for process in (process for process in processes if process in options.processes.split(",")):
            if deadline - time.time() < 20:
                return
            count = 2 if process == "both" else 1
            caches = [folder / f"caches-{number}-{process}-{index}" for index in range(count)]
            begun = [start(variant, store, options, cache) for cache in caches]
            for index, one in enumerate(begun):
                row = finish(one, deadline - time.time())
                row = {"variant": variant, "process": process + f" {index + 1}" * (count > 1)} | row
                if process == "found" and cold and "first_s" in row:
                    row["saved_s"] = round(cold["first_s"] - row["first_s"], 2)
                cold = row if process == "cold" and "first_s" in row else cold
                yield row


def main() -> None:
    """Measures all variants, and writes the results after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmarks/results")))
    parser.add_argument("--blocks", type=int, nargs=2, default=None, help="double and single blocks (19 38)")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--processes", default="cold,found,both")
    parser.add_argument("--time-limit", type=float, default=560, help="seconds in all")
    parser.add_argument("--tiny", action="store_true", help="2 + 2 blocks of width 32, on a CPU")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.blocks = options.blocks or ([2, 2] if options.tiny else [19, 38])
    if options.variant:
        print(json.dumps(measure(options.variant, options.store, options.blocks, options.tiny)))
        return
    about: dict[str, Any] = {"command": " ".join(sys.argv), "date": datetime.date.today().isoformat()}
    found: list[dict[str, Any]] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(options, Path(folder), time.time() + options.time_limit):
            found.append(row)
            about |= {"gpu": row.get("gpu", "CPU"), "blocks": options.blocks}
            where = options.out / f"megacache_{about['gpu'].replace(' ', '-')}_{about['date']}.json"
            where.write_text(json.dumps({"run": about, "rows": found}, indent=1) + "\n")
            print(json.dumps(row), flush=True)
    print(f"{'variant':<20} {'process':<7} " + " ".join(f"{name:>15}" for name in (*COLUMNS, "store_mib", "saved_s")))
    for row in found:
        values = " ".join(f"{row.get(name, '')!s:>15}" for name in (*COLUMNS, "store_mib", "saved_s"))
        print(f"{row['variant']:<20} {row['process']:<7} {row.get('failed', values)}")
    if any("failed" in row for row in found):
        raise SystemExit("not every variant worked: see above")


if __name__ == "__main__":
    main()
