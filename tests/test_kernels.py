"""The fused kernels: diffusers' pictures, its own forward where something is not written out, nothing left behind.

On a CPU the step runs in those operations of torch that the kernels are held against (`tests/gpu/test_kernels_gpu.py`).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classes
import pytest
import torch
from conftest import attributes, make_pipe, run
from diffusers import FluxPipeline
from diffusers.models.transformers import transformer_flux
from torch.overrides import TorchFunctionMode

import fluxfire
from fluxfire import fused_blocks, fused_kernels, kernels
from fluxfire.attention import BACKENDS
from fluxfire.fused_kernels import FusedKernelsStats, apply_fused_kernels, check_fused_kernels
from fluxfire.plan import CONFLICTS

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")
BLOCKS = 4
ALL = FusedKernelsStats(fused=BLOCKS, plain=0, reason="")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def told(pipe: Any) -> FusedKernelsStats:
    stats = dict(fluxfire.report(pipe).other)["fused_kernels"]
    assert isinstance(stats, FusedKernelsStats)
    return stats


def blocks(pipe: Any) -> list[Any]:
    return [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]


@pytest.mark.parametrize("fused", [False, True])
def test_pictures_are_the_same_within_rounding_and_restored_to_the_bit(pipe: Any, fused: bool) -> None:
    baseline, before, kinds = run(pipe, batch=2), attributes(pipe), [type(block) for block in blocks(pipe)]
    if fused:
        fluxfire.apply_fused_qkv(pipe)
    assert apply_fused_kernels(pipe) is pipe
    assert 0 < relative(run(pipe, batch=2), baseline) <= 1e-5 and told(pipe) == ALL
    assert {type(block) for block in blocks(pipe)} == {fused_blocks.FusedBlock, fused_blocks.FusedSingleBlock}
    fluxfire.restore_pipeline(pipe)
    after = attributes(pipe)
    assert [type(block) for block in blocks(pipe)] == kinds
    assert {k: v for k, v in after.items() if k[0][:4] in ("tran", "vae.")} == {
        k: v for k, v in before.items() if k[0][:4] in ("tran", "vae.")
    }
    assert torch.equal(run(pipe, batch=2), baseline)


@pytest.mark.parametrize("kind", ["float8", "float8-after", "int8"])
@pytest.mark.parametrize("fused", [False, True])
def test_beside_quantization_it_is_quantization(kind: str, fused: bool) -> None:
    pipe = make_pipe(FluxPipeline)
    fluxfire.apply_quantization(pipe, kind)
    quantized = run(pipe)
    if fused:
        fluxfire.apply_fused_qkv(pipe)
    apply_fused_kernels(pipe)
    # A rounding error beside it may tip a number into the next 8-bit one.
    assert relative(run(pipe), quantized) <= 1e-2 and told(pipe) == ALL
    assert blocks(pipe)[0].float8 is (kind != "int8")


@pytest.mark.parametrize("part", kernels.PARTS)
def test_each_part_alone_is_exact(part: str) -> None:
    pipe = make_pipe(FluxPipeline)
    baseline = run(pipe)
    apply_fused_kernels(pipe, parts=(part,))
    assert relative(run(pipe), baseline) <= 1e-5


class Made(TorchFunctionMode):
    """Counts joined tensors and products of linear layers."""

    joined = products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.joined += func is torch.cat
        self.products += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_single_block_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But inside of what a kernel does: text and image tokens, attention and MLP are read where they are."""
    pipe = make_pipe(FluxPipeline)
    apply_fused_kernels(pipe)

    def apart(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)

        return call

    for name in ("norm", "norm_rope", "quantize", "linear_gelu"):
        monkeypatch.setattr(kernels, name, apart(getattr(kernels, name)))
    block = pipe.transformer.single_transformer_blocks[0]
    tokens = (torch.randn(1, 5, 32), torch.randn(1, 3, 32), torch.randn(1, 32))
    with Made() as made:
        block(*tokens, (torch.randn(8, 16), torch.randn(8, 16)))
    assert (made.joined, made.products) == (0, 1 + 3 + 2)  # modulation; q, k, v; the output's in two halves


