"""The modulation table: the same pictures, all rows from one product, and never the row of something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import classes
import pytest
import torch
from classes import CASES
from conftest import attributes, crash_between_and_within_steps, embeds, make_pipe, run
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

import fluxfire
from fluxfire.modulation_rows import ModulationStats

FLUX1 = [name for name, case in CASES.items() if case.family == "FLUX.1"]


def stats(pipe: Any) -> ModulationStats:
    told: ModulationStats = dict(fluxfire.report(pipe).other)["modulation_table"]
    return told


def near(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((out - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("name", FLUX1)
def test_every_call_of_every_class_takes_its_rows_from_one_table_a_branch(name: str) -> None:
    pipe, case = classes.make(name), CASES[name]
    baseline = classes.run(pipe)
    fluxfire.apply_modulation_table(pipe)
    for runs in (1, 2):
        assert near(classes.run(pipe), baseline)
        told = stats(pipe)
        assert (told.from_table, told.computed) == (runs * case.branches * case.steps, 0)
        assert told.tables == runs * case.branches and told.kept_bytes > 0


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("weights", ["gpu", "cpu"])
def test_layers_compute_once_a_run_and_all_is_as_before(pipe: Any, weights: str, calls: Callable[..., Any]) -> None:
    baseline, before = run(pipe, batch=2), attributes(pipe)
    saved = {name: tensor.data_ptr() for name, tensor in pipe.transformer.state_dict().items()}
    layer = pipe.transformer.single_transformer_blocks[0].norm.linear
    fluxfire.apply_modulation_table(pipe, weights=weights)
    assert {name: tensor.data_ptr() for name, tensor in pipe.transformer.state_dict().items()} == saved
    entered, tembs = calls(layer), set()
    given: list[dict[str, Any]] = []
    first = pipe.transformer.transformer_blocks[0]
    looks = [first.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)]
    looks += [pipe.transformer.norm_out.register_forward_pre_hook(lambda _, args: tembs.add(storage(args[1])))]
    assert near(run(pipe, batch=2), baseline) and (entered, len(tembs)) == ([0], 1)
    for look in looks:
        look.remove()
    # Text and positions are the same objects in all steps, and all of temb is one tensor.
    assert len(given) == 6 and len({id(kwargs["encoder_hidden_states"]) for kwargs in given}) == 1
    assert len({id(kwargs["image_rotary_emb"]) for kwargs in given}) == 1
    # 6 steps x 2 samples x (2 double blocks x 12 + 2 single ones x 3 + temb) x 32 channels, in float32 as all here.
    text, rotary = given[0]["encoder_hidden_states"], given[0]["image_rotary_emb"]
    rows = 6 * 2 * (2 * 12 + 2 * 3 + 1) * 32 * 4
    assert stats(pipe).kept_bytes == rows + text.nbytes + sum(table.nbytes for table in rotary)
    fluxfire.restore_pipeline(pipe)
    same = {key: value for key, value in attributes(pipe).items() if key[0] not in ("pipe", "scheduler")}
    assert same == {key: value for key, value in before.items() if key[0] not in ("pipe", "scheduler")}
    assert torch.equal(run(pipe, batch=2), baseline)


def test_other_step_counts_sizes_and_a_run_that_raised(pipe: Any) -> None:
    expected = [run(pipe), run(pipe, steps=3), run(pipe, size=(48, 32), steps=2)]
    fluxfire.apply_modulation_table(pipe)
    fresh = run(pipe)
    assert near(fresh, expected[0]) and near(run(pipe, steps=3), expected[1])
    assert near(run(pipe, size=(48, 32), steps=2), expected[2])
    crash_between_and_within_steps(pipe, fresh)
    assert stats(pipe).computed == 0


def call(pipe: Any, timestep: float, guidance: float = 3.5, given: dict[str, torch.Tensor] | None = None) -> Any:
    """One denoiser call as a loop of one's own makes it."""
    generator = torch.Generator().manual_seed(7)
    given = given or embeds()
    out: torch.Tensor = pipe.transformer(
        hidden_states=torch.randn(1, 6, 16, generator=generator),
        encoder_hidden_states=given["prompt_embeds"],
        pooled_projections=given["pooled_prompt_embeds"],
        timestep=torch.tensor([timestep]) / 1000,
        guidance=torch.tensor([guidance]),
        txt_ids=torch.zeros(7, 3),
        img_ids=torch.zeros(6, 3),
        return_dict=False,
    )[0]
    return out


