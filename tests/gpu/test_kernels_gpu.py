"""The fused kernels on a GPU: their numbers at full width against torch's operations, and the step in a pipeline.

Asserted are exactness and counts; times are `benchmarks/kernels.py`'s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_full_size import full_size, run

import fluxfire
from fluxfire import kernels
from fluxfire.fused_kernels import FusedKernelsStats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),
]
HEADS, SIZE = 24, 128
DIM = HEADS * SIZE


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def floats(value: Any) -> torch.Tensor:
    """Rows of float8 with their scales, or a tensor as it is."""
    return value if isinstance(value, torch.Tensor) else value[0].float().flatten(0, 1) * value[1]


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    import fluxfire.triton_kernels  # noqa: F401


def modes(function: Any) -> list[Any]:
    """As it is, and compiled."""
    torch._dynamo.reset()
    return [function, torch.compile(function, fullgraph=True, dynamic=True)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("float8", [False, True])
@torch.no_grad()
def test_norm(batch: int, float8: bool) -> None:
    x, text, out = random(batch, 1001, DIM), random(batch, 77, DIM, seed=1), random(batch, 1001, DIM, seed=2)
    shift, scale, gate = (random(batch, 6 * DIM)[:, i * DIM : (i + 1) * DIM] for i in range(3))
    for more in ({}, {"text": text}, {"out": out, "gate": gate}):
        wanted_new, wanted = kernels.plain_norm(x, scale, shift, 1e-6, float8=float8, **more)
        for call in modes(kernels.norm):
            new, y = call(x, scale, shift, 1e-6, float8=float8, **more)
            assert torch.equal(new, wanted_new) or relative(new, wanted_new) < 1e-3
            assert relative(floats(y), floats(wanted)) < (5e-3 if float8 else 1e-3)


@torch.no_grad()
def test_views_are_read_as_what_they_are() -> None:
    """As diffusers' single blocks give them: text and image tokens of one tensor."""
    whole, mod = random(2, 1078, DIM), random(2, 3 * DIM)
    shift, scale = mod[:, :DIM], mod[:, DIM : 2 * DIM]
    x, text = whole[:, 77:], whole[:, :77]
    wanted = kernels.plain_norm(x, scale, shift, 1e-6, text=text)[1]
    for call in modes(kernels.norm):
        assert relative(call(x, scale, shift, 1e-6, text=text)[1], wanted) < 1e-3
    assert relative(floats(kernels.quantize(x)), floats(kernels.plain_quantize(x))) < 5e-3


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_norm_rope(batch: int) -> None:
    def three(tokens: int) -> Any:
        return tuple(x.unflatten(-1, (HEADS, SIZE)) for x in random(batch, tokens, 3 * DIM).chunk(3, dim=-1))

    weights, text_weights = (random(SIZE), random(SIZE, seed=1)), (random(SIZE, seed=2), random(SIZE, seed=3))
    for text in (0, 77):
        rotary = tuple(random(text + 1001, SIZE, seed=seed).float() for seed in (4, 5))
        more = (three(text), text_weights) if text else (None, None)
        wanted = kernels.plain_norm_rope(three(1001), weights, rotary, 1e-6, *more)
        for call in modes(kernels.norm_rope):
            got = call(three(1001), weights, rotary, 1e-6, *more)
            assert [x.shape for x in got] == [x.shape for x in wanted]
            assert max(map(relative, got, wanted)) < 1e-3


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_quantize(batch: int) -> None:
    x, mlp = random(batch, 1078, DIM), 3 * random(batch, 1001, 4 * DIM)
    whole = 3 * random(batch, 1078, 4 * DIM)
    for arguments in ((x, None, 77, 1001), (None, mlp, 0, 1001), (x, whole, 0, 1078)):
        wanted = kernels.plain_quantize(*arguments[:2], start=arguments[2], length=arguments[3])
        for call in modes(lambda x, mlp, start, n: kernels.quantize(x, mlp, start=start, length=n)):
            numbers, scales = call(*arguments)
            assert relative(scales, wanted[1]) < 1e-4
            assert relative(floats((numbers, scales)), floats(wanted)) < 5e-3


