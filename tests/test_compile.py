"""Compilation by block: one graph a kind of block, no breaks, nothing global, exact within rounding."""

from __future__ import annotations

import gc
import math
import types
from typing import Any

import classes
import pytest
import torch
from conftest import embeds, make_pipe, run
from diffusers import FluxKontextPipeline, FluxPipeline

import fluxfire
from fluxfire.run import plain_tensor

SIZES = ((32, 48), (48, 48), (64, 32), (28, 36))


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()


def compiled(pipe: Any) -> fluxfire.CompileStats:
    stats = fluxfire.report(pipe).compile
    assert stats is not None
    return stats


SLOW_FLUX1 = [  # what both classes do in the same way is shown on the longer one; on both by `scripts/test --all`
    pytest.param(FluxPipeline, id="text-to-image", marks=pytest.mark.slow),
    pytest.param(FluxKontextPipeline, id="kontext"),
]


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "with the cache"])
def test_two_graphs_serve_all_sizes_and_two_more_all_batches(flux_class: type, cached: bool) -> None:
    pipe = make_pipe(flux_class, blocks=(3, 4))
    fluxfire.apply_compile(pipe, backend="eager")
    if cached:
        fluxfire.apply_cache(pipe, 0.3)
    for size in SIZES:
        run(pipe, size=size, steps=4)
    assert compiled(pipe).graphs == 2
    for batch in (2, 3):
        for size in SIZES[:2]:
            run(pipe, size=size, steps=4, batch=batch)
    assert compiled(pipe).graphs == 4
    assert compiled(pipe).graph_breaks == 0


def test_blocks_get_inputs_of_one_form() -> None:
    x = torch.arange(24.0).view(2, 3, 4).clone()
    parameter, number = torch.nn.Parameter(x), torch.tensor(1.0)
    for kept in (x, parameter, parameter.view(24), number, None, "a", {"a": 1}):
        assert plain_tensor(kept) is kept
    odd = torch.empty_strided((1, 3, 4), (7, 4, 1)).copy_(x[:1])  # contiguous, since nothing is behind the first
    for value in (x[1:], x.view(6, 4), x.transpose(0, 1), x[:, :, 0], odd):
        (plain,) = plain_tensor((value,))
        assert plain.equal(value) and not plain._is_view()
        assert plain.stride() == torch.empty(value.shape).stride()
        assert (plain.data_ptr() == value.data_ptr()) == value.is_contiguous()
    assert plain_tensor({}) is None


def test_graphs_take_weights_activations_and_sizes(monkeypatch: pytest.MonkeyPatch, kernels_on_cpu: None) -> None:
    """CUDA graphs find the weights where they were, and copy the rest in every call; a number would be a CPU tensor."""
    taken: list[set[str]] = []

    def traced_alone(graph: Any, inputs: Any, **more: Any) -> Any:
        nodes = graph.graph.find_nodes(op="placeholder")
        tensors = [node for node in nodes if isinstance(node.meta["example_value"], torch.Tensor)]
        fixed = {node for node in tensors if "_dynamo_static_input_type" in node.meta.get("tensor_dict", ())}
        taken.append({node.target for node in tensors if node not in fixed})
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", traced_alone)
    pipe = make_pipe(blocks=(1, 1))
    fluxfire.apply_quantization(pipe, "float8")
    fluxfire.apply_fused_kernels(fluxfire.apply_fused_qkv(pipe))
    fluxfire.apply_compile(pipe, mode="reduce-overhead", megacache=None)
    fluxfire.apply_modulation_table(pipe)
    run(pipe, steps=2)
    names = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb_0", "image_rotary_emb_1")
    assert taken == [{f"L_{name}_" for name in names}] * 2