@torch.no_grad()
def test_a_loop_that_calls_with_other_timesteps_or_guidance_is_computed() -> None:
    pipe = make_pipe(FluxPipeline)
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5], mu=1.0)
    known = pipe.scheduler.timesteps.tolist()
    conditioning = embeds()
    asked: list[Any] = [(known[0], 3.5), (known[1] + 1, 3.5), (known[2], 4.0), (known[2], 3.5)]
    expected = [call(pipe, *one) for one in asked]
    fluxfire.apply_modulation_table(pipe)
    outs = []
    for index, one in enumerate(asked):
        pipe.scheduler._step_index = min(index, 2)
        outs.append(call(pipe, *one, conditioning))
    assert all(near(out, wanted) for out, wanted in zip(outs, expected, strict=True))
    assert stats(pipe).from_table < len(asked) and stats(pipe).computed >= 2
    assert near(call(pipe, 123.0), _plain(call, 123.0))  # of no run, with a timestep of nobody's


def _plain(make: Any, timestep: float) -> Any:
    return make(make_pipe(FluxPipeline), timestep)


def test_a_run_that_begins_at_a_repeated_timestep_takes_its_own_row() -> None:
    """As rounding to bfloat16 makes them: here two steps at one sigma, and a run that begins at the second."""
    pipe = classes.make("FluxImg2ImgPipeline")
    fluxfire.apply_modulation_table(pipe)
    more = {"image": classes.picture(), "strength": 0.6, "sigmas": [0.9, 0.7, 0.7, 0.5, 0.3], "output_type": "latent"}
    pipe(**embeds(), height=32, width=32, num_inference_steps=5, **more)
    told = dict(fluxfire.report(pipe).other)["modulation_table"]
    assert (told.from_table, told.computed, told.tables) == (3, 0, 1)