@torch.no_grad()
def test_gelu_in_the_product() -> None:
    layer = torch.nn.Linear(DIM, 4 * DIM, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = random(2, 1001, DIM)
    exact = torch.nn.functional.gelu(x.float() @ layer.weight.t().float() + layer.bias.float(), approximate="tanh")
    for call in modes(kernels.linear_gelu):
        assert relative(call(x, layer), exact) < 1.1 * relative(kernels.plain_linear_gelu(x, layer), exact)


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / SIZE**0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


@hopper
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 200), (2, 1001), (1, 1536), (2, 1536), (1, 4608)])
@pytest.mark.parametrize("offset", [0, 4])
@torch.no_grad()
def test_attention_in_8_bits(batch: int, length: int, offset: int) -> None:
    """Also of views, as a fused projection gives them, and of keys that have much in common."""
    q, k = random(batch, length, HEADS, SIZE), random(batch, length, HEADS, SIZE, seed=1)
    k = k + offset * random(HEADS, SIZE)
    v = random(batch, length, 3 * DIM)[..., 2 * DIM :].unflatten(-1, (HEADS, SIZE))
    some = tuple(x[:, :, ::8].float() for x in (q, k, v))  # scores of all heads in float32 would take gigabytes
    exact = exact_attention(*some)
    for call in modes(lambda q, k, v: kernels.attention(q, k, v)):
        out = call(q, k, v)
        print(batch, length, offset, relative(out[:, :, ::8], exact))
        error = relative(out[:, :, ::8], exact)
        assert out.is_contiguous() and error < 0.06 and (error > 0 or length == 1)  # of one token the mean is the value
        assert relative(out[:, :, ::8], kernels.plain_attention(*some)) < 0.01
        assert torch.equal(out, kernels.attention(q, k, v))


def exact_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The last sample's last 256 rows of every eighth head, in float32."""
    q, k, v = (x[-1:, :, ::8].float() for x in (q, k, v))
    return exact_attention(q[:, -256:], k, v)


@hopper
@torch.no_grad()
def test_attention_in_8_bits_over_many_keys_is_no_smaller() -> None:
    """Of values with a mean. In float32, since bfloat16 around 2 is coarser than what is measured."""
    q, k, v = (random(1, 16896, HEADS, SIZE, seed=seed).float() for seed in range(3))
    v += 2
    out, exact = kernels.attention(q, k, v)[:, -256:, ::8], exact_last(q, k, v)
    print(relative(out, exact), relative(out - 2, exact - 2), (out.mean() / exact.mean()).item())
    assert relative(out - 2, exact - 2) < 0.06 and abs(out.mean() / exact.mean() - 1) < 1e-3


@hopper
@torch.no_grad()
def test_attention_in_8_bits_of_the_last_of_many_samples() -> None:
    given = [random(8, 4608, HEADS, SIZE, seed=seed) for seed in range(3)]
    error = relative(kernels.attention(*given)[-1:, -256:, ::8], exact_last(*given))
    print(error)
    assert 0 < error < 0.06


