"""With what others do: hooks below and on top, other schedulers, threads, shared and replaced denoisers."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from typing import Any

import pytest
import torch
from conftest import attributes, embeds, make_pipe, run
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
)

import fluxfire
from fluxfire.patches import Wrapper


def wrappers(pipe: Any) -> list[str]:
    """Where a wrapper of fluxfire is left, on any module or in any hook's chain."""
    found = []
    for name, module in pipe.transformer.named_modules():
        holders = [module, *getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ())]
        found += [name for holder in holders for value in vars(holder).values() if isinstance(value, Wrapper)]
    return found


def decisions(pipe: Any) -> str:
    return fluxfire.cache_stats(pipe).marks()


def test_a_users_model_offload_does_not_throw_the_cache_away(pipe: Any) -> None:
    """diffusers takes its hooks off and puts them on anew after every picture."""
    pipe.enable_model_cpu_offload(device="cpu")
    baseline, before = run(pipe), attributes(pipe)
    fluxfire.optimize_pipeline(pipe, cache_threshold=1e-9, compile=False)
    for calls in (6, 12, 18):
        assert torch.equal(run(pipe), baseline)
        assert fluxfire.cache_stats(pipe).computed == calls
    assert fluxfire.report(pipe).lost == ()
    fluxfire.restore_pipeline(pipe)
    assert wrappers(pipe) == [] and attributes(pipe).keys() == before.keys()
    assert torch.equal(run(pipe), baseline)


def test_hooks_below_that_are_taken_off_leave_the_cache_on(pipe: Any) -> None:
    baseline = run(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    fluxfire.apply_cache(pipe, 1e-9)
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe), baseline)
    assert fluxfire.cache_stats(pipe).computed == 6
    fluxfire.restore_pipeline(pipe)
    assert wrappers(pipe) == []


def test_nothing_is_lost_under_all_our_steps_and_a_users_hook_between_them(pipe: Any) -> None:
    baseline = run(pipe)
    fluxfire.apply_fused_qkv(pipe)
    fluxfire.apply_compile(pipe, backend="eager")
    pipe.enable_model_cpu_offload(device="cpu")
    fluxfire.apply_cache(pipe, 1e-9)
    run(pipe)
    assert fluxfire.report(pipe).lost == () and fluxfire.cache_stats(pipe).computed == 6
    fluxfire.restore_pipeline(pipe)
    assert wrappers(pipe) == []
    assert torch.equal(run(pipe), baseline)


def test_a_wrapper_that_somebody_threw_away_is_reported_and_restore_works(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, math.inf)
    del pipe.transformer.forward
    report = fluxfire.report(pipe)
    assert report.lost == ("FluxTransformer2DModel.forward",)
    assert "not in effect any more" in str(report)
    fluxfire.restore_pipeline(pipe)
    assert wrappers(pipe) == []