def test_a_replay_does_not_write_over_what_the_last_one_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA graphs do it: the same tensors returned in every call, and two calls a step."""

    def replayed(graph: Any, inputs: Any, **more: Any) -> Any:
        kept: list[torch.Tensor] = []

        def replay(*args: Any) -> list[torch.Tensor]:
            out = graph(*args)
            kept.extend(map(torch.empty_like, out[len(kept) :]))
            return [before.copy_(new) for before, new in zip(kept, out, strict=True)]

        return replay

    cfg = {"true_cfg_scale": 3.0} | {f"negative_{name}": value for name, value in embeds(seed=6).items()}
    pipe = make_pipe(blocks=(1, 1))
    before = run(pipe, steps=2, **cfg)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", replayed)
    fluxfire.apply_compile(pipe, mode="reduce-overhead", scope="denoiser", megacache=None)
    assert (run(pipe, steps=2, **cfg) - before).norm() <= 1e-5 * before.norm()


def test_compile_then_cache_has_no_graph_break(pipe: Any) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    fluxfire.optimize_pipeline(pipe, cache_threshold=math.inf)
    fluxfire.restore_pipeline(pipe)
    fluxfire.apply_compile(pipe, backend="eager")
    fluxfire.apply_cache(pipe, math.inf, max_consecutive_hits=1)
    run(pipe)
    assert not counters["graph_break"]
    assert [hits for (hits,) in (call.hits for call in fluxfire.cache_stats(pipe).last_run)] == [False, True] * 3
    assert compiled(pipe).graphs == 2


def test_a_threshold_changed_between_runs_compiles_nothing(pipe: Any) -> None:
    fluxfire.apply_compile(pipe, backend="eager")
    fluxfire.apply_cache(pipe, 0.3)
    run(pipe)
    for threshold in (0, 0.1, math.inf):
        fluxfire.set_cache_threshold(pipe, threshold)
        run(pipe)
    assert compiled(pipe).graphs == 2


def test_four_differing_pipelines_in_one_process() -> None:
    """torch's own limit is 8 graphs for one class; the ninth raises."""
    for number, (cls, dtype) in enumerate(
        (c, d) for c in (FluxPipeline, FluxKontextPipeline) for d in (torch.float32, torch.float64)
    ):
        pipe = make_pipe(cls, blocks=(2 + number, 2), seed=number)
        pipe.transformer.to(dtype)
        pipe.vae.to(dtype)
        fluxfire.apply_compile(pipe, backend="eager")
        for batch in (1, 2, 3):
            prompt = {name: tensor.to(dtype) for name, tensor in embeds(batch).items()}
            run(pipe, batch=batch, steps=2, **prompt)
        assert compiled(pipe).graph_breaks == 0


def test_more_graphs_than_torchs_limit_are_served() -> None:
    pipe = make_pipe(FluxPipeline, blocks=(1, 1))
    fluxfire.apply_compile(pipe, backend="eager", dynamic=False)
    sizes = [(32, width) for width in range(32, 32 + 12 * 4, 4)]
    for size in sizes:
        run(pipe, size=size, steps=1)
    assert compiled(pipe).graphs == 2 * len(sizes)


@pytest.mark.parametrize("flux_class", SLOW_FLUX1)
def test_inductor_is_exact_within_rounding(flux_class: type) -> None:
    pipe = make_pipe(flux_class)
    baseline = run(pipe)
    fluxfire.apply_compile(pipe)
    out = run(pipe)
    assert compiled(pipe).graphs == 2
    assert (out - baseline).norm() / baseline.norm() <= 1e-5
    fluxfire.apply_cache(pipe, 0)
    assert torch.equal(run(pipe), out)
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


def test_nothing_of_torchs_configuration_stays(pipe: Any) -> None:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor
    import torch.fx.experimental._config as symbolic

    def snapshot() -> list[dict[str, Any]]:
        return [module.get_config_copy() for module in (dynamo, inductor, symbolic)]

    before = snapshot()
    fluxfire.apply_compile(
        pipe, mode="max-autotune-no-cudagraphs", options={"conv_1x1_as_mm": True, "shape_padding": True}
    )
    fluxfire.restore_pipeline(pipe)
    fluxfire.apply_compile(pipe, backend="eager")
    run(pipe, steps=1)
    assert snapshot() == before


