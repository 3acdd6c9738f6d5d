"""Any steps, in any order, with any settings, applied and restored: the pipe is as before, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import classes
import pytest
import torch
from conftest import PAIR_KNOBS, attributes, make_pipe, run
from diffusers import FluxKontextPipeline, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

import fluxfire
from fluxfire import demo
from fluxfire.optimize import RECIPES
from fluxfire.plan import ORDER

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")
# Settings to draw from for every step; lossless ones are held to the tolerance.
KNOBS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "memory_format": st.just({}),
    "fused_qkv": st.just({}),
    "fused_kernels": st.just({}),
    "quantization": st.fixed_dictionaries({"weights": st.sampled_from(["float8", "float8-after", "int8"])}),
    "modulation_table": st.fixed_dictionaries({"weights": st.sampled_from(["gpu", "cpu"])}),
    "attention": st.fixed_dictionaries({"backend": st.sampled_from(["auto", "native", "flash", "math"])}),
    "static_blocks": st.just({}),  # refused: these pipelines are FLUX.1
    "prompts": st.just({}),  # refused: these have no text encoders
    "vae_tiling": st.just({}),
    "offload": st.fixed_dictionaries({"kind": st.sampled_from(["model", "group"]), "device": st.just("cpu")}),
    "compile": st.fixed_dictionaries({"backend": st.just("eager"), "dynamic": st.booleans(), "vae": st.booleans()}),
    "cache": st.fixed_dictionaries(
        {
            "threshold": st.sampled_from([0.0, 0.1, 0.3, math.inf]),
            "warmup_steps": st.integers(0, 3),
            "max_consecutive_hits": st.none() | st.integers(1, 3),
            "batch": st.sampled_from(["sample", "any"]),
        }
    ),
}
PIPES = {cls: make_pipe(cls) for cls in (FluxPipeline, FluxKontextPipeline)}
BASELINES = {(cls, batch): run(PIPES[cls], batch=batch, steps=3, output_type="pt") for cls in PIPES for batch in (1, 2)}


def test_every_step_is_drawn() -> None:
    assert set(KNOBS) == set(RECIPES)


@st.composite
def steps(draw: st.DrawFn, names: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Steps in a random order, most often the right one, each at most twice."""
    chosen = draw(st.lists(st.sampled_from(names), max_size=len(names) + 1))
    if draw(st.integers(0, 3)):
        chosen = [name for name in ORDER if name in chosen]
    return [(name, draw(KNOBS[name])) for name in chosen]


def apply_and_restore(cls: type, batch: int, chosen: list[tuple[str, dict[str, Any]]]) -> None:
    pipe, baseline = PIPES[cls], BASELINES[cls, batch]
    before, random_state = attributes(pipe), torch.get_rng_state()
    applied = []
    for name, knobs in chosen:
        present = attributes(pipe)
        try:
            assert RECIPES[name].apply(pipe, **knobs) is pipe
            applied.append((name, knobs))
        except fluxfire.StepError as refused:
            assert str(refused).startswith(f"{name}: ")
            assert attributes(pipe) == present, "a refused step changed something"
    assert torch.equal(torch.get_rng_state(), random_state), "a step drew from the global generator"
    out = run(pipe, batch=batch, steps=3, output_type="pt")
    if all(RECIPES[name].kind == "lossless" or knobs.get("threshold") == 0 for name, knobs in applied):
        assert (out - baseline).norm() <= 1e-5 * baseline.norm()
    if applied:
        fluxfire.restore_pipeline(pipe)
    after = attributes(pipe)
    changing = ("pipe", "scheduler")  # a run sets attributes of these itself
    assert after.keys() == before.keys()
    assert [key for key in before if before[key] != after[key] and key[0] not in changing] == []
    assert torch.equal(run(pipe, batch=batch, steps=3, output_type="pt"), baseline)


without_compile = given(
    st.sampled_from(list(PIPES)), st.sampled_from([1, 2]), steps(tuple(name for name in RECIPES if name != "compile"))
)


@settings(max_examples=150, deadline=None, derandomize=True)
@without_compile
def test_steps_without_compile_are_undone_to_the_bit(cls: type, batch: int, chosen: Any) -> None:
    apply_and_restore(cls, batch, chosen)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True)
@without_compile
def test_more_steps_without_compile_are_undone_to_the_bit(cls: type, batch: int, chosen: Any) -> None:
    apply_and_restore(cls, batch, chosen)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(list(PIPES)), st.sampled_from([1, 2]), steps(tuple(RECIPES)))
def test_steps_with_compile_are_undone_to_the_bit(cls: type, batch: int, chosen: Any) -> None:
    torch._dynamo.reset()
    apply_and_restore(cls, batch, chosen)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_step_is_refused_twice(name: str) -> None:
    pipe = classes.make("Flux3ModularPipeline") if name == "static_blocks" else make_pipe(FluxPipeline)
    pipe = demo.load_pipeline() if name == "prompts" else pipe  # which has text encoders
    knobs = PAIR_KNOBS[name]
    RECIPES[name].apply(pipe, **knobs)
    present = attributes(pipe)
    with pytest.raises(fluxfire.StepError, match="applied already"):
        RECIPES[name].apply(pipe, **knobs)
    assert attributes(pipe) == present