@torch.no_grad()
def test_what_is_not_written_out_goes_to_diffusers_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipe(FluxPipeline)
    apply_fused_kernels(pipe)
    counted = {"_double": 0, "_single": 0}
    for name in counted:

        def count(*args: Any, name: str, forward: Any) -> Any:
            counted[name] += 1
            return forward(*args)

        whole = functools.partial(count, name=name, forward=getattr(fused_blocks, name))
        monkeypatch.setattr(fused_blocks, name, whole)
    rotary = (torch.randn(8, 16), torch.randn(8, 16))
    for name, block in (("_double", blocks(pipe)[0]), ("_single", blocks(pipe)[-1])):
        tokens = (torch.randn(1, 5, 32), torch.randn(1, 3, 32), torch.randn(1, 32))
        block(*tokens, rotary, {})
        assert counted[name] == 0
        block(*tokens, None)
        block(*tokens, rotary, {"attention_mask": None})
        block.to(torch.float64)(*(x.double() for x in tokens), rotary)
        block.to(torch.float32)
        with torch.enable_grad():
            assert block(*tokens, rotary)[1].requires_grad
        assert counted[name] == 4


def _lora(pipe: Any) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(3)
    key = "transformer.single_transformer_blocks.1.proj_mlp"
    a, b = torch.randn(2, 32, generator=generator), torch.randn(128, 2, generator=generator)
    pipe.load_lora_weights({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b})
    return pipe.unload_lora_weights  # type: ignore[no-any-return]


def _hook(pipe: Any) -> Callable[[], Any]:
    module = pipe.transformer.single_transformer_blocks[1].norm
    return module.register_forward_hook(lambda _, args, out: (out[0] * 2, out[1])).remove


def _processor(pipe: Any) -> Callable[[], Any]:
    class Own(transformer_flux.FluxAttnProcessor):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().__call__(*args, **kwargs)

    attention = pipe.transformer.single_transformer_blocks[1].attn
    before = attention.processor
    attention.set_processor(Own())
    return lambda: attention.set_processor(before)


@pytest.mark.parametrize("change", [_lora, _hook, _processor])
def test_a_block_that_is_changed_runs_as_it_is_and_is_fused_again(change: Callable[[Any], Any]) -> None:
    pipe = make_pipe(FluxPipeline)
    baseline, back = run(pipe), change(pipe)
    changed = run(pipe)
    back()
    apply_fused_kernels(pipe)
    fluxfire.apply_compile(pipe, backend="eager", megacache=None)
    fused = run(pipe)
    back = change(pipe)
    assert relative(run(pipe), changed) <= 1e-5 < relative(changed, baseline)
    assert (told(pipe).fused, told(pipe).plain) == (BLOCKS - 1, 1) and "needed" in told(pipe).reason
    back()
    assert torch.equal(run(pipe), fused) and told(pipe) == ALL


@pytest.mark.parametrize("name", ["FluxFillPipeline", "FluxControlNetPipeline", "FluxKontextInpaintPipeline"])
def test_beside_everything_compiled_and_cached(name: str) -> None:
    pipe = classes.make(name)
    baseline = classes.run(pipe)
    fluxfire.optimize_pipeline(
        pipe, cache_threshold=0, compile=False, fuse_qkv=True, fused_kernels=True, modulation=True, attention="math"
    )
    assert relative(classes.run(pipe), baseline) <= 1e-5 and told(pipe).plain == 0


def test_a_kernel_is_launched_on_its_tensors_gpu_and_a_graph_does_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device(contextlib.nullcontext[None]):
        def __init__(self, device: torch.device) -> None:
            super().__init__()
            current.append(device)

    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", Device)
    x = torch.ones(3)

    def double(x: torch.Tensor) -> Any:
        return kernels._launched(torch.ops.aten.add, x.device, x, x)

    assert torch.equal(double(x), 2 * x) and current == [x.device]
    assert torch.equal(torch.compile(double, backend="eager", fullgraph=True)(x), 2 * x) and len(current) == 1


