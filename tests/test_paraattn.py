"""para-attn as the cache, and as the oracle: three implementations, one series of decisions, one picture.

`theirs` is para-attn's own `CachedTransformerBlocks.forward` with the walk over the blocks repaired by hand, nothing of
fluxfire in it. `backend` is `fluxfire.paraattn`, `ours` is `fluxfire.cache`.
"""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import attributes, crash_between_and_within_steps, embeds, make_pipe, run
from diffusers import Flux2Transformer2DModel, FluxKontextPipeline, FluxPipeline

import fluxfire
import fluxfire.demo
from fluxfire.paraattn import ParaAttnCache, check_paraattn

MISSING = 'para-attn is not installed: uv pip install para-attn, or, with pip<26.3, pip install "fluxfire[para-attn]"'
STEPS = 28


@pytest.fixture
def utils() -> Any:
    return pytest.importorskip("para_attn.first_block_cache.utils", reason=MISSING)


@pytest.fixture
def pipe(flux_class: type, utils: Any) -> Any:
    return make_pipe(flux_class)


def apply(pipe: Any, threshold: float) -> ParaAttnCache:
    fluxfire.apply_cache(pipe, threshold, backend="para-attn")
    return cast(ParaAttnCache, fluxfire.patches.handle_of(pipe).states["cache"])


def draw(pipe: Any, **call: Any) -> torch.Tensor:
    """Latents of one run: of the tiny random pipeline, or of the embedded model from its own prompt."""
    if pipe.text_encoder is None:
        return run(pipe, steps=STEPS, **call)
    generator = torch.Generator().manual_seed(call.pop("seed", 0))
    arguments = fluxfire.demo.call_kwargs() | {"prompt": "teapot, noto style"} | call
    latents: torch.Tensor = pipe(
        num_inference_steps=STEPS, generator=generator, output_type="latent", **arguments
    ).images
    return latents


def theirs(utils: Any, pipe: Any, threshold: float, cfg: bool = False, **call: Any) -> tuple[torch.Tensor, list[bool]]:
    """One run through para-attn's own forward; with `cfg` the two guidance branches have its two sets of buffers."""
    model, calls = pipe.transformer, [0]
    computed: set[int] = set()

    class Repaired(utils.CachedTransformerBlocks):  # type: ignore[misc]
        def call_remaining_transformer_blocks(self, hidden: Any, encoder: Any, *args: Any, **kwargs: Any) -> Any:
            computed.add(calls[0])
            out, encoder_out = hidden, encoder
            for block in (*self.transformer_blocks[1:], *self.single_transformer_blocks):
                encoder_out, out = block(out, encoder_out, *args, **kwargs)
            return out, encoder_out, out - hidden, encoder_out - encoder

    lists = model.transformer_blocks, model.single_transformer_blocks
    counter = model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    model.transformer_blocks = torch.nn.ModuleList([Repaired(*lists, return_hidden_states_first=False)])
    model.single_transformer_blocks = torch.nn.ModuleList()
    try:
        with utils.cache_context(utils.create_cache_context(residual_diff_threshold=threshold, enable_alter_cache=cfg)):
            out = draw(pipe, **call)
    finally:
        model.transformer_blocks, model.single_transformer_blocks = lists
        counter.remove()
    return out, [number not in computed for number in range(1, calls[0] + 1)]


def backend(pipe: Any, threshold: float, **call: Any) -> tuple[torch.Tensor, fluxfire.CacheStats]:
    cache = apply(pipe, threshold)
    out = draw(pipe, **call)
    fluxfire.restore_pipeline(pipe)
    return out, cache.stats()


def ours(pipe: Any, threshold: float, **call: Any) -> tuple[torch.Tensor, fluxfire.CacheStats]:
    fluxfire.apply_cache(pipe, threshold)
    out = draw(pipe, **call)
    stats = fluxfire.cache_stats(pipe)
    fluxfire.restore_pipeline(pipe)
    return out, stats


def hits(stats: fluxfire.CacheStats) -> list[bool]:
    assert all(len(set(call.hits)) == 1 for call in stats.last_run), "one decision for the batch"
    return [all(call.hits) for call in stats.last_run]


def distances(stats: fluxfire.CacheStats) -> list[float]:
    return [call.distances[0] for call in stats.last_run]


def between(pipe: Any, count: int, **call: Any) -> list[float]:
    """`count` thresholds spread over para-attn's distances in a run that computes all: some calls hit with them."""
    _, stats = backend(pipe, 1e-9, **call)
    seen = sorted(value for value in distances(stats) if math.isfinite(value))
    middles = [(a + b) / 2 for a, b in itertools.pairwise(seen)]
    return middles[:: math.ceil(len(middles) / count)]


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


