"""Attention, 8-bit products and the modulation table on a GPU at FLUX.1's full size, random weights.

Asserted are exactness, bytes and counts; times are `benchmarks/README.md`'s.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_full_size import full_size, run

import fluxfire
from fluxfire.quantize import load_quantized, save_quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),
]
GIB = 2**30


@pytest.fixture(scope="module")
def pipe() -> Any:
    return full_size()


@pytest.fixture(scope="module")
def baseline(pipe: Any) -> torch.Tensor:
    return run(pipe)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


def weights_gib(pipe: Any) -> float:
    return sum(p.nbytes for p in pipe.transformer.parameters() if p.is_cuda) / GIB


def test_the_defaults_where_they_were_measured(pipe: Any, baseline: torch.Tensor) -> None:
    """On a Hopper GPU, without a word; with an offload, none of them."""
    assert torch.cuda.get_device_capability() == (9, 0), "decide by measuring what is on by default here"
    ours = {"fused_qkv", "fused_kernels", "modulation_table"}
    assert ours.isdisjoint(step.name for step in fluxfire.plan_pipeline(pipe, offload="model").steps)
    fluxfire.optimize_pipeline(pipe, cache_threshold=None, megacache=None)
    assert {step.name for step in fluxfire.report(pipe).steps} == ours | {"compile"}
    assert not fluxfire.report(pipe).skips
    out = run(pipe)
    print("defaults", relative(out, baseline))
    assert relative(out, baseline) < 0.05
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash"])
def test_attention_is_as_exact_as_before(pipe: Any, baseline: torch.Tensor, backend: str) -> None:
    fluxfire.apply_attention(pipe, backend)
    assert relative(run(pipe), baseline) < 0.05
    told = dict(fluxfire.report(pipe).other)["attention"]
    print(told)
    assert told.backend in ("native", "cudnn", "flash", "fa3", "fa4")
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


@pytest.mark.parametrize("weights", ["gpu", "cpu"])
def test_the_modulation_table_at_full_size(pipe: Any, baseline: torch.Tensor, weights: str) -> None:
    torch._dynamo.reset()
    before = weights_gib(pipe)
    fluxfire.apply_compile(pipe, megacache=None)
    fluxfire.apply_cache(pipe, 0)
    fluxfire.apply_modulation_table(pipe, weights=weights)
    assert relative(run(pipe), baseline) < 0.05
    told = dict(fluxfire.report(pipe).other)["modulation_table"]
    assert (told.from_table, told.computed, told.tables) == (4, 0, 1)
    assert before - weights_gib(pipe) > (5.9 if weights == "cpu" else -0.01)
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)
    fluxfire.restore_pipeline(pipe)
    assert weights_gib(pipe) == before and torch.equal(run(pipe), baseline)


def test_another_timestep_in_mid_run_raises_in_the_next_call(pipe: Any, baseline: torch.Tensor) -> None:
    fluxfire.apply_modulation_table(pipe)
    forward, calls = pipe.transformer.forward, [0]

    def odd(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            kwargs["timestep"] = kwargs["timestep"] + 0.01
        return forward(*args, **kwargs)

    pipe.transformer.forward = odd
    with pytest.raises(fluxfire.StepError, match="another timestep or guidance"):
        run(pipe)
    assert calls[0] == 3
    pipe.transformer.forward = forward
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


@pytest.mark.parametrize("kind", ["float8", "float8-after", "int8"])
def test_quantized_fused_compiled_and_restored_to_the_bit(pipe: Any, baseline: torch.Tensor, kind: str) -> None:
    torch._dynamo.reset()
    before = weights_gib(pipe)
    fluxfire.apply_quantization(pipe, kind)
    fluxfire.apply_fused_qkv(pipe)
    assert weights_gib(pipe) < 14.5
    fluxfire.apply_compile(pipe, megacache=None)
    error = relative(run(pipe), baseline)
    print(kind, error, fluxfire.report(pipe))
    assert 0 < error < 0.15
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)
    fluxfire.restore_pipeline(pipe)
    assert weights_gib(pipe) == before and torch.equal(run(pipe), baseline)


def test_prepared_weights_are_loaded_without_the_originals(pipe: Any, tmp_path: Any) -> None:
    fluxfire.apply_quantization(pipe)
    out = run(pipe)
    save_quantized(pipe, tmp_path)
    fluxfire.restore_pipeline(pipe)
    original = pipe.transformer
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    pipe.transformer = load_quantized(tmp_path, "cuda")
    assert (torch.cuda.max_memory_allocated() - held) / GIB < 14.5
    assert relative(run(pipe), out) < 1e-3
    pipe.transformer = original
