"""LoRAs before, after, fused and swapped under compilation: always the right picture, and graphs as counted here."""

from __future__ import annotations

import functools
import math
from typing import Any

import classes
import pytest
import torch
from conftest import make_pipe, run
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

import fluxfire

# diffusers loads a second adapter through a call of peft's that warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


def make() -> Any:
    """Blocks of one kind alone: half the time to trace."""
    return make_pipe(FluxPipeline, blocks=(0, 2))


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()


def layers(transformer: Any) -> list[str]:
    """The names of one projection in every block; the fewer, the quicker to trace."""
    return [name for name, _ in transformer.named_modules() if name.endswith(("attn.to_q", "to_qkv_mlp_proj"))]


def weights_of(pipe: Any, seed: int, rank: int) -> dict[str, torch.Tensor]:
    """A LoRA as a file has it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers(pipe.transformer), init_lora_weights=False)
    pipe.transformer.add_adapter(config, "made")
    weights = get_peft_model_state_dict(pipe.transformer, adapter_name="made")
    pipe.transformer.delete_adapters("made")
    return {name: 3 * weight for name, weight in weights.items()}


@functools.cache
def loras() -> tuple[dict[str, torch.Tensor], ...]:
    """Two that differ in rank and in the ratio of alpha to it."""
    found = []
    for seed, rank, alpha in ((1, 2, 2.0), (2, 4, 8.0)):
        weights = weights_of(make(), seed, rank)
        names = [name for name in weights if "lora_A" in name]
        alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(alpha) for name in names}
        found.append({f"transformer.{name}": value for name, value in (weights | alphas).items()})
    return tuple(found)


@functools.cache
def drawn_with(number: int | None, scale: float = 1.0) -> torch.Tensor:
    """The picture of an untouched pipeline with this LoRA."""
    pipe = make()
    if number is not None:
        load(pipe, number)
        pipe.set_adapters("lora", scale)
    return run(pipe)


def load(pipe: Any, number: int, name: str = "lora", **more: Any) -> None:
    pipe.load_lora_weights(dict(loras()[number]), adapter_name=name, **more)


def near(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((out - expected).norm() <= 1e-5 * expected.norm())


def compiled(threshold: float = 0) -> Any:
    """A pipeline with compiled blocks under the cache."""
    return with_steps(make(), threshold)


def with_steps(pipe: Any, threshold: float = 0) -> Any:
    fluxfire.apply_compile(pipe, backend="eager")
    return fluxfire.apply_cache(pipe, threshold)


def graphs(pipe: Any) -> int:
    counts = fluxfire.report(pipe).compile
    assert counts is not None and counts.graph_breaks == 0
    return counts.graphs


def test_the_loras_of_these_tests_change_the_picture() -> None:
    drawn = [drawn_with(None), drawn_with(0), drawn_with(0, 0.5), drawn_with(1)]
    assert all((a - b).norm() > 1e-3 * b.norm() for n, a in enumerate(drawn) for b in drawn[:n])


def test_one_loaded_before_is_in_the_graphs_and_its_scale_is_not() -> None:
    pipe = make()
    load(pipe, 0)
    with_steps(pipe)
    for scale in (1.0, 0.5, 1.0):
        pipe.set_adapters("lora", scale)
        assert near(run(pipe), drawn_with(0, scale))
    assert near(run(pipe, joint_attention_kwargs={"scale": 0.5}), drawn_with(0, 0.5))
    assert graphs(pipe) == 1
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), drawn_with(0))


def test_one_loaded_after_costs_graphs_once() -> None:
    """peft freezes the weights under an adapter, which is another graph of the plain blocks, once."""
    pipe, counted = compiled(), []
    assert near(run(pipe), drawn_with(None))
    for number in (0, 0):
        load(pipe, number)
        assert near(run(pipe), drawn_with(number))
        counted.append(graphs(pipe))
        pipe.unload_lora_weights()
        assert near(run(pipe), drawn_with(None))
        counted.append(graphs(pipe))
    assert counted == [2, 3, 3, 3]
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), drawn_with(None))


def test_frozen_weights_need_no_further_graph_when_a_lora_goes() -> None:
    pipe = make()
    pipe.transformer.requires_grad_(False)
    with_steps(pipe)
    run(pipe)
    load(pipe, 0)
    run(pipe)
    pipe.unload_lora_weights()
    assert near(run(pipe), drawn_with(None))
    assert graphs(pipe) == 2


def test_adapters_switched_mixed_disabled_and_deleted() -> None:
    pipe, counted = compiled(), []
    for number, name in enumerate(("one", "two")):
        load(pipe, number, name)
    for name, expected in (("one", drawn_with(0)), ("two", drawn_with(1)), ("one", drawn_with(0))):
        pipe.set_adapters(name)
        assert near(run(pipe), expected)
        counted.append(graphs(pipe))
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert near(run(pipe), drawn_with(0))
    counted.append(graphs(pipe))
    pipe.disable_lora()
    assert near(run(pipe), drawn_with(None))
    pipe.enable_lora()
    counted.append(graphs(pipe))
    pipe.delete_adapters("two")
    assert near(run(pipe), drawn_with(0))
    counted.append(graphs(pipe))
    # Each new choice among the adapters that are loaded has graphs of its own; going back to one costs none.
    assert counted == [1, 2, 2, 3, 4, 5]


def test_one_fused_into_the_weights_and_taken_out_again() -> None:
    pipe = make()
    load(pipe, 0)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with_steps(pipe)
    assert near(run(pipe), drawn_with(0)) and graphs(pipe) == 1
    torch._dynamo.reset()
    late = compiled()
    load(late, 0)
    late.fuse_lora()
    assert near(run(late), drawn_with(0))
    late.unfuse_lora()
    assert near(run(late), drawn_with(0))
    late.unload_lora_weights()
    assert near(run(late), drawn_with(None))
    assert graphs(late) == 3


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused qkv"])
def test_swapping_compiles_nothing(when: str, fused: bool) -> None:
    """Ranks 2 and 4, alphas 8 and 16: no recompilation, whether the first is loaded before or after the steps."""
    pipe = make()
    if fused:
        fluxfire.apply_fused_qkv(pipe)
    if when == "after":
        with_steps(pipe)
        run(pipe)
    pipe.enable_lora_hotswap(target_rank=4)
    load(pipe, 0)
    if when == "before":
        with_steps(pipe)
    assert near(run(pipe), drawn_with(0))
    before = graphs(pipe)
    for number in (1, 0, 1):
        load(pipe, number, hotswap=True)
        assert near(run(pipe), drawn_with(number))
    assert graphs(pipe) == before == (2 if when == "after" else 1)


@pytest.mark.parametrize("by", ["diffusers", "peft"])
def test_another_scale_compiles_nothing(by: str) -> None:
    """A number of Python, where no file told an alpha: it stays an input of the graph."""
    pipe = make()
    fluxfire.apply_compile(pipe, backend="eager", megacache=None)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=layers(pipe.transformer), init_lora_weights=False)
    if by == "diffusers":
        pipe.transformer.add_adapter(config)
    else:
        inject_adapter_in_model(config, pipe.transformer)
    drawn = []
    for scale in (1.0, 0.5, 0.25):
        for module in pipe.transformer.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_scale("default", scale)
        drawn.append(run(pipe))
    assert not near(drawn[0], drawn[1]) and not near(drawn[1], drawn[2])
    assert graphs(pipe) == 1


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "Flux2KleinPipeline", "Flux3ModularPipeline"])
def test_swapping_compiles_nothing_in_each_family(name: str) -> None:
    def drawn(pipe: Any, *adapters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        pipe.transformer.enable_lora_hotswap(target_rank=4)
        out = []
        for number, adapter in enumerate(adapters):
            pipe.transformer.load_lora_adapter(dict(adapter), prefix=None, adapter_name="lora", hotswap=number > 0)
            out.append(classes.run(pipe))
        return out

    two = [weights_of(classes.make(name), seed, rank) for seed, rank in ((1, 2), (2, 4))]
    expected = drawn(classes.make(name), *two)
    pipe = classes.make(name)
    fluxfire.apply_compile(pipe, backend="eager")
    if name.startswith("Flux3"):
        fluxfire.apply_static_blocks(pipe)
    fluxfire.apply_cache(pipe, 0)
    out = drawn(pipe, *two)
    assert all(near(one, other) for one, other in zip(out, expected, strict=True))
    assert not near(*expected)
    assert graphs(pipe) == 2


def test_a_swap_in_mid_run_is_followed_by_the_cache() -> None:
    """What is kept is of the adapter before; the calls go on, and the next run knows nothing of it."""
    pipe = make()
    pipe.enable_lora_hotswap(target_rank=4)
    load(pipe, 0)
    with_steps(pipe, math.inf)
    fresh = run(pipe)

    def swap(_pipe: Any, step: int, _timestep: Any, _kwargs: Any) -> dict[str, Any]:
        if step == 2:
            load(pipe, 1, hotswap=True)
        return {}

    run(pipe, callback_on_step_end=swap)
    load(pipe, 0, hotswap=True)
    assert torch.equal(run(pipe), fresh) and graphs(pipe) == 1


def test_one_loaded_under_our_group_offload() -> None:
    """diffusers takes the offload's hooks off and puts them on anew around the loading."""
    pipe = make()
    fluxfire.apply_cache(pipe, 0)
    fluxfire.apply_offload(pipe, "group", device="cpu")
    load(pipe, 0)
    assert near(run(pipe), drawn_with(0))
    assert fluxfire.report(pipe).lost == ()
    fluxfire.restore_pipeline(pipe)
    assert near(run(pipe), drawn_with(0))
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), drawn_with(None))
