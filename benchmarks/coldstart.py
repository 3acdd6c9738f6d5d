"""From the start of a process to the end of its first denoising step, with FLUX.1's transformer read from the disk.

    python benchmarks/coldstart.py --time-limit 400                              one GPU, 12 B parameters, 24 GB
    python benchmarks/coldstart.py --blocks 2 2 --variants eager,kept,prefetch   the same at 4 of 57 blocks
    python benchmarks/coldstart.py --tiny                                        on a CPU, to see that it works

A checkpoint of random bfloat16 values is written first, in shards; then each variant is a process of its own with empty
caches of torch and Triton, once with the checkpoint in the page cache and once without (`posix_fadvise`). A picture of
1024x1024, batch 1, prompts given as embeddings, no VAE: text encoders and VAE cost every variant the same. The seconds:

- `imports_s`: process start (the interpreter's too) until torch, diffusers and fluxfire are imported, from the bytecode
  that an earlier process wrote;
- `weights_s`: `from_pretrained(..., device_map=...)`, until the weights are on the device, and quantized if they are;
- `artifacts_s`: what came on top of eager before the first step: `apply_compile`, and what the first step waited for
  artifacts (`load_s` is what loading them took, whichever thread did it);
- `first_step_s`: a call of one step, without that waiting, compilation included;
- `total_s`: process start to the end of the first step; the sum of these.

`ms_computed` is a later step: (a call of 7 steps - a call of 1) / 6, the better of two. `peak_gib` and `host_gib`: the
most that tensors held on the GPU, and the process in memory, until the end of the first step. "quantized" and
"prepared" are in float8 and uncompiled: quantized at each start, or saved once (`save_quantized`) and loaded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# variant: (what compiles, which folder of artifacts, whether fluxfire.prefetch() is called)
VARIANTS: dict[str, tuple[str, str | None, bool]] = {
    "eager": ("", None, False),
    "kept": ("fluxfire", "store", False),  # the first process: compiles, and keeps what it compiled
    "store": ("fluxfire", "store", False),  # a later process: finds it
    "prefetch": ("fluxfire", "store", True),
    "traced": ("fluxfire", None, False),
    "diffusers": ("diffusers", None, False),
    "quantized": ("", None, False),
    "prepared": ("", None, False),
}
ORDER = (
    *(("eager", "warm"), ("kept", "warm"), ("prefetch", "warm"), ("eager", "cold"), ("prefetch", "cold")),
    *(("store", "warm"), ("diffusers", "warm"), ("traced", "warm"), ("store", "cold")),
    *(("quantized", "warm"), ("prepared", "warm"), ("quantized", "cold"), ("prepared", "cold")),
    *(("eager", "warm"), ("prefetch", "warm"), ("eager", "cold"), ("prefetch", "cold")),  # again, while there is time
)
COLUMNS = ("imports_s", "weights_s", "artifacts_s", "first_step_s", "total_s", "traced_graphs", "ms_computed")


def transformer_config(blocks: list[int], tiny: bool) -> dict[str, Any]:
    """FLUX.1's, or one of a few thousand parameters."""
    small = {
        "in_channels": 16,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    return {"num_layers": blocks[0], "num_single_layers": blocks[1], "guidance_embeds": True} | (small if tiny else {})


def write_checkpoint(folder: Path, config: dict[str, Any], device: str, shard_bytes: int = 2**31) -> None:
    """Random bfloat16 values as diffusers saves them: shards, their index, the configuration.

    The values are one block of 1 GB from N(0, 0.02), of which each tensor takes the next piece, so that writing is what
    takes the time; six shards at once.
    """
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    shards: list[dict[str, int]] = [{}]  # of each tensor the bytes
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if sum(shards[-1].values()) + tensor.numel() * 2 > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.numel() * 2
    names = [f"diffusion_pytorch_model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    largest = max(max(sizes.values()) for sizes in shards)
    values = torch.randn(max(largest // 2, 2**29 if device == "cuda" else 0), device=device, dtype=torch.bfloat16)
    block = memoryview(values.mul_(0.02).cpu().view(torch.uint8).numpy())

    def write(name: str, sizes: dict[str, int]) -> None:
        header, at = {}, 0
        for key, size in sizes.items():
            header[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with open(folder / name, "wb", buffering=0) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            at = 0
            for size in sizes.values():
                at = at if at + size <= len(block) else 0
                done = 0
                while done < size:
                    done += file.write(block[at + done : at + size])
                at += size

    folder.mkdir(parents=True)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, names, shards))
    where = {key: name for name, sizes in zip(names, shards, strict=True) for key in sizes}
    index = {"metadata": {"total_size": sum(map(sum, map(dict.values, shards)))}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    model.save_config(folder)


def in_page_cache(path: Path) -> float:
    """The share of a file's pages that are in memory, asked of the kernel."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = path.stat().st_size
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    with open(path, "rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    try:
        if libc.mincore(address, size, pages):
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(address, size)
    return sum(byte & 1 for byte in pages.raw) / len(pages)


def set_page_cache(folder: Path, state: str) -> float:
    """Reads the checkpoint, or asks the kernel to drop it; the share that is in memory then."""
    shards = sorted(folder.glob("*.safetensors"))
    for path in shards:
        with open(path, "rb", buffering=0) as file:
            if state == "cold":
                os.fsync(file.fileno())  # what is not on the disk yet stays in memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            elif in_page_cache(path) < 1:
                while file.read(2**26):
                    pass
    return round(sum(map(in_page_cache, shards)) / len(shards), 3)


def pipeline(transformer: Any) -> Any:
    """A text-to-image pipeline around the transformer, without text encoders and with a small VAE."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    channels = transformer.config.in_channels // 4
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(
        transformer=transformer,
        vae=AutoencoderKL(block_out_channels=(8,) * 4, latent_channels=channels, norm_num_groups=4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, size: int, steps: int) -> Any:
    """Latents of one call, (1, N, C), done on the device."""
    import torch

    config, device = pipe.transformer.config, pipe.transformer.device
    make = {"generator": torch.Generator(device).manual_seed(1), "device": device, "dtype": pipe.transformer.dtype}
    latents = pipe(
        prompt_embeds=torch.randn(1, 512, config.joint_attention_dim, **make),
        pooled_prompt_embeds=torch.randn(1, config.pooled_projection_dim, **make),
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=make["generator"],
        output_type="latent",
    ).images
    return latents.cpu()


def measure(variant: str, started: float, folder: Path, device: str, size: int) -> dict[str, Any]:
    """One variant, in a process that began at `started` (seconds since the epoch)."""
    clock = _Clock(started)
    compiler, store, prefetched = VARIANTS[variant]
    if compiler == "fluxfire" or variant in ("quantized", "prepared"):
        import fluxfire

        if prefetched:
            fluxfire.prefetch(folder / store if store else "auto")
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: F401  the pipeline imports transformers

    row: dict[str, Any] = {"imports_s": clock.lap()}
    if variant == "prepared":
        transformer = fluxfire.load_quantized(folder / "prepared", device)
    else:
        weights = folder / "checkpoint"
        transformer = FluxTransformer2DModel.from_pretrained(weights, torch_dtype=torch.bfloat16, device_map=device)
    pipe = pipeline(transformer.eval().requires_grad_(False))
    if variant == "quantized":
        fluxfire.apply_quantization(pipe, "float8", keep_original=None)
    if device == "cuda":
        torch.cuda.synchronize()
    row["weights_s"] = clock.lap()
    if compiler == "fluxfire":
        fluxfire.apply_compile(pipe, megacache=folder / store if store else None)
    elif compiler == "diffusers":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    row["artifacts_s"] = clock.lap()
    out = picture(pipe, size, 1)
    row["first_step_s"] = clock.lap()
    row["total_s"] = round(time.time() - started, 2)
    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None
    row["host_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if compiler == "fluxfire" and (artifacts := dict(fluxfire.report(pipe).other).get("megacache")):
        row["artifacts_s"] = round(row["artifacts_s"] + artifacts.waited_s, 2)
        row["first_step_s"] = round(row["first_step_s"] - artifacts.waited_s, 2)
        for name in ("hits", "misses", "kept", "served", "traced", "load_s", "reasons"):
            row[name] = getattr(artifacts, name)
    counters = torch._dynamo.utils.counters["stats"] if "torch._dynamo.utils" in sys.modules else {}
    row["traced_graphs"] = counters.get("unique_graphs", 0)
    row |= _difference(out, folder / "eager.pt", torch)
    calls = [(_seconds(lambda: picture(pipe, size, 7)), _seconds(lambda: picture(pipe, size, 1))) for _ in range(2)]
    row["ms_computed"] = round(min(seven - one for seven, one in calls) / 6 * 1e3, 1)
    if variant == "quantized":
        fluxfire.save_quantized(pipe, folder / "prepared")
    return row


class _Clock:
    def __init__(self, started: float) -> None:
        self._at = started

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._at = self._at, time.time()
        return round(self._at - before, 2)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _difference(out: Any, reference: Path, torch: Any) -> dict[str, Any]:
    """How far the first step is from eager's; the first variant that asks leaves its own as the reference."""
    if not reference.exists():
        torch.save(out, reference)
    eager = torch.load(reference, weights_only=True)
    return {"difference_to_eager": float(f"{((out - eager).float().norm() / eager.float().norm()).item():.2g}")}


def child(arguments: list[str], folder: Path, timeout_s: float) -> dict[str, Any]:
    """Runs this file in a process of its own with empty caches; its last line of output, as JSON."""
    with tempfile.TemporaryDirectory(dir=folder) as caches:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
        if sys.dont_write_bytecode:  # as in some images: each process would compile all modules that it imports
            fresh |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{folder}/bytecode"}
        command = [sys.executable, __file__, "--folder", str(folder), *arguments, "--started", repr(time.time())]
        try:
            done = subprocess.run(command, env=os.environ | fresh, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {timeout_s:.0f} s"}
    if done.returncode:
        return {"failed": done.stderr[-1500:]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if warnings := [line for line in done.stderr.splitlines() if "fluxfire" in line]:
        row["log"] = warnings[:5]
    return row


def rows(
    options: argparse.Namespace, folder: Path, given: list[str], deadline: float
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every variant's row as soon as it is measured."""
    seen: set[tuple[str, str]] = set()
    longest: dict[str, float] = {}
    for variant, state in ORDER:
        again = (variant, state) in seen
        if variant not in options.variants.split(",") or (again and options.once):
            continue
        compiles = variant in ("kept", "diffusers", "traced")
        if (left := deadline - time.time()) < longest.get(state, 0) + (0 if options.tiny else 25 * compiles):
            continue
        start = time.time()
        share = set_page_cache(folder / ("prepared" if variant == "prepared" else "checkpoint"), state)
        row = child([*given, "--variant", variant], folder, max(left, 5))
        if not compiles:
            longest[state] = max(longest.get(state, 0), 1.1 * (time.time() - start))
        seen.add((variant, state))
        yield {"variant": variant, "page_cache": state, "cached_share": share} | row, again


def table(found: list[dict[str, Any]]) -> str:
    """The rows for reading."""
    lines = ["variant     weights " + " ".join(f"{name:>13}" for name in COLUMNS)]
    for row in found:
        values = " ".join(f"{row.get(name, 'failed'):>13}" for name in COLUMNS)
        lines.append(f"{row['variant']:<11} {row['page_cache']:<7} {values}")
    return "\n".join(lines)


def main() -> None:
    """Writes a checkpoint, runs every variant, and writes the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmarks/results")))
    parser.add_argument("--blocks", type=int, nargs=2, default=None, help="double and single blocks (19 38)")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--time-limit", type=float, default=400, help="seconds in all")
    parser.add_argument("--once", action="store_true", help="no variant again, however much time is left")
    parser.add_argument("--tiny", action="store_true", help="2 + 2 blocks of width 32, on a CPU")
    parser.add_argument("--folder", type=Path, help="where to put 24 GB; else a temporary folder")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, size = ("cpu", 64) if options.tiny else ("cuda", 1024)
    blocks = options.blocks or ([2, 2] if options.tiny else [19, 38])
    if options.variant == "write":
        write_checkpoint(options.folder / "checkpoint", transformer_config(blocks, options.tiny), device)
        from diffusers import FluxPipeline  # noqa: F401  so that no variant is the first to import it

        import fluxfire  # noqa: F401

        print(json.dumps(_machine(device)))
    elif options.variant:
        print(json.dumps(measure(options.variant, options.started, options.folder, device, size)))
    else:
        given = ["--blocks", *map(str, blocks), *["--tiny"] * options.tiny]
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            run(options, Path(folder), given, blocks)


def _machine(device: str) -> dict[str, Any]:
    import diffusers
    import torch
    import torch._inductor.compile_fx

    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"gpu": gpu, "torch": torch.__version__, "diffusers": diffusers.__version__}


def run(options: argparse.Namespace, folder: Path, given: list[str], blocks: list[int]) -> None:
    """Everything, in this folder."""
    start = time.time()
    machine = child([*given, "--variant", "write"], folder, options.time_limit)
    if "failed" in machine:
        raise SystemExit(f"the checkpoint was not written: {machine['failed']}")
    size = sum(path.stat().st_size for path in (folder / "checkpoint").iterdir())
    about = machine | {"command": " ".join(sys.argv), "date": datetime.date.today().isoformat(), "blocks": blocks}
    about |= {"checkpoint_gb": round(size / 1e9, 3), "written_s": round(time.time() - start, 1)}
    name = f"coldstart_{blocks[0]}x{blocks[1]}_{about['gpu'].replace(' ', '-')}_{about['date']}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(about), flush=True)
    found: list[dict[str, Any]] = []
    for row, again in rows(options, folder, given, start + options.time_limit):
        found.append(row | {"again": again})
        (options.out / name).write_text(json.dumps({"run": about, "rows": found}, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    print(table(found), f"\nwritten: {options.out / name}")
    if any("failed" in row for row in found):
        raise SystemExit("not every variant worked: see above")


if __name__ == "__main__":
    main()
