"""Plan, apply, report, restore: nothing half-applied, nothing left behind, errors that say what to type."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from conftest import attributes, make_pipe, run
from diffusers import FluxImg2ImgPipeline, FluxPipeline

import fluxfire


def test_undo_restores_every_attribute(pipe: Any) -> None:
    baseline = run(pipe)
    before = attributes(pipe)
    tensors = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    fluxfire.apply_compile(pipe, backend="eager")
    fluxfire.apply_cache(pipe, math.inf)
    assert not torch.equal(run(pipe), baseline)
    fluxfire.restore_pipeline(pipe)
    after = attributes(pipe)
    assert after.keys() == before.keys()
    # A run sets attributes of the pipe and the scheduler itself; on every module they are the very same objects.
    assert [key for key in before if before[key] != after[key] and key[0] not in ("pipe", "scheduler")] == []
    assert all(torch.equal(value, tensors[name]) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(run(pipe), baseline)


def test_a_plan_touches_nothing(pipe: Any) -> None:
    before = attributes(pipe)
    plan = fluxfire.plan_pipeline(pipe)
    assert [step.name for step in plan.steps] == ["compile", "cache"]
    assert attributes(pipe) == before
    with pytest.raises(AttributeError):
        plan.steps = ()  # type: ignore[misc]


def test_optimize_returns_the_same_pipe_and_does_what_the_plan_says(pipe: Any) -> None:
    plan = fluxfire.plan_pipeline(pipe, cache_threshold=0.2)
    assert fluxfire.optimize_pipeline(pipe, cache_threshold=0.2) is pipe
    report = fluxfire.report(pipe)
    assert [step.name for step in report.steps] == [step.name for step in plan.steps]
    assert report.cache is not None and report.cache.threshold == 0.2


def test_dials_leave_steps_out(pipe: Any) -> None:
    nothing = {"cache_threshold": None, "compile": False, "memory_format": False}
    assert fluxfire.plan_pipeline(pipe, **nothing).steps == ()
    asked: dict[str, Any] = {"cache_threshold": 0, "compile": True, "memory_format": True, "vae_tiling": True}
    asked["fuse_qkv"] = True
    names = {"cache_threshold": "cache", "fuse_qkv": "fused_qkv"}
    for dial, value in asked.items():
        (step,) = fluxfire.plan_pipeline(pipe, **nothing | {dial: value}).steps
        assert step.name == names.get(dial, dial)
    (step,) = fluxfire.plan_pipeline(pipe, **nothing | {"compile": "max-autotune-no-cudagraphs"}).steps
    assert dict(step.settings)["mode"] == "max-autotune-no-cudagraphs"


@pytest.mark.parametrize("arguments", [{"cache_threshold": -1}, {"compile": "fast"}, {"compile": 3}])
def test_bad_arguments_change_nothing(pipe: Any, arguments: dict[str, Any]) -> None:
    before = attributes(pipe)
    with pytest.raises(fluxfire.ArgumentError, match="found"):
        fluxfire.optimize_pipeline(pipe, **arguments)
    assert attributes(pipe) == before


@pytest.mark.parametrize("thing", [None, 3, "pipe", torch.nn.Linear(2, 2)])
def test_what_is_no_flux_pipeline_is_refused_by_name(thing: Any) -> None:
    with pytest.raises(fluxfire.NotFluxError, match=type(thing).__name__):
        fluxfire.optimize_pipeline(thing)
    with pytest.raises(TypeError):
        fluxfire.apply_cache(thing)


def test_a_second_optimize_is_refused(pipe: Any) -> None:
    fluxfire.optimize_pipeline(pipe, compile=False)
    with pytest.raises(fluxfire.StepError, match="optimized already"):
        fluxfire.optimize_pipeline(pipe)


def test_a_step_that_fails_leaves_nothing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = attributes(pipe)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("fluxfire.first_block._by_name", fail)
    with pytest.raises(MemoryError):
        fluxfire.apply_cache(pipe)
    assert attributes(pipe) == before
    for compile in (True, False):
        with pytest.raises(MemoryError):
            fluxfire.optimize_pipeline(pipe, compile=compile)
        assert attributes(pipe) == before


def test_restore_without_optimize_says_so(pipe: Any) -> None:
    for ask in (fluxfire.restore_pipeline, fluxfire.report, fluxfire.cache_stats):
        with pytest.raises(fluxfire.NotOptimizedError, match="found no"):
            ask(pipe)


def test_the_mark_is_shared_by_from_pipe() -> None:
    pipe = make_pipe(FluxPipeline)
    fluxfire.apply_cache(pipe)
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(fluxfire.StepError, match="applied already"):
        fluxfire.apply_cache(other)
    fluxfire.restore_pipeline(other)
    with pytest.raises(fluxfire.NotOptimizedError):
        fluxfire.report(pipe)


def test_a_copy_of_a_patched_module_is_refused_with_the_way_out(pipe: Any) -> None:
    fluxfire.apply_cache(pipe)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(fluxfire.CopyError, match="restore_pipeline"):
            duplicate(pipe.transformer)
    fluxfire.restore_pipeline(pipe)
    copy.deepcopy(pipe.transformer)


def test_a_copy_is_refused_also_where_no_method_is_wrapped(pipe: Any) -> None:
    fluxfire.apply_memory_format(pipe)
    with pytest.raises(fluxfire.CopyError, match="restore_pipeline"):
        copy.deepcopy(pipe)


def test_restore_under_a_hook_of_accelerate(pipe: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    baseline, hook = run(pipe), Counting()
    fluxfire.optimize_pipeline(pipe, compile=False)
    add_hook_to_module(pipe.transformer, hook)
    run(pipe)
    assert hook.calls == 6
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)
    assert hook.calls == 12
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(run(pipe), baseline)


def test_restore_under_a_hook_of_diffusers(pipe: Any) -> None:
    baseline = run(pipe)
    fluxfire.optimize_pipeline(pipe, compile=False)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


def test_restore_under_a_group_offload_of_the_user(pipe: Any) -> None:
    baseline = run(pipe)
    fluxfire.optimize_pipeline(pipe, compile=False)
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)
    hooks = [
        module._diffusers_hook.hooks for module in pipe.transformer.modules() if hasattr(module, "_diffusers_hook")
    ]
    assert any("group_offloading" in names for names in hooks), "the user's offload must stay"


def test_a_foreign_wrapper_is_named_and_kept(pipe: Any) -> None:
    fluxfire.apply_cache(pipe)
    ours = pipe.transformer.forward

    def somebodys_wrapper(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    pipe.transformer.forward = somebodys_wrapper
    before = attributes(pipe)
    with pytest.raises(fluxfire.UndoError, match="somebodys_wrapper"):
        fluxfire.restore_pipeline(pipe)
    assert attributes(pipe) == before
    pipe.transformer.forward = ours
    fluxfire.restore_pipeline(pipe)


def test_undo_goes_backwards_through_attributes_and_callbacks() -> None:
    from fluxfire.patches import Patch

    module, order = torch.nn.Linear(1, 1), []
    patch = Patch()
    patch.set(module, "first", 1)
    patch.on_undo(lambda: order.append(hasattr(module, "first")))
    patch.set(module, "first", 2)
    patch.on_undo(lambda: order.append(module.first))
    patch.undo()
    assert order == [2, True]
    assert not hasattr(module, "first")


def test_save_pretrained_writes_the_same_weights(pipe: Any, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    pipe.transformer.save_pretrained(tmp_path / "before")
    fluxfire.optimize_pipeline(pipe)
    pipe.transformer.save_pretrained(tmp_path / "after")
    before, after = (load_file(p) for p in sorted(tmp_path.glob("*/*.safetensors"), reverse=True))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_report_says_first_whether_pictures_differ(pipe: Any) -> None:
    fluxfire.optimize_pipeline(pipe, compile=False)
    run(pipe)
    report = fluxfire.report(pipe)
    assert str(report).split()[:5] == ["pictures", "approximate,", "because", "of", "cache;"]
    assert "unmeasured here for FLUX.1" in str(report)
    assert "6 denoiser calls" in str(report)
    assert report._repr_html_().count("<tr>") == len(report.rows())
    assert report._repr_html_().count("<rect") == 6
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["cache"]["computed"] + report.cache.hits == 6
    fluxfire.restore_pipeline(pipe)
    fluxfire.optimize_pipeline(pipe, cache_threshold=None)
    assert "up to rounding" in str(fluxfire.report(pipe)).splitlines()[0]


def test_what_is_on_by_default_on_some_gpus_is_left_out_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(**knobs: Any) -> tuple[set[str], set[str]]:
        made = fluxfire.plan_pipeline(make_pipe(FluxPipeline), cache_threshold=None, compile=False, **knobs)
        return {step.name for step in made.steps}, {skip.name for skip in made.skips}

    assert plan() == (set(), set())
    monkeypatch.setattr("fluxfire.optimize._on_hopper", lambda pipe: True)
    ours = {"fused_qkv", "modulation_table"}  # the fused kernels need a GPU in earnest
    assert plan() == plan(strict=True) == (ours, set())
    assert plan(fuse_qkv=False, modulation=False) == (set(), set())
    assert plan(fused_kernels=True) == (ours, {"fused_kernels"})
    assert ours.isdisjoint(plan(offload="model")[0])
