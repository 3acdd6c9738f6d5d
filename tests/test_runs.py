"""What users do from run to run: interrupt, ask for several pictures, change sizes and steps, move, save."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import crash_between_and_within_steps, embeds, make_pipe, run
from diffusers import FluxKontextPipeline, FluxPipeline

import fluxfire


@pytest.fixture(params=[False, True], ids=["", "compiled"])
def optimized(request: pytest.FixtureRequest) -> Any:
    """A pipeline that hits wherever it may."""
    return optimize(make_pipe(FluxPipeline), request.param)


def optimize(pipe: Any, compiled: bool, threshold: float = math.inf) -> Any:
    if compiled:
        torch._dynamo.reset()
        fluxfire.apply_fused_qkv(pipe)
        fluxfire.apply_compile(pipe, backend="eager")
    return fluxfire.apply_cache(pipe, threshold)


def marks(pipe: Any) -> str:
    return fluxfire.cache_stats(pipe).marks()


def graphs(pipe: Any) -> int:
    counts = fluxfire.report(pipe).compile
    return counts.graphs if counts else 0


def near(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((out - expected).norm() <= 1e-5 * expected.norm())


def test_an_interrupted_run_makes_no_more_calls_and_leaves_nothing(optimized: Any) -> None:
    fresh = run(optimized)

    def stop(pipe: Any, step: int, _timestep: Any, _kwargs: Any) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return {}

    interrupted = run(optimized, callback_on_step_end=stop)
    assert marks(optimized) == "#.."
    assert torch.equal(interrupted, run(optimized, callback_on_step_end=stop)) and not torch.equal(interrupted, fresh)
    assert torch.equal(run(optimized), fresh) and marks(optimized) == "#....."


def test_a_run_after_a_keyboard_interrupt_is_fresh(optimized: Any) -> None:
    crash_between_and_within_steps(optimized, run(optimized))


def test_an_interrupt_while_compiling_leaves_a_working_pipeline() -> None:
    interrupts = iter([False, True])

    @torch._dynamo.register_backend(name="interrupted")
    def _backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        if next(interrupts, False):
            raise KeyboardInterrupt
        return graph.forward

    torch._dynamo.reset()
    pipe = make_pipe(FluxPipeline)
    baseline = run(pipe)
    fluxfire.apply_compile(pipe, backend="interrupted")
    fluxfire.apply_cache(pipe, 0)
    with pytest.raises(KeyboardInterrupt):
        run(pipe)
    assert near(run(pipe), baseline) and graphs(pipe) >= 2
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_each_of_several_pictures_of_a_prompt_decides_as_it_would_alone(compiled: bool) -> None:
    pipe = optimize(make_pipe(FluxPipeline), compiled, threshold=1e-9)
    noise = [torch.randn(1, 8 * 12, 16, generator=torch.Generator().manual_seed(seed)) for seed in (21, 22, 23)]
    for latents in noise[:2]:
        run(pipe, latents=latents)
    distances = [distance for call in fluxfire.cache_stats(pipe).last_run[1:] for distance in call.distances]
    fluxfire.set_cache_threshold(pipe, sorted(distances)[len(distances) // 2] * 1.01)
    alone, hits = [], []
    for latents in noise:
        alone.append(run(pipe, latents=latents))
        hits.append([hit for call in fluxfire.cache_stats(pipe).last_run for hit in call.hits])
    together = run(pipe, latents=torch.cat(noise), num_images_per_prompt=3)
    assert [call.hits for call in fluxfire.cache_stats(pipe).last_run] == list(zip(*hits, strict=True))
    assert any(map(any, hits)) and (together - torch.cat(alone)).norm() <= 1e-4 * together.norm()


def test_sizes_and_step_counts_may_change_from_run_to_run(optimized: Any) -> None:
    runs = [((32, 48), 6), ((48, 48), 3), ((32, 48), 1), ((28, 36), 6), ((32, 48), 6)]
    out = []
    for size, steps in runs:
        out.append(run(optimized, size=size, steps=steps))
        assert marks(optimized) == "#" + "." * (steps - 1)
        expected = fluxfire.apply_cache(make_pipe(FluxPipeline), math.inf)
        assert near(out[-1], run(expected, size=size, steps=steps))
    assert torch.equal(out[0], out[-1])
    assert graphs(optimized) in (0, 2)


def test_the_reference_picture_may_change_from_run_to_run() -> None:
    pipe = fluxfire.apply_cache(make_pipe(FluxKontextPipeline), math.inf)
    fresh = run(pipe)
    for image in (torch.rand(1, 3, 48, 32), None):
        run(pipe, image=image)
        assert marks(pipe) == "#....."
    assert torch.equal(run(pipe), fresh)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_moved_to_another_data_type_it_is_that_pipeline(compiled: bool) -> None:
    """A device is moved to in the same way; this machine may have only one."""
    double = {name: tensor.double() for name, tensor in embeds().items()}
    expected, baseline = run(make_pipe(FluxPipeline).to(torch.float64), **double), run(make_pipe(FluxPipeline))
    pipe = optimize(make_pipe(FluxPipeline), compiled, threshold=0)
    assert near(run(pipe), baseline)
    assert pipe.to(torch.float64) is pipe
    out = run(pipe, **double)
    assert out.dtype == torch.float64 and near(out, expected)
    assert near(run(pipe.to("cpu", torch.float32)), baseline)
    assert graphs(pipe) in (0, 4)  # two for each data type
    assert fluxfire.report(pipe).lost == ()
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


def test_a_saved_pipeline_is_the_one_without_our_steps(optimized: Any, tmp_path: Any) -> None:
    baseline, fresh = run(make_pipe(FluxPipeline)), run(optimized)
    optimized.save_pretrained(tmp_path)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    loaded = FluxPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    with pytest.raises(fluxfire.NotOptimizedError):
        fluxfire.report(loaded)
    # Products of weights that lie otherwise in memory (a file's) are rounded otherwise.
    assert near(run(loaded), baseline)
    assert torch.equal(run(optimized), fresh), "saving must not change the one that was saved"
    assert near(run(fluxfire.apply_cache(loaded, math.inf)), fresh)