@hopper
@torch.no_grad()
def test_attention_in_8_bits_replays_as_a_cuda_graph() -> None:
    given = [random(1, 700, HEADS, SIZE, seed=seed) for seed in range(3)]
    first = kernels.attention(*given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.attention(*given)
    graph.replay()
    assert torch.equal(out, first)
    for seed, x in enumerate(given):
        x.copy_(random(1, 700, HEADS, SIZE, seed=seed + 3))
    graph.replay()
    assert torch.equal(out, kernels.attention(*given)) and not torch.equal(out, first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_kernels_run_where_their_rows_are() -> None:
    """Also if another GPU is the current one."""
    x, mod, weight = random(1, 1001, DIM), random(1, 2 * DIM), random(SIZE)
    rotary = (random(1001, SIZE).float(), random(1001, SIZE, seed=1).float())
    heads = x.unflatten(-1, (HEADS, SIZE))

    def all_kernels(x: Any, mod: Any, heads: Any, weight: Any, rotary: Any) -> list[torch.Tensor]:
        y = kernels.norm(x, mod[:, :DIM], mod[:, DIM:], 1e-6)[1]
        q, k, _ = kernels.norm_rope((heads,) * 3, (weight,) * 2, rotary, 1e-6)
        return [y, q, k, *kernels.quantize(x)]

    here = (x, mod, heads, weight, rotary)
    there = (*(part.to("cuda:1") for part in here[:-1]), tuple(table.to("cuda:1") for table in rotary))
    assert torch.cuda.current_device() == 0
    for call in modes(all_kernels):
        for got, wanted in zip(call(*there), call(*here), strict=True):
            assert got.device == torch.device("cuda:1") and torch.equal(got.to("cuda:0").float(), wanted.float())


@pytest.fixture(scope="module")
def pipe() -> Any:
    return full_size()


@pytest.fixture(scope="module")
def baseline(pipe: Any) -> torch.Tensor:
    return run(pipe)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_step_at_full_size(pipe: Any, baseline: torch.Tensor, quantized: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    if quantized:
        fluxfire.apply_quantization(pipe)
    fluxfire.apply_fused_qkv(pipe)
    before = run(pipe)
    fluxfire.apply_fused_kernels(pipe)
    if compiled:
        fluxfire.apply_compile(pipe, megacache=None)
    out = run(pipe)
    print(quantized, compiled, relative(out, before), relative(before, baseline), relative(out, baseline))
    assert relative(out, before) < (0.015 if quantized else 0.01)
    assert dict(fluxfire.report(pipe).other)["fused_kernels"] == FusedKernelsStats(fused=57, plain=0, reason="")
    graphs = fluxfire.report(pipe).compile
    assert graphs is None or (graphs.graphs, graphs.graph_breaks) == (2, 0)
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


@hopper
@pytest.mark.parametrize("quantized", [False, True])
def test_the_step_with_attention_in_8_bits(quantized: bool) -> None:
    pipe = shallow()
    baseline = run(pipe)

    def apply() -> None:
        if quantized:
            fluxfire.apply_quantization(pipe)
        fluxfire.apply_fused_qkv(pipe)
        fluxfire.apply_fused_kernels(pipe, parts=(*kernels.PARTS, "attention"))

    apply()
    out = run(pipe)
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)
    torch._dynamo.reset()
    apply()
    fluxfire.apply_compile(pipe, megacache=None)
    fluxfire.apply_modulation_table(pipe)
    compiled = run(pipe)
    run(pipe, (512, 768), steps=1)  # 1536 image tokens and 512 of text
    print(quantized, relative(out, baseline), relative(compiled, baseline), relative(compiled, out))
    assert 0 < relative(out, baseline) < 0.05 and 0 < relative(compiled, baseline) < 0.05
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)
    assert [step.kind for step in fluxfire.report(pipe).steps if step.name == "fused_kernels"] == ["approximate"]
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


SECOND = """
import json, sys
sys.path.insert(0, {tests!r})
import torch, fluxfire
from test_full_size import run
from test_kernels_gpu import shallow
if {prefetch}:
    fluxfire.prefetch({store!r}).join()
pipe = shallow()
fluxfire.apply_quantization(pipe)
fluxfire.apply_fused_qkv(pipe)
fluxfire.apply_fused_kernels(pipe)
fluxfire.apply_compile(pipe, megacache={store!r})
fluxfire.apply_modulation_table(pipe)
out = run(pipe, (512, 512), steps=2)
told = fluxfire.report(pipe).other
told = dict(told)["megacache"]
print(json.dumps({{"sum": out.float().norm().item(), "hits": told.hits, "kept": told.kept, "why": str(told.reasons)}}))
"""


def shallow() -> Any:
    """The full width with one block of each kind."""
    pipe = full_size()
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    pipe.transformer.single_transformer_blocks = pipe.transformer.single_transformer_blocks[:1]
    torch.cuda.empty_cache()
    return pipe


def test_a_second_process_finds_the_graphs(pipe: Any, tmp_path: Path) -> None:
    lines = []
    for prefetch in (False, False, True):
        code = SECOND.format(tests=str(Path(__file__).parent), store=str(tmp_path), prefetch=prefetch)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == 0, done.stderr[-3000:]
        lines.append(json.loads(done.stdout.splitlines()[-1]))
    print(lines)
    assert [(line["kept"], line["hits"]) for line in lines] == [(2, 0), (0, 2), (0, 2)], lines
    assert all(abs(line["sum"] - lines[0]["sum"]) < 1e-3 * lines[0]["sum"] for line in lines)