def test_mode_and_options_reach_inductor(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    real = torch.compile

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(dict(kwargs["options"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    options = {"conv_1x1_as_mm": True, "coordinate_descent_tuning": False}
    fluxfire.apply_compile(pipe, mode="max-autotune-no-cudagraphs", options=options)
    assert asked == [{"max_autotune": True, "coordinate_descent_tuning": False, "conv_1x1_as_mm": True}] * 4
    assert options == {"conv_1x1_as_mm": True, "coordinate_descent_tuning": False}


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "fastest"},
        {"options": {"no_such_option": 1}},
        {"backend": "eager", "mode": "max-autotune"},
        {"dynamic": None},
        {"scope": "vae"},
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(pipe: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(fluxfire.ArgumentError):
        fluxfire.apply_compile(pipe, **arguments)
    with pytest.raises(fluxfire.NotOptimizedError):
        fluxfire.report(pipe)


@pytest.mark.parametrize("flux_class", SLOW_FLUX1)
def test_the_whole_denoiser_is_one_graph_for_all_sizes_and_one_for_all_batches(pipe: Any) -> None:
    baseline = run(pipe, steps=2)
    fluxfire.apply_compile(pipe, backend="eager", scope="denoiser")
    assert torch.allclose(run(pipe, steps=2), baseline, rtol=1e-5, atol=1e-6)
    for size in SIZES:
        run(pipe, size=size, steps=2)
    assert compiled(pipe).graphs == 1
    for batch in (2, 3):
        run(pipe, batch=batch, steps=2)
    assert compiled(pipe).graphs == 2


def test_the_whole_denoiser_and_the_cache_are_a_conflict(pipe: Any) -> None:
    fluxfire.apply_compile(pipe, backend="eager", scope="denoiser")
    with pytest.raises(fluxfire.StepError, match='scope="blocks"'):
        fluxfire.apply_cache(pipe)


def test_the_vae_decoder_is_one_graph_for_all_sizes_tiled_or_not(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 24, 12
    baseline = [run(pipe, size=size, steps=1, output_type="pt") for size in ((32, 48), (20, 20))]
    fluxfire.apply_compile(pipe, backend="eager", vae=True)
    for size, before in zip(((32, 48), (20, 20)), baseline, strict=True):
        assert torch.allclose(run(pipe, size=size, steps=1, output_type="pt"), before, rtol=1e-5, atol=1e-5)
    assert compiled(pipe).graphs == 3
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe, size=(20, 20), steps=1, output_type="pt"), baseline[1])


def test_the_repair_of_an_upstream_bug_counts_its_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torch without the bug a broken function stands in for it; the repair itself is ours."""
    import torch._inductor.fx_passes.post_grad as post_grad

    from fluxfire.compile import SAME_META

    def broken(node1: Any, node2: Any) -> bool:
        return bool(node1.meta["val"].size() == node2.meta["val"].size())

    monkeypatch.setattr(post_grad, "same_meta", broken)
    one, two = make_pipe(seed=0), make_pipe(seed=1)
    for pipe in (one, two):
        fluxfire.apply_compile(pipe)
    assert post_grad.same_meta is not broken
    number, tensor = (types.SimpleNamespace(meta={"val": value}) for value in (1.5, torch.zeros(2)))
    assert not post_grad.same_meta(number, number) and not post_grad.same_meta(number, tensor)
    assert post_grad.same_meta(tensor, tensor)
    fluxfire.restore_pipeline(one)
    assert post_grad.same_meta is not broken
    del pipe, two  # never restored: the repair goes with the denoiser
    gc.collect()
    assert post_grad.same_meta is broken
    assert not SAME_META._holders


def test_a_torch_without_the_bug_is_left_alone(pipe: Any) -> None:
    import torch._inductor.fx_passes.post_grad as post_grad

    from fluxfire.compile import _fails_on_numbers

    if _fails_on_numbers(post_grad.same_meta):
        pytest.skip("this torch has the bug")
    before = post_grad.same_meta
    fluxfire.apply_compile(pipe)
    assert post_grad.same_meta is before


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("other", ["static_blocks", "offload"])
def test_what_cuda_graphs_do_not_go_with(mode: str, other: str) -> None:
    pipe = make_pipe(FluxPipeline)
    fluxfire.apply_compile(pipe, mode=mode, megacache=None)
    with pytest.raises(fluxfire.StepError, match=r"replays CUDA graphs.*max-autotune-no-cudagraphs"):
        fluxfire.apply_offload(pipe, "model") if other == "offload" else fluxfire.apply_static_blocks(pipe)


def test_cuda_graphs_are_refused_where_a_pipeline_keeps_what_blocks_return() -> None:
    pipe = classes.make("Flux2KleinKVPipeline")
    assert "a replay of CUDA graphs overwrites" in str(fluxfire.check_compile(pipe, mode="reduce-overhead"))
    assert fluxfire.check_compile(pipe, mode="max-autotune-no-cudagraphs") is None


KNOBS: list[dict[str, Any]] = [
    {"threshold": 0.3, "extrapolate": 2},
    {"threshold": math.inf, "max_consecutive_hits": 1},
    {"schedule": "##.#..#.", "extrapolate": 2},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_the_cache_keeps_nothing_that_a_cuda_graph_overwrites(
    monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]
) -> None:
    """Outputs of graphs are gone with the next denoiser call: here not a number, so that whoever kept one shows it."""
    import torch._inductor.compile_fx

    given: list[torch.Tensor] = []

    def replayed(graph: Any, inputs: Any, **_: Any) -> Any:
        def replay(*args: Any) -> Any:
            out = [part.clone() for part in graph(*args)]
            given.extend(out)
            return out

        return replay

    def next_call() -> None:
        with torch.no_grad():
            for tensor in given:
                tensor.fill_(math.nan)
        overwritten.append(len(given))
        given.clear()

    overwritten: list[int] = []
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", replayed)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", next_call)
    outs = []
    for graphs in (False, True):
        torch._dynamo.reset()
        pipe = make_pipe(FluxPipeline, blocks=(1, 1))
        if graphs:
            fluxfire.apply_compile(pipe, mode="reduce-overhead", megacache=None)
        fluxfire.apply_cache(pipe, **knobs)
        fluxfire.apply_modulation_table(pipe)
        outs.append((run(pipe, steps=8), run(pipe, steps=8, seed=5), fluxfire.cache_stats(pipe).marks()))
    (first, second, marks), (first_too, second_too, marks_too) = outs
    assert marks == marks_too and "." in marks and sum(overwritten) > 20
    assert (first - first_too).norm() <= 1e-5 * first.norm() and (second - second_too).norm() <= 1e-5 * second.norm()


def test_compile_after_the_cache_is_refused_with_the_order(pipe: Any) -> None:
    fluxfire.apply_cache(pipe)
    with pytest.raises(fluxfire.StepError, match="apply_compile, apply_cache"):
        fluxfire.apply_compile(pipe, backend="eager")


def test_blocks_compiled_by_others_are_refused(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")
    plan = fluxfire.plan_pipeline(pipe)
    assert [skip.name for skip in plan.skips] == ["compile", "cache"]
    assert all("compile_repeated_blocks" in skip.reason for skip in plan.skips)


def test_no_compiler_is_a_skip_with_what_to_install(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    fluxfire.optimize_pipeline(pipe)
    report = fluxfire.report(pipe)
    assert [step.name for step in report.steps] == ["cache"]
    assert "install g++" in report.skips[0].reason
    with pytest.raises(fluxfire.StepError, match="install g\\+\\+"):
        fluxfire.plan_pipeline(make_pipe(), strict=True)
