"""Where a denoising step's time goes: its products and attention alone, and its kernels by kind.

    python benchmarks/step.py kernels --workload t2i-1024 --out benchmarks/results
    python benchmarks/step.py profile --workload t2i-1024 --variants fluxfire,float8,float8-all --out benchmarks/results

`kernels` measures every matrix product of a step alone, in the model's data type and in float8 with both ways of
scaling (`fluxfire.linear`), and attention with every backend; then all of a step's products and attention one after the
other for some seconds, as the power limit lets them run. The difference between that and a compiled step is what
moves between them, plus what waits. `profile` runs some steps of a variant under torch's profiler and sums the kernels'
times by kind, with the time in which no kernel ran. Random weights; on a CPU the tiny workloads try the script out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.profiler import ProfilerActivity, profile

from fluxfire import attention
from fluxfire.bench import limits, timing, workloads
from fluxfire.bench.variants import VARIANTS
from fluxfire.bench.workloads import DEPTH, WORKLOADS, Picture, Workload
from fluxfire.linear import QuantizedLinear, quantized

SUSTAINED_S = 3.0
# Kinds of kernels by what is in their names, the first that fits.
KINDS = {
    "attention": ("flash", "fmha", "cudnn_generated", "sdpa", "attention", "sage"),
    "products": ("gemm", "cutlass", "nvjet", "cublas", "_mm", "mm(", "wgmma", "linear"),
    "reductions": ("triton_red", "triton_per"),
    "pointwise": ("triton_poi", "triton_"),
    "copies": ("memcpy", "memset", "copy"),
}


def device() -> torch.device:
    """The GPU, or the CPU to try the script out."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ms(work: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    return round(timing.median_seconds(device(), work) * 1e3, 4)


def products(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """A product of this shape in each way, as calls; the float8 ones with the input quantized already."""
    at: dict[str, Any] = {"device": device(), "dtype": dtype}
    x, layer = torch.randn(rows, inputs, **at), torch.nn.Linear(inputs, outputs, **at).requires_grad_(False)
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: layer(x)}
    if inputs % 16 or outputs % 16 or rows < 17:
        return calls
    numbers, scales = quantized(x, "float8")
    eight = QuantizedLinear.of(layer, "float8-after")
    one, weight, scale = eight.one, eight.numbers.t(), eight.scale.t()
    more = {"out_dtype": dtype, "use_fast_accum": True}
    compiled = torch.compile(lambda x: quantized(x, "float8"), dynamic=True)
    return calls | {
        "float8": lambda: torch._scaled_mm(numbers, weight, scales, scale, bias=layer.bias, **more),
        "float8-after": lambda: torch._scaled_mm(numbers, weight, one, one, **more),
        "quantize": lambda: compiled(x),
    }


def sustained(calls: list[Callable[[], Any]], seconds: float) -> float:
    """Milliseconds of all calls one after the other, over that many seconds: with the clocks that power allows."""
    for call in calls:
        call()
    timing.synchronize(device())
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for call in calls:
            call()
        timing.synchronize(device())
        rounds += 1
    return round((time.perf_counter() - start) / rounds * 1e3, 3)


@torch.no_grad()
def kernels(workload: Workload, batch: int, dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """Rows: each product, attention, and the sustained sums."""
    pipe = workloads.build(workload, torch.device("meta"), dtype, depth=None)
    tokens = workloads.tokens(workload, pipe)
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    of = limits.count(config, batch, tokens, dtype.itemsize)
    rows: list[dict[str, Any]] = []
    order: dict[str, list[Callable[[], Any]]] = {"plain": [], "float8": [], "float8-after": []}
    for (tokens_in, outputs, inputs), count in of.linears:
        calls = products(tokens_in, outputs, inputs, dtype)
        times = {f"ms_{name}": ms(call) for name, call in calls.items()}
        rows.append(
            {"what": "product", "rows": tokens_in, "outputs": outputs, "inputs": inputs, "count": count} | times
        )
        for name, sequence in order.items():
            sequence += [calls.get(name, calls["plain"])] * count
    b, heads, length, size = of.attention_shape
    shape = (b, length, heads, size)
    names = ("native", "cudnn", "flash", "efficient", "fa3", "fa4", "sage")
    times, errors = attention.measure(shape, device(), dtype, names)
    rows.append({"what": "attention", "shape": shape, "count": of.attentions, "ms": times, "rel_error": errors})
    qkv, best = attention._random(shape, device(), dtype), min(times, key=times.__getitem__)
    with attention._implementation(best):
        attend = [lambda: attention._attend(best, qkv)] * of.attentions
        for name, sequence in order.items():
            rows.append({"what": f"sustained {name} + attention {best}", "ms": sustained(sequence + attend, seconds)})
    return rows


def kind_of(name: str) -> str:
    """Of a kernel by its name."""
    found = (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))
    return next(found, "other")


