"""FLUX.3: first blocks of one kind of tokens, references in an argument of their own, guiders."""

from __future__ import annotations

import math
from typing import Any

import classes
import pytest
import torch
from diffusers import Flux3Transformer2DModel

import fluxfire


def call(transformer: Flux3Transformer2DModel, *, batch: int = 1, references: bool, seed: int = 5) -> dict[str, Any]:
    """Inputs of the denoiser for 6 x 4 noise tokens, and 3 x 3 of a reference picture."""

    def ids(height: int, width: int, place: int) -> torch.Tensor:
        axes = (torch.arange(1), torch.arange(height), torch.arange(width), torch.tensor([place]))
        return torch.cartesian_prod(*axes).float()

    inputs = {
        "hidden_states": classes.noise(seed, batch, 24, 16),
        "encoder_hidden_states": classes.noise(6, batch, 7, classes.CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids(6, 4, 0),
        "txt_ids": torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 7))).float(),
    }
    if references:
        inputs |= {"image_cond_hidden_states": classes.noise(7, batch, 9, 16), "image_cond_ids": ids(3, 3, -1)}
    return inputs


@pytest.fixture
def pipe() -> Any:
    """A pipeline whose scheduler is at the first step of a run."""
    pipe = classes.make("Flux3ModularPipeline")
    pipe.scheduler.set_timesteps(6, mu=1.0)
    pipe.scheduler._step_index = 0
    return pipe


def denoise(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """One denoiser call, in a step of its own."""
    with torch.no_grad():
        out: torch.Tensor = pipe.transformer(**inputs)[0]
    pipe.scheduler._step_index += 1
    return out


@pytest.mark.parametrize("references", [False, True])
def test_a_hit_is_the_first_block_plus_the_kept_rest(pipe: Any, references: bool) -> None:
    """The same residual twice: with the denoiser's inputs unchanged, a hit gives what was computed."""
    inputs = call(pipe.transformer, references=references)
    baseline = denoise(pipe, inputs)
    fluxfire.apply_cache(pipe, math.inf)
    first, second = denoise(pipe, inputs), denoise(pipe, inputs)
    assert fluxfire.cache_stats(pipe).marks() == "#."
    assert torch.equal(first, baseline)
    assert torch.allclose(second, baseline, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("references", [False, True])
def test_samples_that_missed_are_what_they_are_alone(pipe: Any, references: bool) -> None:
    inputs = call(pipe.transformer, batch=3, references=references)
    moved = inputs | {"hidden_states": inputs["hidden_states"].clone()}
    moved["hidden_states"][1] = classes.noise(8, 24, 16)
    baseline = denoise(pipe, moved)
    fluxfire.apply_cache(pipe, 1e-3)
    denoise(pipe, inputs)
    out = denoise(pipe, moved)
    assert fluxfire.cache_stats(pipe).last_run[-1].hits == (True, False, True)
    assert torch.allclose(out, baseline, rtol=1e-5, atol=1e-5)


def test_a_changed_reference_is_a_miss(pipe: Any) -> None:
    inputs = call(pipe.transformer, references=True)
    fluxfire.apply_cache(pipe, math.inf)
    denoise(pipe, inputs)
    denoise(pipe, inputs | {"image_cond_hidden_states": inputs["image_cond_hidden_states"] + 1})
    denoise(pipe, inputs | {"image_cond_hidden_states": None, "image_cond_ids": None})
    assert fluxfire.cache_stats(pipe).marks() == "###"


def test_two_calls_a_step_with_the_same_tensors_are_two_branches(pipe: Any) -> None:
    inputs = call(pipe.transformer, references=False)
    fluxfire.apply_cache(pipe, math.inf)
    for _ in range(3):
        with torch.no_grad():
            pipe.transformer(**inputs)
        denoise(pipe, inputs)
    stats = fluxfire.cache_stats(pipe)
    assert (stats.computed, stats.hits) == (2, 4)


def test_the_blocks_of_the_text_run_in_every_call(pipe: Any, calls: Any) -> None:
    inputs = call(pipe.transformer, references=True)
    fluxfire.apply_cache(pipe, math.inf)
    text, image = calls(pipe.transformer.txt_mode_blocks[0].attn), calls(pipe.transformer.mode_blocks["image"][1].attn)
    for _ in range(3):
        denoise(pipe, inputs)
    assert (text, image) == ([3], [1])


def test_compiled_by_block_it_is_two_graphs(pipe: Any) -> None:
    torch._dynamo.reset()
    inputs = call(pipe.transformer, references=True)
    baseline = denoise(pipe, inputs)
    fluxfire.apply_compile(pipe, backend="eager")
    fluxfire.apply_cache(pipe, 0)
    assert torch.allclose(denoise(pipe, inputs), baseline, rtol=1e-5, atol=1e-5)
    denoise(pipe, call(pipe.transformer, references=False))
    stats = fluxfire.report(pipe).compile
    assert stats is not None and (stats.graphs, stats.graph_breaks) == (2, 0)
