"""FLUX.3's text and reference blocks: once a run, to the bit, and anew for whatever they depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import classes
import pytest
import torch
from conftest import attributes
from peft import LoraConfig

import fluxfire

STEPS = classes.STEPS


def make() -> Any:
    """Two guidance branches a step, a reference picture, 2 text, 2 image, 2 reference and 2 joint blocks."""
    return classes.make("Flux3ModularPipeline")


def entered(pipe: Any, calls: Callable[..., list[int]]) -> dict[str, list[int]]:
    lists = {"text": pipe.transformer.txt_mode_blocks, "reference": pipe.transformer.mode_blocks["image_cond"]}
    lists |= {"image": pipe.transformer.mode_blocks["image"], "joint": pipe.transformer.single_transformer_blocks}
    return {name: calls(blocks[1].attn) for name, blocks in lists.items()}


def counts(pipe: Any) -> tuple[int, int]:
    stats = dict(fluxfire.report(pipe).other)["static_blocks"]
    return stats.computed, stats.saved


def test_each_branch_computes_them_once_a_run_and_the_picture_is_the_same_to_the_bit(calls: Any) -> None:
    pipe = make()
    baseline = classes.run(pipe)
    before, entries = attributes(pipe), entered(pipe, calls)
    fluxfire.apply_static_blocks(pipe)
    for number in (1, 2):
        assert torch.equal(classes.run(pipe), baseline)
        assert entries == {
            **{name: [2 * number] for name in ("text", "reference")},
            **{name: [2 * STEPS * number] for name in ("image", "joint")},
        }
    computed, saved = counts(pipe)
    assert (computed, saved) == (2 * 2 * 4, 2 * 2 * 4 * (STEPS - 1))  # 2 runs, 2 branches, 4 blocks
    assert "computed 16, saved 48" in str(fluxfire.report(pipe))
    fluxfire.restore_pipeline(pipe)
    assert attributes(pipe).keys() == before.keys()
    assert torch.equal(classes.run(pipe), baseline)


def test_under_the_cache_a_hit_computes_one_block_alone(calls: Any) -> None:
    pipe = make()
    fluxfire.optimize_pipeline(pipe, cache_threshold=math.inf, compile=False)
    assert [step.name for step in fluxfire.report(pipe).steps] == ["static_blocks", "cache"]
    expected = make()
    fluxfire.apply_cache(expected, math.inf)
    entries, leader = entered(pipe, calls), calls(pipe.transformer.mode_blocks["image"][0].attn)
    assert torch.equal(classes.run(pipe), classes.run(expected))
    assert entries == {name: [2] for name in entries}
    assert leader == [2 * STEPS]


def test_over_compiled_blocks_there_is_no_further_graph() -> None:
    torch._dynamo.reset()
    pipe = make()
    fluxfire.apply_compile(pipe, backend="eager")
    baseline = classes.run(pipe)
    fluxfire.apply_static_blocks(pipe)
    assert torch.equal(classes.run(pipe), baseline)
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)
    assert counts(pipe) == (8, 8 * (STEPS - 1))


def change_prompt(pipe: Any, inputs: dict[str, Any]) -> None:
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] + 1


def write_prompt(pipe: Any, inputs: dict[str, Any]) -> None:
    inputs["encoder_hidden_states"].add_(1)


def move_text(pipe: Any, inputs: dict[str, Any]) -> None:
    inputs["txt_ids"] = inputs["txt_ids"] + 1


def write_weights(pipe: Any, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        pipe.transformer.context_embedder.weight.mul_(2)


def load_adapter(pipe: Any, inputs: dict[str, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "other")


def scale_adapter(pipe: Any, inputs: dict[str, Any]) -> None:
    pipe.transformer.set_adapters("other", 0.3)


def scale_in_the_call(pipe: Any, inputs: dict[str, Any]) -> None:
    inputs["attention_kwargs"] = {"scale": 0.1}


def other_processor(pipe: Any, inputs: dict[str, Any]) -> None:
    attention = pipe.transformer.txt_mode_blocks[0].attn

    class Doubled(type(attention.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().__call__(*args, **kwargs)

    attention.set_processor(Doubled())


CHANGES = [change_prompt, write_prompt, move_text, write_weights, load_adapter]
CHANGES += [scale_adapter, scale_in_the_call, other_processor]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_they_depend_on_and_changes_in_mid_run_is_computed_anew(change: Callable[..., None]) -> None:
    pipe = make()
    if change in (scale_adapter, scale_in_the_call):
        load_adapter(pipe, {})
    inputs = {
        "hidden_states": classes.noise(5, 1, 24, 16),
        "encoder_hidden_states": classes.noise(6, 1, 7, classes.CHANNELS),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(6), torch.arange(4), torch.arange(1)).float(),
        "txt_ids": torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 7))).float(),
    }
    pipe.scheduler.set_timesteps(6, mu=1.0)
    fluxfire.apply_static_blocks(pipe)
    outputs = []
    for step in range(4):
        pipe.scheduler._step_index = step
        if step == 2:
            change(pipe, inputs)
        outputs.append(pipe.transformer(**inputs).sample)
    assert counts(pipe) == (4, 4)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[1], outputs[2]), "the change must matter, or this shows nothing"
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(pipe.transformer(**inputs).sample, outputs[2])


def test_an_offload_by_leaves_moves_weights_and_saves_the_same() -> None:
    pipe = make()
    baseline = classes.run(pipe)
    fluxfire.apply_static_blocks(pipe)
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(classes.run(pipe), baseline)
    assert counts(pipe) == (8, 8 * (STEPS - 1))


def test_with_gradients_they_are_computed() -> None:
    pipe = make()
    fluxfire.apply_static_blocks(pipe)
    seen: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    classes.run(pipe)
    hook.remove()
    before = counts(pipe)[1]
    pipe.scheduler._step_index = STEPS - 1
    pipe.transformer(**seen)[0].sum().backward()
    assert counts(pipe)[1] == before
    assert pipe.transformer.txt_mode_blocks[0].attn.to_q.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "reason"), [("FluxPipeline", "found FLUX.1"), ("Flux3DistilledModularPipeline", "flow-map")]
)
def test_other_models_are_refused_by_name(name: str, reason: str) -> None:
    pipe = classes.make(name)
    with pytest.raises(fluxfire.StepError, match=reason):
        fluxfire.apply_static_blocks(pipe)
    assert "static_blocks" not in str(fluxfire.plan_pipeline(pipe, compile=False))