CFG = {"true_cfg_scale": 3.0} | {f"negative_{name}": value for name, value in embeds(seed=6).items()}


@pytest.mark.parametrize("call", [{}, CFG], ids=["guidance embedded", "true CFG"])
def test_the_oracle_decides_and_draws_the_same(utils: Any, call: dict[str, Any]) -> None:
    pipe = make_pipe(FluxPipeline)
    mixed = 0
    for threshold in ((0.12,) if call else (0.03, 0.05, 0.08, 0.12, 0.2, 0.3)) + tuple(between(pipe, 6, **call)):
        expected, decisions = theirs(utils, pipe, threshold, cfg=bool(call), **call)
        mixed += 0 < sum(decisions) < len(decisions) - 2
        results = [backend(pipe, threshold, **call), ours(pipe, threshold, **call)]
        for out, stats in results:
            assert hits(stats) == decisions
            assert error(out, expected) < 1e-5
        assert distances(results[0][1]) == pytest.approx(distances(results[1][1]), rel=1e-5, nan_ok=True)
    assert mixed >= 5, "hits and misses must mix, or this shows little"


@pytest.mark.parametrize(
    "prompt, seed",
    [("teapot, noto style", 0), pytest.param("waffle, twemoji style", 1, marks=pytest.mark.slow)],
)
def test_the_oracle_agrees_on_the_embedded_model(utils: Any, prompt: str, seed: int) -> None:
    """Real denoising: at these thresholds hits really happen."""
    pipe = fluxfire.demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    shares = []
    for threshold in (0.03, 0.05, 0.08, 0.12, 0.2, 0.3):
        expected, decisions = theirs(utils, pipe, threshold, prompt=prompt, seed=seed)
        shares.append(sum(decisions))
        for out, stats in (f(pipe, threshold, prompt=prompt, seed=seed) for f in (backend, ours)):
            assert hits(stats) == decisions
            assert error(out, expected) < 1e-5
    assert shares == sorted(shares) and shares[0] < shares[-3] < shares[-1]


@pytest.mark.parametrize("cls, batch", [(FluxKontextPipeline, 1), (FluxPipeline, 3)], ids=["kontext", "batch of 3"])
def test_the_backend_is_para_attn_where_our_own_cache_differs(utils: Any, cls: type, batch: int) -> None:
    """A reference picture's tokens count, and a batch has one decision."""
    pipe = make_pipe(cls)
    for threshold in between(pipe, 3, batch=batch):
        expected, decisions = theirs(utils, pipe, threshold, batch=batch)
        out, stats = backend(pipe, threshold, batch=batch)
        assert hits(stats) == decisions
        assert sum(decisions) > 0
        assert error(out, expected) < 1e-5


def test_a_reference_picture_counts_in_para_attn_s_distance_and_not_in_ours(utils: Any) -> None:
    pipe = make_pipe(FluxKontextPipeline)
    theirs, own = (distances(with_cache(pipe, 1e-9)[1])[1:] for with_cache in (backend, ours))
    assert theirs != pytest.approx(own, rel=0.01)


def test_controlnet_residuals_are_in_every_call_once(utils: Any) -> None:
    """As our own cache has them; para-attn's own walk adds the first alone, after the last block."""
    pipe = make_pipe(FluxPipeline)
    generator = torch.Generator().manual_seed(4)
    samples = [torch.randn(1, 8 * 12, 32, generator=generator) for _ in range(4)]
    control = {"controlnet_block_samples": samples[:2], "controlnet_single_block_samples": samples[2:]}
    pipe.transformer.register_forward_pre_hook(lambda _m, args, kwargs: (args, kwargs | control), with_kwargs=True)
    plain = run(pipe, steps=STEPS)
    assert torch.equal(backend(pipe, 1e-9)[0], plain)
    for threshold in between(pipe, 3):
        (out, stats), (expected, own) = backend(pipe, threshold), ours(pipe, threshold)
        assert sum(hits(stats)) > 0
        assert hits(stats) == hits(own)
        assert error(out, expected) < 1e-5


def test_compiled_blocks_decide_the_same(utils: Any) -> None:
    pipe = make_pipe(FluxPipeline)
    threshold = between(pipe, 3)[1]
    expected, stats = backend(pipe, threshold)
    fluxfire.apply_compile(pipe, backend="eager")
    out, compiled = backend(pipe, threshold)
    assert hits(compiled) == hits(stats)
    assert error(out, expected) < 1e-5