def test_embeddings_replaced_in_mid_run_have_a_table_of_their_own(pipe: Any) -> None:
    other = embeds(seed=8)

    def replace(_pipe: Any, step: int, _timestep: Any, kwargs: Any) -> Any:
        return {"prompt_embeds": other["prompt_embeds"]} if step == 2 else {}

    baseline = run(pipe, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    fluxfire.apply_modulation_table(pipe)
    out = run(pipe, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert near(out, baseline) and (stats(pipe).tables, stats(pipe).computed) == (2, 0)


def test_weights_written_to_in_mid_run_are_read_anew() -> None:
    pipe, other = make_pipe(FluxPipeline), make_pipe(FluxPipeline)

    def write(of: Any, step: int, _timestep: Any, kwargs: Any) -> Any:
        if step == 2:
            with torch.no_grad():
                of.transformer.single_transformer_blocks[1].norm.linear.weight.mul_(2)
                of.transformer.time_text_embed.timestep_embedder.linear_1.weight.mul_(1.5)
                of.transformer.context_embedder.weight.mul_(1.5)
        return kwargs

    baseline = run(pipe, callback_on_step_end=write)
    fluxfire.apply_modulation_table(other)
    assert near(run(other, callback_on_step_end=write), baseline) and stats(other).tables == 2


def test_parameters_put_in_the_place_of_a_modulation_layers_are_its_own_and_stay() -> None:
    pipe, other = make_pipe(FluxPipeline), make_pipe(FluxPipeline)
    new = {name: 1.5 * value for name, value in pipe.transformer.state_dict().items()}
    fluxfire.apply_modulation_table(other)
    run(other)
    for one in (pipe, other):
        one.transformer.load_state_dict(new, assign=True)
    assert near(run(other), run(pipe))
    fluxfire.restore_pipeline(other)
    assert torch.equal(run(other), run(pipe))


def scaled(module: torch.nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
    module.calls = getattr(module, "calls", 0) + 1  # type: ignore[assignment, operator]
    return out * (1 + 0.1 * module.calls)  # type: ignore[operator]


def hook_on_text(pipe: Any) -> Any:
    return pipe.transformer.context_embedder.register_forward_hook(scaled)


def hook_within_time(pipe: Any) -> Any:
    return pipe.transformer.time_text_embed.timestep_embedder.linear_1.register_forward_hook(scaled)


def positions_of_ones_own(pipe: Any) -> Any:
    class Own(type(pipe.transformer.pos_embed)):  # type: ignore[misc]
        calls = 0

        def forward(self, ids: torch.Tensor) -> Any:
            self.calls += 1
            return super().forward(ids * (1 + 0.1 * self.calls))

    pipe.transformer.pos_embed = Own(10000, pipe.transformer.pos_embed.axes_dim)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [hook_on_text, hook_within_time, positions_of_ones_own])
def test_embedders_that_do_something_else_are_computed_in_each_step(change: Callable[[Any], Any], when: str) -> None:
    pipe, other = make_pipe(FluxPipeline), make_pipe(FluxPipeline)
    plain = run(pipe)
    change(pipe)
    if when == "before":
        change(other)
    fluxfire.apply_modulation_table(other)
    if when == "after":
        assert near(run(other), plain)
        change(other)
    assert near(run(other), run(pipe)) and not near(run(pipe), plain)


def test_a_lora_on_the_text_embedder_is_scaled_in_mid_run() -> None:
    pipe, other = make_pipe(FluxPipeline), make_pipe(FluxPipeline)
    generator = torch.Generator().manual_seed(3)
    key = "transformer.context_embedder"
    lora = {f"{key}.lora_A.weight": torch.randn(2, 32, generator=generator)}
    lora[f"{key}.lora_B.weight"] = torch.randn(32, 2, generator=generator)

    def scale(of: Any, step: int, _timestep: Any, kwargs: Any) -> Any:
        of.set_adapters("default", 0.5 + step)
        return kwargs

    fluxfire.apply_modulation_table(other)
    for one in (pipe, other):
        one.load_lora_weights(dict(lora), adapter_name="default")
    assert near(run(other, callback_on_step_end=scale), run(pipe, callback_on_step_end=scale))


def test_a_swapped_scheduler_is_followed(pipe: Any) -> None:
    fluxfire.apply_modulation_table(pipe)
    run(pipe)
    swapped = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    plain = make_pipe(type(pipe))
    pipe.scheduler = plain.scheduler = swapped
    baseline = run(plain)
    assert near(run(pipe), baseline) and stats(pipe).computed == 0


def test_samples_that_the_cache_computes_alone_have_their_own_rows() -> None:
    made = []
    pipe = fluxfire.apply_cache(make_pipe(FluxPipeline), 1e-9)
    run(pipe, batch=3, steps=8)
    distances = sorted(distance for call in fluxfire.cache_stats(pipe).last_run[1:] for distance in call.distances)
    for modulation in (False, True):
        pipe = make_pipe(FluxPipeline)
        fluxfire.apply_cache(pipe, distances[len(distances) // 2])
        if modulation:
            fluxfire.apply_modulation_table(pipe)
        out = run(pipe, batch=3, steps=8)
        made.append((out, fluxfire.cache_stats(pipe).marks()))
    assert made[0][1] == made[1][1] and "+" in made[0][1]
    assert near(made[1][0], made[0][0])


def test_compiled_the_row_is_an_input_and_graphs_stay_two() -> None:
    torch._dynamo.reset()
    pipe = make_pipe(FluxPipeline)
    baseline = run(pipe)
    fluxfire.apply_compile(pipe, backend="eager", megacache=None)
    fluxfire.apply_modulation_table(pipe)
    assert near(run(pipe), baseline)
    run(pipe, size=(48, 32), steps=3)
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)


def lora_on_norms(pipe: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    found: dict[str, torch.Tensor] = {}
    for index in range(len(pipe.transformer.single_transformer_blocks)):
        key = f"transformer.single_transformer_blocks.{index}.norm.linear"
        found[f"{key}.lora_A.weight"] = torch.randn(2, 32, generator=generator)
        found[f"{key}.lora_B.weight"] = torch.randn(96, 2, generator=generator)
    return found


def test_it_steps_back_from_an_adapter_on_a_modulation_layer() -> None:
    pipe, plain = make_pipe(FluxPipeline), make_pipe(FluxPipeline)
    baseline = run(pipe)
    plain.load_lora_weights(lora_on_norms(plain))
    with_lora = run(plain)
    assert not near(with_lora, baseline)
    assert "under an adapter" in str(fluxfire.check_modulation_table(plain))
    fluxfire.apply_modulation_table(pipe)
    assert near(run(pipe), baseline)
    pipe.load_lora_weights(lora_on_norms(pipe))
    assert near(run(pipe), with_lora)
    assert "stepped back: a peft" in stats(pipe).reason
    pipe.unload_lora_weights()
    assert near(run(pipe), baseline)
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)
    assert type(pipe.transformer.single_transformer_blocks[0].norm.linear) is torch.nn.Linear


def test_it_is_refused_where_there_is_nothing_to_gain(pipe: Any) -> None:
    with pytest.raises(fluxfire.ArgumentError, match="weights: found 'disk', needed \"gpu\""):
        fluxfire.apply_modulation_table(pipe, weights="disk")
    with pytest.raises(fluxfire.StepError, match=r"found FLUX\.2, whose blocks have no modulation"):
        fluxfire.apply_modulation_table(classes.make("Flux2KleinPipeline"))
    fluxfire.apply_compile(pipe, backend="eager", scope="denoiser", megacache=None)
    with pytest.raises(fluxfire.StepError, match='scope="blocks"'):
        fluxfire.apply_modulation_table(pipe)