def test_ahead_of_time_a_second_pipeline_finds_the_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxfire import megacache

    pipe = make_pipe(FluxPipeline)
    baseline = run(pipe)
    for misses in (2, 0):
        monkeypatch.setattr(megacache, "_OPEN", {})  # as a new process
        apply_fused_kernels(pipe)
        fluxfire.apply_compile(pipe, megacache=tmp_path)
        fluxfire.apply_modulation_table(pipe)
        assert relative(run(pipe), baseline) <= 1e-5
        found = dict(fluxfire.report(pipe).other)["megacache"]
        assert (found.misses, found.hits, found.traced) == (misses, 2 - misses, 0), found.reasons
        fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)
    store = megacache.megacache_at(tmp_path).store
    assert store
    sources = [manifest.facts["sources"] for manifest in store.manifests()]
    assert len(sources) == 2 and all("fluxfire.fused_blocks" in names for names in sources)  # imported at a load


def test_what_was_traced_brings_the_operators_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of `prefetch` loads artifacts before the step is applied."""
    monkeypatch.setitem(sys.modules, "fluxfire.triton_kernels", None)  # an import of it fails
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(fused_blocks.__file__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ImportError, match=r"import of fluxfire\.triton_kernels halted"):
        runpy.run_path(fused_blocks.__file__)


WITH_ATTENTION = (*kernels.PARTS, *kernels.OPTIONAL)


def normals(*shape: int, offset: float = 0.0) -> list[torch.Tensor]:
    """q, k, v; `offset`: what all keys have in common, as FLUX's have."""
    generator = torch.Generator().manual_seed(sum(shape))
    q, k, v = (torch.randn(*shape, generator=generator) for _ in range(3))
    return [q, k + offset * torch.randn(shape[2:], generator=generator), v]


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def attention_in_8_bits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One head, (L, D) each, in float64: all scores at once, where `plain_attention` goes block by block."""
    blocks = [slice(start, start + 128) for start in range(0, len(k), 128)]
    q, k, v = q.double(), k.double() - k[torch.arange(64) * len(k) // 64].double().mean(0), v.double()
    v = v - (common := v[::4].mean(0))

    def rounded(x: torch.Tensor, largest: torch.Tensor, limit: float) -> torch.Tensor:
        numbers = x / largest * limit
        return ((numbers + 0.5).floor() if limit == 127 else numbers.to(torch.float8_e4m3fn).double()) * largest / limit

    q = rounded(q, q.abs().amax(1, keepdim=True), 127)
    k = torch.cat([rounded(k[part], k[part].abs().max(), 127) for part in blocks])
    v = torch.cat([rounded(v[part], v[part].abs().max(), 448) for part in blocks])
    s = q @ k.T / q.shape[1] ** 0.5
    out, total = torch.zeros_like(q), torch.zeros(len(q), 1, dtype=torch.float64)
    for part in blocks:
        seen = s[:, : part.stop].amax(1, keepdim=True)  # what P was rounded for
        p, now = (s[:, part] - seen).exp() * 2**8.8, (seen - s.amax(1, keepdim=True)).exp()
        total += now * p.sum(1, keepdim=True)
        out += now * (p.to(torch.float8_e4m3fn).double() @ v[part])
    return out / total + common


@pytest.mark.parametrize("shape", [(2, 300, 2, 128), (1, 256, 1, 16), (1, 129, 1, 64)])
@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_attention_in_8_bits_is_as_exact_as_its_numbers(shape: tuple[int, ...], offset: float) -> None:
    q, k, v = normals(*shape, offset=offset)
    for dtype, rounding in ((torch.float32, 4e-3), (torch.bfloat16, 8e-3)):  # some numbers tip into the next one
        given = [x.to(dtype) for x in (q, k, v)]
        given[2] = torch.cat([given[2]] * 3, dim=-1)[..., shape[-1] : 2 * shape[-1]]  # a view, as of a fused projection
        out = kernels.attention(*given)
        assert out.dtype == dtype and out.is_contiguous()
        wanted = torch.empty(shape, dtype=torch.float64)
        for b, h in itertools.product(range(shape[0]), range(shape[2])):
            wanted[b, :, h] = attention_in_8_bits(*(x[b, :, h] for x in given))
        assert relative(out.double(), wanted) < rounding
        assert 0.01 < relative(out.double(), exact_attention(*given)) < 0.045


def test_attention_in_8_bits_keeps_what_values_have_in_common_and_shows_nan() -> None:
    q, k, v = normals(1, 300, 2, 64)
    exact = exact_attention(q, k, v)
    out = kernels.attention(q, k, v + 20).double() - 20
    assert relative(out, exact) < 0.045
    assert torch.equal(kernels.attention(q, k, v[:, :1].expand_as(v)), v[:, :1].expand_as(v))
    q[0, 7, 1, 3] = torch.nan
    lost = kernels.attention(q, k, v).isnan()
    assert lost[0, 7, 1].all() and lost.sum() == 64


def test_attention_in_8_bits_is_an_operator_that_graphs_take() -> None:
    q, k, v = normals(1, 130, 2, 16)
    torch.library.opcheck(kernels.attention, (q, k, v), test_utils=("test_schema", "test_faketensor"))


def test_attention_in_8_bits_is_approximate_asked_for_and_taken_back(pipe: Any) -> None:
    baseline = run(pipe, batch=2)
    apply_fused_kernels(pipe, parts=("attention",))
    alone = run(pipe, batch=2)
    assert 1e-5 < relative(alone, baseline) < 1e-3 and told(pipe) == ALL
    assert "approximate, because of fused_kernels" in str(fluxfire.report(pipe)).splitlines()[0]
    assert [step.kind for step in fluxfire.report(pipe).steps] == ["approximate"]
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe, batch=2), baseline)
    fluxfire.optimize_pipeline(
        pipe, cache_threshold=None, compile=False, fuse_qkv=True, fused_kernels="attention", modulation=True
    )
    fluxfire.restore_pipeline(pipe)
    apply_fused_kernels(pipe, parts=WITH_ATTENTION)
    fluxfire.apply_compile(pipe, backend="eager", megacache=None)
    assert relative(run(pipe, batch=2), alone) < 1e-4
    graphs = fluxfire.report(pipe).compile
    assert graphs and graphs.graph_breaks == 0


def test_attention_in_8_bits_beside_another_backend_is_two_answers_to_one_question(pipe: Any) -> None:
    plan = functools.partial(fluxfire.plan_pipeline, pipe, cache_threshold=None, compile=False)
    for backend in (None, "auto", "native"):
        last = plan(attention=backend, fused_kernels="attention", quantize="float8").steps[-1]
        assert (last.name, last.kind) == ("fused_kernels", "approximate")
    assert [step.kind for step in plan(attention="math", fused_kernels=True).steps] == ["lossless"] * 2
    named = {dict(one.first_settings)["backend"] for one in CONFLICTS if dict(one.second_settings).get("parts")}
    assert named == set(BACKENDS) - {"native"}
    (skip,) = plan(attention="math", fused_kernels="attention").skips
    assert skip.name == "fused_kernels" and "needed" not in skip.reason and "leave the backend out" in skip.reason
    for other in ("tea", "norm", ("attention",), 1.5):
        with pytest.raises(fluxfire.ArgumentError, match=r"fused_kernels: found .*, needed None, True, .* 'attention'"):
            plan(fused_kernels=other)


def test_attention_in_8_bits_says_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, bfloat16 = torch.device("cpu"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    for capability in ((8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = str(fused_kernels._no_attention(cpu, bfloat16, 128))
        assert reason == "None" if capability == (9, 0) else "found a NVIDIA L40S, needed a Hopper GPU" in reason
    assert "found heads of 64 channels in torch.bfloat16, needed 128" in str(
        fused_kernels._no_attention(cpu, bfloat16, 64)
    )
    assert "in torch.float32, needed" in str(fused_kernels._no_attention(cpu, torch.float32, 128))

    def raises(*qkv: torch.Tensor) -> torch.Tensor:
        raise ImportError("cannot import name 'tma'\nand more")

    for instead, found in (
        (raises, "(ImportError: cannot import name 'tma')"),
        (lambda q, k, v: v, "a relative error"),
    ):
        fused_kernels._tried.cache_clear()
        monkeypatch.setattr(kernels, "attention", instead)
        assert found in str(fused_kernels._no_attention(cpu, bfloat16, 128))
    fused_kernels._tried.cache_clear()

    def full(*qkv: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("found no memory")

    monkeypatch.setattr(kernels, "attention", full)
    with pytest.raises(torch.OutOfMemoryError):  # which another call may find
        fused_kernels._no_attention(cpu, bfloat16, 128)
    monkeypatch.setattr(kernels, "attention", kernels.plain_attention)
    assert fused_kernels._no_attention(cpu, bfloat16, 128) is None


def test_the_attention_kernels_compile_for_a_hopper_gpu() -> None:
    """Without one, by the Triton that is there."""
    triton = pytest.importorskip("triton", reason="no Triton: torch for CPUs does not bring it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    import fluxfire.attention_kernels as ours

    def compiled(source: type, function: Any, warps: int, types: dict[str, str], **constants: object) -> str:
        signature = types | dict.fromkeys(constants, "constexpr")
        made = source(function, {name: signature[name] for name in function.arg_names}, constexprs=constants)
        options = {"num_warps": warps}
        return str(triton.compile(made, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])

    scales = {
        "q_scales": "*fp32",
        "k_scales": "*fp32",
        "v_scales": "*fp32",
        "v_means": "*fp32",
        "L": "i32",
        "LP": "i32",
    }
    strides = {f"{x}_stride_{of}": "i32" for x in "qkv" for of in "bl"}
    pointers = dict.fromkeys("qkv", "*bf16") | {"q8": "*i8", "k8": "*i8", "v8": "*fp8e4nv", "factor": "fp32"}
    assert "cvt.rn.satfinite.e4m3x2" in compiled(ASTSource, ours._prepare, 8, {**pointers, **scales, **strides}, H=24)
    tiles = {
        name: f"tensordesc<{kind}[{rows}, 128],{ours._layout()!r}>"
        for name, kind, rows in (("q8", "i8", 64), ("k8", "i8", 128), ("v8", "fp8e4nv", 128))
    }
    ptx = compiled(GluonASTSource, ours._attend, 4, {**tiles, **scales, "out": "*bf16"}, H=24, RAGGED=True)
    for product in ("m64n128k32.s32.s8.s8", "m64n128k32.f32.e4m3.e4m3"):
        assert f"wgmma.mma_async.sync.aligned.{product}" in ptx


def test_where_it_cannot_be_applied_it_says_why(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needed FLUX.1" in str(check_fused_kernels(classes.make("Flux2KleinPipeline")))
    with pytest.raises(fluxfire.ArgumentError, match="needed a tuple with some of 'norm'"):
        check_fused_kernels(pipe, parts=("gelu", "tea"))
    for parts in (["norm"], "norm", (), (["norm"],)):
        with pytest.raises(fluxfire.ArgumentError, match=r"parts: found .*, needed a tuple with some of 'norm'"):
            check_fused_kernels(pipe, parts=parts)
    linear = torch.nn.Linear(32, 128)
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    first = pipe.transformer.single_transformer_blocks[0]
    first.proj_mlp, kept = linear, first.proj_mlp
    with pytest.raises(fluxfire.StepError, match="found proj_mlp of a block as Linear"):
        apply_fused_kernels(pipe)
    first.proj_mlp = kept
    pipe.transformer.to(torch.float16)
    assert "needed torch.bfloat16" in str(check_fused_kernels(pipe))
    pipe.transformer.to(torch.float32)
    monkeypatch.setattr(fused_kernels, "ON_CPU", False)
    assert "found the denoiser on a cpu, needed a CUDA GPU" in str(check_fused_kernels(pipe))
    plan = fluxfire.plan_pipeline(pipe, compile=False, cache_threshold=None, fused_kernels=True)
    assert [skip.name for skip in plan.skips] == ["fused_kernels"] and not plan.steps


CPP = """
    alignas alignof and asm auto bitand bitor bool break case catch char class compl concept const constexpr continue
    decltype default delete do double else enum explicit export extern false float for friend goto if inline int long
    mutable namespace new noexcept not nullptr operator or private protected public register requires return short
    signed sizeof static struct switch template this throw true try typedef typeid typename union unsigned using
    virtual void volatile while xor
"""


def test_no_parameter_of_a_kernel_is_a_word_of_cpp() -> None:
    """inductor's cpp_wrapper makes a C++ function of each kernel in a graph, with its parameters' names."""
    source = Path(fluxfire.__file__).with_name("triton_kernels.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = {node.name: {arg.arg for arg in node.args.args} for node in nodes if node.name.endswith("_kernel")}
    assert "_norm_kernel" in found
    assert not set(CPP.split()) & set().union(*found.values())