def profiled(
    workload: Workload, batch: int, dtype: torch.dtype, variant: str, steps: int, depth: Any
) -> dict[str, Any]:
    """One row: milliseconds a step by kind of kernel, and the kernels that take longest."""
    torch._dynamo.reset()
    pipe = workloads.build(workload, device(), dtype, depth=depth)
    VARIANTS[variant].apply(pipe, steps)
    job = Picture(workload, pipe, None, batch, rounded=dtype)
    job.denoise(2, job.random_reference())
    gpu = device().type == "cuda"
    base, wall = timing.seconds(device(), lambda: job.denoise(1, job.random_reference()))[0], 0.0
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        wall = timing.seconds(device(), lambda: job.denoise(1 + steps, job.random_reference()))[0]
    by_kind: Counter[str] = Counter()
    top: dict[str, dict[str, Any]] = {}
    for event in found.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        if not spent:
            continue
        each = spent / 1e3 / (1 + steps)
        by_kind[kind_of(event.key)] += each
        top[event.key[:120]] = {"ms": round(each, 4), "calls": round(event.count / (1 + steps), 1)}
    longest = sorted(top.items(), key=lambda item: -item[1]["ms"])[:25]
    row: dict[str, Any] = {"what": "profile", "variant": variant, "ms_step": round((wall - base) / steps * 1e3, 3)}
    row["ms_by_kind"] = {kind: round(value, 3) for kind, value in by_kind.most_common()}
    row["ms_idle"] = round(row["ms_step"] - sum(by_kind.values()), 3)
    return row | {"kernels": dict(longest)}


def main() -> None:
    """Runs one command and writes one results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["kernels", "profile"])
    parser.add_argument("--workload", default="t2i-1024", choices=list(WORKLOADS))
    parser.add_argument("--variants", default="fluxfire,float8,float8-all,float8-after-all,lossless-all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shallow", action="store_true", help=f"{DEPTH} blocks in the place of all")
    parser.add_argument("--seconds", type=float, default=SUSTAINED_S)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    workload, dtype = WORKLOADS[args.workload], getattr(torch, args.dtype)
    rows: list[dict[str, Any]] = []
    if args.command == "kernels":
        rows = kernels(workload, args.batch, dtype, args.seconds)
    for variant in args.variants.split(",") if args.command == "profile" else ():
        try:
            rows.append(profiled(workload, args.batch, dtype, variant, args.steps, DEPTH if args.shallow else None))
        except Exception as error:  # one variant's failure is its row
            rows.append({"what": "profile", "variant": variant, "error": f"{type(error).__name__}: {error}"[:300]})
        print({key: value for key, value in rows[-1].items() if key != "kernels"}, flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"gpu": gpu, "torch": torch.__version__, "diffusers": diffusers.__version__}
    date = datetime.date.today().isoformat()
    command = f"python benchmarks/step.py {args.command} --workload {args.workload} --batch {args.batch}"
    result = {"run": versions | {"command": command, "date": date}, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"step-{args.command}_{args.workload}_{gpu.replace(' ', '-')}_{date}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows if args.command == "kernels" else [], indent=None), f"\nwritten: {path}")


if __name__ == "__main__":
    main()