@pytest.mark.parametrize("hook", ["accelerate", "layerwise casting", "group offload"])
def test_restore_takes_ours_out_from_under_a_hook_and_keeps_the_hook(pipe: Any, hook: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    baseline = run(pipe)
    fluxfire.optimize_pipeline(pipe, cache_threshold=math.inf, compile=False)
    if hook == "accelerate":
        add_hook_to_module(pipe.transformer, ModelHook())
    elif hook == "layerwise casting":
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
    else:
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    run(pipe)
    assert decisions(pipe) == "#....."
    assert wrappers(pipe)
    fluxfire.restore_pipeline(pipe)
    assert wrappers(pipe) == []
    assert torch.equal(run(pipe), baseline)
    modules = list(pipe.transformer.modules())
    assert any("_hf_hook" in vars(m) or getattr(vars(m).get("_diffusers_hook"), "hooks", None) for m in modules)


def test_our_offloads_undo_keeps_hooks_that_a_user_added_since(pipe: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    fluxfire.apply_offload(pipe, "model", device="cpu")
    users = ModelHook()
    add_hook_to_module(pipe.transformer.proj_out, users)
    fluxfire.restore_pipeline(pipe)
    assert pipe.transformer.proj_out._hf_hook is users
    assert not hasattr(pipe.transformer, "_hf_hook")


def test_a_second_pipeline_with_its_own_scheduler_is_computed_and_said_so() -> None:
    pipe = make_pipe(FluxPipeline)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other = FluxPipeline(**(pipe.components | {"scheduler": scheduler}))
    other.set_progress_bar_config(disable=True)
    prompt = embeds()
    baseline = run(other, **prompt)
    fluxfire.apply_cache(pipe, math.inf)
    run(pipe, **prompt)
    for _ in range(2):
        assert torch.equal(run(other, **prompt), baseline)
    stats = fluxfire.cache_stats(pipe)
    assert (stats.hits, stats.outside) == (5, 12)
    assert "12 denoiser calls outside" in str(fluxfire.report(pipe))
    run(pipe, **prompt)
    assert decisions(pipe) == "#....."


def test_threads_on_one_denoiser_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pipelines around one denoiser, in two threads, step by step in turns: each gets its own picture."""
    pipe = make_pipe(FluxPipeline)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other = FluxPipeline(**(pipe.components | {"scheduler": scheduler}))
    other.set_progress_bar_config(disable=True)
    prompt, results = embeds(), {}
    fluxfire.apply_cache(pipe, 1e-9)
    expected = {name: run(p, seed=seed, **prompt) for name, p, seed in (("one", pipe, 5), ("two", other, 6))}
    turns = threading.Barrier(2, timeout=60)

    def work(name: str, mine: Any, seed: int) -> None:
        def wait(_pipe: Any, _step: int, _timestep: Any, kwargs: Any) -> Any:
            turns.wait()
            return {}

        results[name] = run(mine, seed=seed, callback_on_step_end=wait, **prompt)

    threads = [threading.Thread(target=work, args=job) for job in (("one", pipe, 5), ("two", other, 6))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def loop(pipe: Any, scheduler: Any, steps: int) -> torch.Tensor:
    """A hand-written denoising loop over the scheduler's timesteps."""
    prompt = embeds()
    latents = torch.randn(1, 8 * 12, 16, generator=torch.Generator().manual_seed(1))
    ids = pipe._prepare_latent_image_ids(1, 8, 12, "cpu", torch.float32)
    with torch.no_grad():
        for t in scheduler.timesteps[:steps]:
            velocity = pipe.transformer(
                hidden_states=latents,
                timestep=t.expand(1) / 1000,
                guidance=torch.full((1,), 3.5),
                pooled_projections=prompt["pooled_prompt_embeds"],
                encoder_hidden_states=prompt["prompt_embeds"],
                txt_ids=torch.zeros(7, 3),
                img_ids=ids,
                return_dict=False,
            )[0]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def test_a_schedule_that_is_used_again_begins_a_new_run() -> None:
    pipe = make_pipe(FluxPipeline)
    fluxfire.apply_cache(pipe, math.inf)
    prompt = embeds()
    pipe.scheduler.set_timesteps(4, mu=1.0)
    kwargs = {"hidden_states": torch.randn(1, 96, 16), "timestep": torch.ones(1), "guidance": torch.ones(1)}
    kwargs |= {"pooled_projections": prompt["pooled_prompt_embeds"], "encoder_hidden_states": prompt["prompt_embeds"]}
    kwargs |= {"txt_ids": torch.zeros(7, 3), "img_ids": pipe._prepare_latent_image_ids(1, 8, 12, "cpu", torch.float32)}
    marks = []
    with torch.no_grad():
        for _ in range(2):
            for step in (None, 1, 2, 3):
                pipe.scheduler._step_index = step
                pipe.transformer(**kwargs)
            marks.append(decisions(pipe))
    assert marks == ["#...", "#..."]


def test_heun_calls_twice_a_step_and_is_followed() -> None:
    pipe = make_pipe(FluxPipeline)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    pipe.scheduler.set_timesteps(4)
    baseline = loop(pipe, pipe.scheduler, 7)
    fluxfire.apply_cache(pipe, 1e-9)
    pipe.scheduler.set_timesteps(4)
    assert torch.equal(loop(pipe, pipe.scheduler, 7), baseline)
    calls = fluxfire.cache_stats(pipe).last_run
    assert [(call.step, call.branch) for call in calls] == [(step, 0) for step in range(7)]


def test_a_scheduler_with_flow_sigmas_is_followed() -> None:
    pipe = make_pipe(FluxPipeline)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    baseline = run(pipe)
    fluxfire.apply_cache(pipe, 1e-9)
    assert torch.equal(run(pipe), baseline)
    fluxfire.set_cache_threshold(pipe, math.inf)
    run(pipe)
    assert decisions(pipe) == "#....."


def test_a_threshold_of_zero_in_mid_run_leaves_nothing_to_compare_with(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, math.inf)

    def change(_pipe: Any, step: int, _timestep: Any, _kwargs: Any) -> Any:
        fluxfire.set_cache_threshold(pipe, 0 if step in (1, 2) else math.inf)
        return {}

    run(pipe, steps=7, callback_on_step_end=change)
    assert decisions(pipe) == "#.###.."


def test_a_replaced_denoiser_is_a_pipeline_of_its_own() -> None:
    pipe, second = make_pipe(FluxPipeline, seed=0), make_pipe(FluxPipeline, seed=1)
    optimized = pipe.transformer
    fluxfire.apply_cache(pipe, math.inf)
    pipe.transformer = second.transformer
    with pytest.raises(fluxfire.NotOptimizedError):
        fluxfire.report(pipe)
    fluxfire.apply_cache(pipe, 0)
    pipe.transformer = optimized
    assert fluxfire.cache_stats(pipe).threshold == math.inf


def test_the_denoiser_does_not_keep_its_first_pipeline_alive() -> None:
    pipe = make_pipe(FluxPipeline)
    other = FluxPipeline.from_pipe(pipe)
    fluxfire.apply_cache(pipe, math.inf)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    other.set_progress_bar_config(disable=True)
    run(other, steps=3)
    assert decisions(other) == "#.."


def test_a_plan_of_an_optimized_pipeline_says_so(pipe: Any) -> None:
    fluxfire.optimize_pipeline(pipe, compile=False)
    plan = fluxfire.plan_pipeline(pipe)
    assert plan.steps == ()
    assert all("applied already" in skip.reason for skip in plan.skips)
    with pytest.raises(fluxfire.StepError, match="optimized already"):
        fluxfire.optimize_pipeline(pipe, strict=True)


@pytest.mark.parametrize("ask", [fluxfire.report, fluxfire.restore_pipeline, fluxfire.cache_stats])
def test_questions_about_what_is_no_pipeline_are_refused(ask: Any) -> None:
    with pytest.raises(fluxfire.NotFluxError, match="int"):
        ask(3)


def test_a_report_at_threshold_zero_is_not_approximate(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, 0)
    assert "up to rounding" in str(fluxfire.report(pipe)).splitlines()[0]
    fluxfire.set_cache_threshold(pipe, 0.5)
    assert "threshold=0.5" in str(fluxfire.report(pipe))


@pytest.mark.parametrize("inside", ["layerwise casting", "leaf-level offload", "accelerate's hook"])
def test_compile_refuses_blocks_with_hooks_inside(pipe: Any, inside: str) -> None:
    if inside == "layerwise casting":
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    elif inside == "leaf-level offload":
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    else:
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(pipe.transformer.transformer_blocks[0].attn.to_q, ModelHook())
    assert "hook" in (fluxfire.check_compile(pipe) or "").lower()
    assert [skip.name for skip in fluxfire.plan_pipeline(pipe, cache_threshold=None).skips] == ["compile"]


@pytest.mark.parametrize(
    "arguments",
    [{"backend": "nope"}, {"backend": None}, {"options": {"shape_padding": "yes"}}, {"options": ["x"]}, {"vae": "no"}],
)
def test_more_bad_arguments_of_compile_are_refused(pipe: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(fluxfire.ArgumentError, match="found"):
        fluxfire.apply_compile(pipe, **arguments)
    assert wrappers(pipe) == []


def test_the_repair_of_an_upstream_bug_is_not_put_back_over_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.fx_passes.post_grad as post_grad

    def broken(node1: Any, node2: Any) -> bool:
        return bool(node1.meta["val"].size() == node2.meta["val"].size())

    monkeypatch.setattr(post_grad, "same_meta", broken)
    pipe = make_pipe(FluxPipeline)
    fluxfire.apply_compile(pipe)

    def users(node1: Any, node2: Any) -> bool:
        return False

    post_grad.same_meta = users
    fluxfire.restore_pipeline(pipe)
    assert post_grad.same_meta is users


def test_fused_projections_follow_a_layer_that_was_parametrized_since() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    pipe = make_pipe(FluxPipeline)
    baseline = run(pipe)
    fluxfire.apply_fused_qkv(pipe)
    weight_norm(pipe.transformer.transformer_blocks[0].attn.to_q)
    assert torch.allclose(run(pipe), baseline, rtol=1e-4, atol=1e-5)
