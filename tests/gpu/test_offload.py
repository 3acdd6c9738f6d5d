"""Offload to host memory on a real GPU, on tiny pipelines: exact, with the cache and compilation, and taken back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import attributes, embeds, make_pipe
from diffusers import FluxPipeline

import fluxfire

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),
]

KINDS: list[dict[str, Any]] = [
    {"kind": "model"},
    {"kind": "sequential"},
    {"kind": "group"},
    {"kind": "group", "offload_type": "leaf_level"},
    {"kind": "group", "use_stream": True},
    {"kind": "group", "offload_type": "leaf_level", "use_stream": True},
]


def run(pipe: Any, steps: int = 4) -> torch.Tensor:
    on_gpu = {name: value.cuda() for name, value in embeds().items()}
    generator = torch.Generator("cuda").manual_seed(1)
    found: torch.Tensor = pipe(
        **on_gpu, height=32, width=32, num_inference_steps=steps, generator=generator, output_type="pt"
    ).images
    return found.cpu()


def modules(pipe: Any) -> dict[tuple[str, str], int]:
    """Every attribute but the scheduler's, whose tables each run makes anew."""
    return {name: value for name, value in attributes(pipe).items() if name[0] != "scheduler"}


@pytest.mark.parametrize("start", ["cpu", "cuda"])
@pytest.mark.parametrize("knobs", KINDS, ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_offload_is_exact_and_leaves_nothing(knobs: dict[str, Any], start: str) -> None:
    pipe = make_pipe(FluxPipeline).to("cuda")
    baseline = run(pipe)
    pipe.to(start)
    before = modules(pipe)
    fluxfire.apply_offload(pipe, **knobs)
    assert torch.equal(run(pipe), baseline)
    fluxfire.restore_pipeline(pipe)
    assert modules(pipe) == before
    fluxfire.apply_cache(pipe, 0)
    fluxfire.apply_offload(pipe, **knobs)
    assert torch.equal(run(pipe), baseline)
    fluxfire.set_cache_threshold(pipe, math.inf)
    run(pipe)
    assert fluxfire.cache_stats(pipe).marks() == "#..."
    fluxfire.restore_pipeline(pipe)
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {start}
    assert modules(pipe) == before
    assert torch.equal(run(pipe.to("cuda")), baseline)


@pytest.mark.parametrize("knobs", KINDS, ids=lambda knobs: "-".join(map(str, knobs.values())))
@pytest.mark.parametrize("first", ["apply_memory_format", "apply_vae_tiling"])
def test_offload_after_a_step_of_the_vae(first: str, knobs: dict[str, Any]) -> None:
    pipe = make_pipe(FluxPipeline).to("cuda")
    getattr(fluxfire, first)(pipe)
    baseline = run(pipe)
    if first == "apply_vae_tiling" and knobs.get("use_stream"):
        with pytest.raises(fluxfire.StepError, match="tiles change it"):
            fluxfire.apply_offload(pipe, **knobs)
        return
    fluxfire.apply_offload(pipe, **knobs)
    assert torch.equal(run(pipe), baseline)


@pytest.mark.parametrize("kind", ["model", "group"])
def test_offload_with_compiled_blocks(kind: str) -> None:
    torch.compiler.reset()
    pipe = make_pipe(FluxPipeline).to("cuda")
    baseline = run(pipe)
    fluxfire.apply_compile(pipe, backend="eager")
    fluxfire.apply_offload(pipe, kind)
    assert torch.allclose(run(pipe), baseline, atol=1e-4)
    run(pipe)
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)
