"""First-block cache: exact at 0, counts what it skips, decides per sample, keeps nothing from one run to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import crash_between_and_within_steps, embeds, make_pipe, run
from diffusers import FluxKontextPipeline, FluxPipeline

import fluxfire


def decisions(pipe: Any) -> list[tuple[bool, ...]]:
    return [call.hits for call in fluxfire.cache_stats(pipe).last_run]


def between(distances: Sequence[float], index: int) -> float:
    """A threshold between two distances, far from both: rounding must not decide."""
    lower, upper = sorted(distances)[index : index + 2]
    return (lower + upper) / 2


def test_threshold_zero_is_bit_identical(pipe: Any) -> None:
    baseline = run(pipe)
    fluxfire.apply_cache(pipe, 0)
    assert torch.equal(run(pipe), baseline)
    assert fluxfire.cache_stats(pipe).hits == 0


def test_a_threshold_that_nothing_reaches_is_bit_identical(pipe: Any) -> None:
    baseline = run(pipe, batch=2)
    fluxfire.apply_cache(pipe, 1e-9)
    assert torch.equal(run(pipe, batch=2), baseline)
    assert len(fluxfire.cache_stats(pipe).last_run) == 6


def test_a_hit_computes_the_first_block_and_no_other(pipe: Any, calls: Callable[..., Any]) -> None:
    entered: list[str] = []
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    for number, block in enumerate(blocks):
        block.attn.register_forward_pre_hook(lambda *_, number=number: entered.append(str(number)))
    fluxfire.apply_cache(pipe, math.inf)
    run(pipe, steps=4)
    assert "".join(entered) == "0123" + "0" * 3
    assert decisions(pipe) == [(False,), (True,), (True,), (True,)]


def test_a_hit_adds_the_last_computed_residual_to_the_first_block(pipe: Any) -> None:
    """Recomputed by hand from what the blocks took and gave, over noise tokens only."""
    first, last = pipe.transformer.transformer_blocks[0], pipe.transformer.single_transformer_blocks[-1]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    fluxfire.apply_cache(pipe, math.inf)
    outs: list[torch.Tensor] = []
    first.register_forward_hook(lambda _m, _i, out: outs.append(out[1]))
    last.register_forward_hook(lambda _m, _i, out: seen.append((outs[-1], out[1])))
    run(pipe, steps=3)
    noise = 8 * 12  # 32 x 48 pictures: latents 16 x 24, packed 8 x 12
    rest = seen[0][1][:, :noise] - seen[0][0][:, :noise]
    for leader_out, out in seen[1:]:
        assert torch.equal(out[:, :noise], leader_out[:, :noise] + rest)


def test_the_distance_is_the_relative_l1_distance_over_noise_tokens(flux_class: type) -> None:
    pipe = make_pipe(flux_class)
    first = pipe.transformer.transformer_blocks[0]
    residuals: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any], out: Any) -> None:
        residuals.append((out[1] - kwargs["hidden_states"])[:, : 8 * 12])

    first.register_forward_hook(keep, with_kwargs=True)
    fluxfire.apply_cache(pipe, 1e-9)
    run(pipe, steps=3)
    calls = fluxfire.cache_stats(pipe).last_run
    assert math.isnan(calls[0].distances[0])
    for call, now, before in zip(calls[1:], residuals[1:], residuals, strict=False):
        expected = (now - before).abs().mean() / before.abs().mean()
        assert call.distances[0] == pytest.approx(expected.item(), rel=1e-5)


def test_hits_follow_the_threshold(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, 1e-9)
    run(pipe)
    distances = sorted(call.distances[0] for call in fluxfire.cache_stats(pipe).last_run[1:])
    fluxfire.set_cache_threshold(pipe, distances[0] * 1.0001)
    run(pipe)
    assert sum(hit for (hit,) in decisions(pipe)) >= 1
    fluxfire.set_cache_threshold(pipe, math.inf)
    run(pipe)
    assert decisions(pipe) == [(False,)] + [(True,)] * 5


def test_warmup_steps_and_consecutive_hits_are_kept_to(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, math.inf, warmup_steps=2, max_consecutive_hits=2)
    run(pipe, steps=8)
    assert [hit for (hit,) in decisions(pipe)] == [False, False, True, True, False, True, True, False]


def test_every_sample_of_a_batch_decides_as_it_would_alone(flux_class: type) -> None:
    pipe = make_pipe(flux_class)
    fluxfire.apply_cache(pipe, 1e-9)
    prompts = [embeds(seed=seed) for seed in (11, 12, 13)]
    latents = [torch.randn(1, 8 * 12, 16, generator=torch.Generator().manual_seed(seed)) for seed in (21, 22, 23)]
    at_second_step = []
    for prompt, noise in zip(prompts, latents, strict=True):
        run(pipe, latents=noise, **prompt)
        at_second_step.append(fluxfire.cache_stats(pipe).last_run[1].distances[0])
    fluxfire.set_cache_threshold(pipe, between(at_second_step, 1))
    alone, hits = [], []
    for prompt, noise in zip(prompts, latents, strict=True):
        alone.append(run(pipe, latents=noise, **prompt))
        hits.append(decisions(pipe))
    assert len({tuple(h) for h in hits}) > 1, "the samples must differ, or this shows nothing"
    batch = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
    together = run(pipe, latents=torch.cat(latents), batch=3, **batch)
    assert decisions(pipe) == [tuple(hit for (hit,) in step) for step in zip(*hits, strict=True)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_only_missed_samples_go_through_the_blocks(flux_class: type) -> None:
    pipe = make_pipe(flux_class)
    sizes: list[int] = []
    pipe.transformer.transformer_blocks[1].attn.register_forward_pre_hook(
        lambda _m, _a, kwargs: sizes.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    fluxfire.apply_cache(pipe, 1e-9)
    run(pipe, batch=3)
    distances = [call.distances for call in fluxfire.cache_stats(pipe).last_run[1:]]
    fluxfire.set_cache_threshold(pipe, between(distances[-1], 1))
    sizes.clear()
    run(pipe, batch=3)
    misses = [len(hits) - sum(hits) for hits in decisions(pipe)]
    assert any(0 < count < 3 for count in misses), "some step must split the batch, or this shows nothing"
    assert sizes == [count for count in misses if count]


def test_batch_any_computes_all_when_one_misses(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, 1e-9)
    run(pipe, batch=3)
    split = between(fluxfire.cache_stats(pipe).last_run[-1].distances, 1)
    fluxfire.restore_pipeline(pipe)
    fluxfire.apply_cache(pipe, split, batch="any")
    run(pipe, batch=3)
    assert all(len(set(hits)) == 1 for hits in decisions(pipe))


def test_a_run_starts_empty(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, math.inf)
    first = run(pipe)
    assert torch.equal(run(pipe), first)
    assert decisions(pipe)[0] == (False,)


def test_run_after_a_crash_equals_a_fresh_run(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, math.inf)
    fresh = run(pipe)

    crash_between_and_within_steps(pipe, fresh)


def test_a_call_that_failed_half_way_is_not_compared_with(pipe: Any) -> None:
    """A caller may catch the error and go on within the run: the first residual without its rest must not be used."""
    fluxfire.apply_cache(pipe, math.inf)
    transformer, failures = pipe.transformer, iter([False, True])
    last = transformer.single_transformer_blocks[-1]
    forward = transformer.forward

    def once_more(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except ZeroDivisionError:
            return forward(*args, **kwargs)

    last.register_forward_pre_hook(lambda *_: 1 / 0 if next(failures, False) else None)
    transformer.forward = once_more
    run(pipe, steps=3)
    # The second step failed on its hit and was made again (as another call of that step); the third must not hit.
    assert decisions(pipe) == [(False,), (True,), (False,), (False,)]


@pytest.mark.parametrize("shared", [False, True], ids=["two prompts", "one tensor for both"])
def test_true_cfg_keeps_its_branches_apart(flux_class: type, shared: bool) -> None:
    pipe = make_pipe(flux_class)
    prompt, negative = embeds(seed=5), embeds(seed=5 if shared else 6)
    if shared:
        negative = prompt
    cfg = {"negative_prompt_embeds": negative["prompt_embeds"]}
    cfg |= {"negative_pooled_prompt_embeds": negative["pooled_prompt_embeds"], "true_cfg_scale": 3.0}
    baseline = run(pipe, **prompt, **cfg)
    fluxfire.apply_cache(pipe, 0)
    assert torch.equal(run(pipe, **prompt, **cfg), baseline)
    fluxfire.set_cache_threshold(pipe, math.inf)
    run(pipe, steps=3, **prompt, **cfg)
    calls = fluxfire.cache_stats(pipe).last_run
    assert [(call.step, call.branch, call.hits) for call in calls] == [
        (step, branch, (step > 0,)) for step in range(3) for branch in range(2)
    ]


def test_a_callback_that_replaces_the_prompt_causes_a_miss(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, math.inf)

    def replace(_pipe: Any, step: int, _timestep: Any, kwargs: Any) -> Any:
        return {"prompt_embeds": kwargs["prompt_embeds"] * 0.5} if step == 1 else {}

    run(pipe, steps=5, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert [hit for (hit,) in decisions(pipe)] == [False, True, False, True, True]


def test_a_prompt_written_to_in_place_causes_a_miss(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, math.inf)

    def write(_pipe: Any, step: int, _timestep: Any, kwargs: Any) -> Any:
        if step == 1:
            kwargs["prompt_embeds"].mul_(0.5)
        return {}

    run(pipe, steps=5, callback_on_step_end=write, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert [hit for (hit,) in decisions(pipe)] == [False, True, False, True, True]


def test_calls_outside_of_a_run_never_hit(pipe: Any) -> None:
    """Somebody calls the denoiser in a loop of their own and never steps the scheduler."""
    fluxfire.apply_cache(pipe, math.inf)
    seen: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    run(pipe, steps=2)
    hook.remove()
    pipe.scheduler.set_timesteps(4, mu=1.0)
    with torch.no_grad():
        for _ in range(8):
            pipe.transformer(**seen)
    assert decisions(pipe) == [(False,)] * 8


def test_works_in_inference_mode(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, math.inf)
    with torch.inference_mode():
        run(pipe, steps=3)
    assert decisions(pipe) == [(False,), (True,), (True,)]


def test_a_swapped_scheduler_is_followed(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, math.inf)
    run(pipe, steps=3)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    run(pipe, steps=3)
    assert decisions(pipe) == [(False,), (True,), (True,)]


def test_a_scheduler_without_step_index_is_followed_by_its_timesteps(pipe: Any) -> None:
    class NoIndex(type(pipe.scheduler)):  # type: ignore[misc]
        step_index = property(lambda self: (_ for _ in ()).throw(AttributeError("step_index")))

        def step(self, sample: Any, timestep: Any, latents: Any, return_dict: bool = True) -> Any:
            index = (self.timesteps == timestep).nonzero()[0].item()
            return (latents + (self.sigmas[index + 1] - self.sigmas[index]) * sample,)

    pipe.scheduler = NoIndex.from_config(pipe.scheduler.config)
    fluxfire.apply_cache(pipe, math.inf)
    run(pipe, steps=4)
    assert [(call.step, call.branch) for call in fluxfire.cache_stats(pipe).last_run] == [(i, 0) for i in range(4)]


def test_two_pipelines_of_one_class_have_their_own_thresholds_and_states() -> None:
    one, two = make_pipe(FluxPipeline, seed=0), make_pipe(FluxPipeline, seed=1)
    fluxfire.apply_cache(one, math.inf)
    fluxfire.apply_cache(two, 0)
    run(one, steps=3)
    run(two, steps=3)
    assert fluxfire.cache_stats(one).hits == 2
    assert fluxfire.cache_stats(two).hits == 0


def test_a_reference_picture_counts_neither_in_the_distance_nor_in_what_is_kept() -> None:
    pipe = make_pipe(FluxKontextPipeline)
    fluxfire.apply_cache(pipe, 1e-9)
    run(pipe, steps=2)
    handle = fluxfire.patches.handle_of(pipe)
    kept = handle.states["cache"]._reader._branches[0].state
    assert kept.rest.values[0].shape == kept.first.shape == (1, 8 * 12, 32)


def test_class_is_untouched(pipe: Any) -> None:
    transformer = pipe.transformer
    classes = {type(pipe), type(transformer), type(pipe.scheduler), *map(type, transformer.modules())}
    before = {cls: dict(vars(cls)) for cls in classes}
    fluxfire.optimize_pipeline(pipe, compile=False)
    run(pipe, steps=2)
    assert {cls: dict(vars(cls)) for cls in classes} == before


@pytest.mark.parametrize("threshold", [-0.1, math.nan, "0.1", None, True])
def test_a_bad_threshold_is_refused_and_changes_nothing(pipe: Any, threshold: Any) -> None:
    with pytest.raises(fluxfire.ArgumentError, match="threshold: found"):
        fluxfire.apply_cache(pipe, threshold)
    with pytest.raises(fluxfire.NotOptimizedError):
        fluxfire.report(pipe)
    fluxfire.apply_cache(pipe, 0.2)
    with pytest.raises(fluxfire.ArgumentError, match="threshold: found"):
        fluxfire.set_cache_threshold(pipe, threshold)
    assert fluxfire.cache_stats(pipe).threshold == 0.2


@pytest.mark.parametrize(
    "knobs", [{"warmup_steps": -1}, {"warmup_steps": 1.5}, {"max_consecutive_hits": 0}, {"batch": "each"}]
)
def test_bad_knobs_are_refused(pipe: Any, knobs: dict[str, Any]) -> None:
    with pytest.raises(fluxfire.ArgumentError, match="found"):
        fluxfire.apply_cache(pipe, 0.1, **knobs)


def test_a_second_cache_is_refused_and_the_first_stays(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, 0.3)
    with pytest.raises(fluxfire.StepError, match="applied already"):
        fluxfire.apply_cache(pipe, 0.5)
    assert fluxfire.cache_stats(pipe).threshold == 0.3


def test_diffusers_own_cache_is_refused(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert "disable_cache" in (fluxfire.check_cache(pipe) or "")


def test_a_denoiser_of_one_block_is_refused() -> None:
    pipe = make_pipe(FluxPipeline, blocks=(1, 0))
    with pytest.raises(fluxfire.StepError, match="at least 2"):
        fluxfire.apply_cache(pipe)


def denoiser_inputs(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """The arguments of one denoiser call of a run."""
    seen: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    run(pipe, steps=1, batch=batch)
    hook.remove()
    return seen


@torch.no_grad()
def twice(pipe: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same call at two steps of a run: computed, then (with an infinite threshold) a hit."""
    pipe.scheduler.set_timesteps(4, mu=1.0)
    outputs = []
    for step in range(2):
        pipe.scheduler._step_index = step
        outputs.append(pipe.transformer(**inputs)[0])
    assert decisions(pipe) == [(False,) * outputs[0].shape[0], (True,) * outputs[0].shape[0]]
    return outputs[0], outputs[1]


