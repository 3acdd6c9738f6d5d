"""Each of fluxfire's kernels alone, at FLUX.1's sizes: against inductor's of the same mathematics, and against bytes.

    python benchmarks/kernels.py --out benchmarks/results

A row is one kernel: milliseconds, its inputs not in the cache; those of what inductor makes of the `plain_*` function
with dynamic sizes; those that its bytes take at 3 TB/s; how often a step has it, and what that is in a step; the
relative difference of the two results, without compilation and with it. `gelu` and `out` are products: fused, against
the product with a kernel of its own beside it. `attention` is against torch's own choice in bfloat16. A CPU has no
kernels to measure: `--tokens 3,5 --heads 1` tries it out.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxfire import kernels
from fluxfire.bench import timing

BANDWIDTH = 3.0e12  # bytes a second, of an H100's HBM3
DOUBLE, SINGLE = 19, 38


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a result."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, tuple | list) else []


def difference(got: Any, wanted: Any) -> float:
    """The largest relative distance of the tensors of two results; rows of float8 with their scales."""

    def floats(value: Any) -> list[torch.Tensor]:
        found = tensors(value)
        eight = [i for i, tensor in enumerate(found) if tensor.dtype == torch.float8_e4m3fn]
        for i in eight:
            found[i] = found[i].float().flatten(0, -2) * found[i + 1]
        return [tensor.float() for tensor in found if tensor.numel()]

    pairs = zip(floats(got), floats(wanted), strict=True)
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def cases(
    text: int, image: int, size: int, heads: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...], int]]:
    """(name, kernel, the same in torch's operations, arguments, how often a step has it)."""
    dim, total = size * heads, text + image

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, before, whole = random(1, image, dim), random(1, text, dim), random(1, total, dim)
    modulation = random(1, 6 * dim)
    shift, scale, gate = (modulation[:, i * dim : (i + 1) * dim] for i in range(3))
    rotary = (torch.randn(total, size, device=device), torch.randn(total, size, device=device))
    weights = (random(size), random(size))

    def three(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (part.unflatten(-1, (heads, size)) for part in random(1, tokens, 3 * dim).chunk(3, dim=-1))
        return q, k, v

    def norm(of: Any, float8: bool, residual: bool, joined: bool) -> Callable[..., Any]:
        def call(x: torch.Tensor, text: torch.Tensor, out: torch.Tensor, *mod: torch.Tensor) -> Any:
            more = {"text": text if joined else None, "out": out if residual else None}
            new, y = of(x, mod[1], mod[0], 1e-6, gate=mod[2] if residual else None, float8=float8, **more)
            return (new, y) if residual else y

        return call

    def both(*settings: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return norm(kernels.norm, *settings), norm(kernels.plain_norm, *settings)

    mods = (shift, scale, gate)
    single, image_qkv, text_qkv = three(total), three(image), three(text)
    mlp, image_mlp = random(1, total, 4 * dim), random(1, image, 4 * dim)
    rope, plain_rope = kernels.norm_rope, kernels.plain_norm_rope
    layer = nn.Linear(dim, 4 * dim, device=device, dtype=dtype).requires_grad_(False)
    last = nn.Linear(5 * dim, dim, device=device, dtype=dtype).requires_grad_(False)

    def split(attended: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        out = nn.functional.linear(attended, last.weight[:, :dim], last.bias).float()
        return (out + nn.functional.linear(activated, last.weight[:, dim:])).to(dtype)

    def joined(attended: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = last(torch.cat([attended, activated], dim=2))
        return out

    def sdpa(*qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)
    eight = [("attention, 8 bits", kernels.attention, sdpa, single, SINGLE + DOUBLE)] if hopper else []
    return [
        *eight,
        ("norm, joined", *both(False, False, True), (x, before, x, *mods), SINGLE),
        ("norm, joined, float8", *both(True, False, True), (x, before, x, *mods), SINGLE),
        ("norm", *both(False, False, False), (x, before, x, *mods), DOUBLE),
        ("norm, float8", *both(True, False, False), (x, before, x, *mods), DOUBLE),
        ("residual norm", *both(False, True, False), (x, before, random(1, image, dim), *mods), DOUBLE),
        ("residual norm, float8", *both(True, True, False), (x, before, random(1, image, dim), *mods), DOUBLE),
        ("rope", rope, plain_rope, (single, weights, rotary, 1e-6), SINGLE),
        ("rope, joined", rope, plain_rope, (image_qkv, weights, rotary, 1e-6, text_qkv, weights), DOUBLE),
        ("quantize", kernels.quantize, kernels.plain_quantize, (whole,), DOUBLE),
        ("quantize, gelu", kernels.quantize, kernels.plain_quantize, (None, image_mlp), DOUBLE),
        ("quantize, attention + gelu", kernels.quantize, kernels.plain_quantize, (whole, mlp), SINGLE),
        ("gelu", kernels.linear_gelu, kernels.plain_linear_gelu, (whole, layer), SINGLE),
        ("out", split, joined, (whole, mlp), SINGLE),
    ]


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Of one call on the GPU alone: repeats in a CUDA graph, each with its inputs out of the cache."""
    if device.type != "cuda":
        return timing.median_seconds(device, call) * 1e3
    other = torch.empty(2**27, dtype=torch.int8, device=device)  # more than the L2 cache
    call()
    torch.cuda.synchronize()
    times = []
    for calls in (0, 1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                other.zero_()
                if calls:
                    call()
        graph.replay()
        rounds = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            rounds.append(start.elapsed_time(end) / repeats)
        times.append(min(rounds))
    return times[1] - times[0]


@torch.no_grad()
def measure(case: tuple[Any, ...], device: torch.device) -> dict[str, Any]:
    """One row."""
    name, kernel, plain, arguments, count = case
    torch._dynamo.reset()
    compiled = torch.compile(plain, dynamic=True, fullgraph=True)
    wanted, got = plain(*arguments), kernel(*arguments)
    ours = torch.compile(kernel, dynamic=True, fullgraph=True)
    ours(*arguments), compiled(*arguments)
    row = {"kernel": name, "ms": milliseconds(lambda: ours(*arguments), device)}
    row["ms_inductor"] = milliseconds(lambda: compiled(*arguments), device)
    used = {id(tensor): tensor for tensor in tensors(arguments)}
    moved = sum(tensor.nbytes for tensor in (*used.values(), *tensors(got)))
    row |= {"ms_bytes": moved / BANDWIDTH * 1e3, "difference": difference(got, wanted)}
    row |= {"compiled_difference": difference(ours(*arguments), wanted), "count": count}
    return row | {"ms_step": row["ms"] * count, "ms_step_inductor": row["ms_inductor"] * count}


def main() -> None:
    """Measures all, prints a table, writes one results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="512,4096", help="text and image tokens")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--only", default="", help="kernels whose names have this in them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if gpu:
        import fluxfire.triton_kernels  # noqa: F401  (registers the operators)
    text, image = map(int, args.tokens.split(","))
    torch.manual_seed(0)
    rows = []
    print(f"{'kernel':28}{'ms':>8}{'inductor':>10}{'bytes':>8}{'a step':>8}{'inductor':>10}  difference", flush=True)
    for case in cases(text, image, 128, args.heads, device, torch.bfloat16):
        if args.only not in case[0]:
            continue
        try:
            row = measure(case, device)
        except Exception as error:  # one kernel's failure is its row
            row = {"kernel": case[0], "error": f"{type(error).__name__}: {error}"[:400]}
            print(f"{case[0]:28}{row['error']}", flush=True)
            rows.append(row)
            continue
        rows.append({name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()})
        times = f"{row['ms']:8.4f}{row['ms_inductor']:10.4f}{row['ms_bytes']:8.4f}"
        steps = f"{row['ms_step']:8.3f}{row['ms_step_inductor']:10.3f}"
        print(f"{case[0]:28}{times}{steps}  {row['difference']:.1e} {row['compiled_difference']:.1e}", flush=True)
    if args.out:
        name = torch.cuda.get_device_name() if gpu else "cpu"
        date = datetime.date.today().isoformat()
        run = {"gpu": name, "torch": torch.__version__, "command": "python benchmarks/kernels.py", "date": date}
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"kernels_{text}x{image}_{name.replace(' ', '-')}_{date}.json"
        path.write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