def test_threshold_zero_is_bit_identical_and_can_be_changed(pipe: Any) -> None:
    baseline = run(pipe)
    cache = apply(pipe, 0)
    assert torch.equal(run(pipe), baseline)
    assert cache.stats().hits == 0
    cache.threshold = math.inf
    run(pipe)
    assert hits(cache.stats()) == [False] + [True] * 5
    assert (cache.stats().hits, cache.stats().computed) == (5, 7)


def test_a_run_starts_empty_also_after_a_crash(pipe: Any) -> None:
    cache = apply(pipe, math.inf)
    fresh = run(pipe)
    assert torch.equal(run(pipe), fresh)

    crash_between_and_within_steps(pipe, fresh)
    assert hits(cache.stats()) == [False] + [True] * 5


def test_a_call_that_failed_half_way_is_not_compared_with(pipe: Any) -> None:
    """A caller may catch the error and go on within the run: the first residual without its rest must not be used."""
    cache = apply(pipe, math.inf)
    forward, failures = pipe.transformer.forward, iter([True])

    def once_more(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except ZeroDivisionError:
            return forward(*args, **kwargs)

    last = pipe.transformer.single_transformer_blocks[-1]
    last.register_forward_pre_hook(lambda *_: 1 / 0 if next(failures, False) else None)
    pipe.transformer.forward = once_more
    run(pipe, steps=3)
    assert [(call.step, call.branch, call.hits[0]) for call in cache.stats().last_run] == [
        (0, 0, False),
        (0, 1, False),  # the second try
        (1, 0, False),
        (2, 0, True),
    ]


def test_two_pipelines_have_their_own_contexts(utils: Any) -> None:
    one, two = make_pipe(FluxPipeline, seed=0), make_pipe(FluxPipeline, seed=1)
    alone = [backend(pipe, math.inf)[0] for pipe in (one, two)]
    caches = [apply(pipe, math.inf) for pipe in (one, two)]
    inner: list[torch.Tensor] = []

    def run_the_other(_pipe: Any, step: int, _timestep: Any, _kwargs: Any) -> Any:
        if step == 3:
            inner.append(run(two, steps=STEPS))
        return {}

    outer = run(one, steps=STEPS, callback_on_step_end=run_the_other)
    assert torch.equal(outer, alone[0])
    assert torch.equal(inner[0], alone[1])
    assert [cache.stats().hits for cache in caches] == [STEPS - 1] * 2
    assert utils.get_current_cache_context() is None


def test_undo_restores_every_attribute(pipe: Any) -> None:
    baseline = run(pipe)  # diffusers itself sets an attribute in the first run
    before = attributes(pipe)
    apply(pipe, 0.3)
    assert attributes(pipe) != before
    fluxfire.restore_pipeline(pipe)
    assert attributes(pipe) == before
    apply(pipe, 0.3)
    run(pipe)
    fluxfire.restore_pipeline(pipe)
    assert attributes(pipe).keys() == before.keys()  # a run of its own makes new timesteps
    assert torch.equal(run(pipe), baseline)


def test_class_is_untouched(pipe: Any) -> None:
    classes = {type(pipe), type(pipe.scheduler), *map(type, pipe.transformer.modules())}
    before = {cls: dict(vars(cls)) for cls in classes}
    apply(pipe, 0.3)
    run(pipe, steps=2)
    assert {cls: dict(vars(cls)) for cls in classes} == before


def test_para_attn_on_the_class_is_refused(pipe: Any) -> None:
    pipe._is_cached = True  # as apply_cache_on_pipe leaves it, there on the class
    assert "apply_cache_on_pipe" in (check_paraattn(pipe) or "")


def test_a_missing_package_tells_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "para_attn", None)
    reason = check_paraattn(make_pipe(FluxPipeline)) or ""
    assert 'pip install "pip<26.3"' in reason
    assert "uv pip install para-attn" in reason


def test_flux2_is_refused() -> None:
    with torch.device("meta"):
        pipe = SimpleNamespace(transformer=Flux2Transformer2DModel(num_layers=1, num_single_layers=1))
    assert "FLUX.1 only, found FLUX.2" in (check_paraattn(pipe) or "")


@pytest.mark.parametrize("knobs", [{"warmup_steps": 2}, {"max_consecutive_hits": 3}])
def test_knobs_that_para_attn_does_not_know_are_refused(knobs: dict[str, int]) -> None:
    assert 'backend="fluxfire"' in (check_paraattn(make_pipe(FluxPipeline), **knobs) or "")