@pytest.mark.parametrize("lists", ["controlnet_block_samples", "controlnet_single_block_samples", "both"])
def test_controlnet_residuals_are_not_added_twice_on_a_hit(lists: str) -> None:
    """On equal inputs a hit must give what was computed, whatever is added between the blocks and after the last."""
    pipe = make_pipe(FluxPipeline, blocks=(3, 4))
    inputs = denoiser_inputs(pipe)
    generator = torch.Generator().manual_seed(7)
    samples = [torch.randn(1, 8 * 12, 32, generator=generator) for _ in range(2)]
    names = ("controlnet_block_samples", "controlnet_single_block_samples")
    control = {name: samples for name in names if lists in (name, "both")}
    plain = pipe.transformer(**inputs)[0]
    fluxfire.apply_cache(pipe, math.inf)
    computed, hit = twice(pipe, inputs | control)
    assert (computed - plain).norm() > 0.1 * plain.norm(), "the residuals must matter, or this shows nothing"
    assert torch.allclose(hit, computed, rtol=1e-4, atol=1e-5)


def test_ip_adapter_rows_follow_their_samples() -> None:
    """Samples that miss are computed with their own picture's tokens; another picture in mid-run is a miss."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipe = make_pipe(FluxPipeline)
    torch.manual_seed(4)
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 32, num_tokens=(3,), scale=1.0))
    pipe.transformer.encoder_hid_proj = torch.nn.Identity()
    inputs = denoiser_inputs_with_pictures(pipe, batch=3)
    with torch.no_grad():
        alone = pipe.transformer(**inputs)[0]
    fluxfire.apply_cache(pipe, math.inf)
    pipe.scheduler.set_timesteps(4, mu=1.0)
    state = fluxfire.patches.handle_of(pipe).states["cache"]
    with torch.no_grad():
        pipe.scheduler._step_index = 0
        pipe.transformer(**inputs)
        kept = state._reader._branches[0].state
        kept.first[1] *= 5  # the middle sample is now far from what is kept: it alone misses
        state.threshold = 0.5
        pipe.scheduler._step_index = 1
        mixed = pipe.transformer(**inputs)[0]
    assert decisions(pipe)[-1] == (True, False, True)
    assert torch.allclose(mixed, alone, rtol=1e-4, atol=1e-5)
    other = inputs | {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.randn(3, 3, 32)]}}
    with torch.no_grad():
        pipe.scheduler._step_index = 2
        pipe.transformer(**other)
    assert decisions(pipe)[-1] == (False, False, False)


def denoiser_inputs_with_pictures(pipe: Any, batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(8)
    pictures = [torch.randn(batch, 3, 32, generator=generator)]
    prompt = embeds(batch)
    return {
        "hidden_states": torch.randn(batch, 8 * 12, 16, generator=generator),
        "encoder_hidden_states": prompt["prompt_embeds"],
        "pooled_projections": prompt["pooled_prompt_embeds"],
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": pipe._prepare_latent_image_ids(batch, 8, 12, "cpu", torch.float32),
        "txt_ids": torch.zeros(7, 3),
        "joint_attention_kwargs": {"ip_adapter_image_embeds": pictures},
        "return_dict": False,
    }
