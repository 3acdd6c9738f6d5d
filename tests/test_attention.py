"""The attention backend: on this pipeline's processors alone, in the graphs' and artifacts' keys."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import classes
import pytest
import torch
from conftest import attributes, make_pipe, run
from diffusers import FluxPipeline
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import fluxfire
from fluxfire import attention, fa4
from fluxfire.cache import borrowed_cache
from fluxfire.structure import describe

ON_CPU = ("auto", "native", "flash", "math")


def processors(pipe: Any) -> list[Any]:
    return list(pipe.transformer.attn_processors.values())


def backends(pipe: Any) -> set[str]:
    return {str(getattr(one._attention_backend, "value", None)) for one in processors(pipe)}


def test_a_first_call_within_a_borrowed_cache_leaves_the_backend_on(pipe: Any) -> None:
    fluxfire.apply_attention(pipe, "math")
    with borrowed_cache(pipe):  # as `tune` does: what is patched meanwhile is taken back
        run(pipe)
    run(pipe)
    assert backends(pipe) == {"_native_math"}
    fluxfire.restore_pipeline(pipe)
    assert backends(pipe) == {"None"}


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_backend_is_on_all_processors_and_goes_again(pipe: Any, backend: str) -> None:
    baseline, before = run(pipe), attributes(pipe)
    fluxfire.apply_attention(pipe, backend)
    out = run(pipe)
    assert (out - baseline).norm() <= 1e-5 * baseline.norm()
    wanted = "native" if backend == "auto" else backend
    assert backends(pipe) == {attention.BACKENDS[wanted]}
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    told = dict(fluxfire.report(pipe).other)["attention"]
    assert told.backend == wanted and bool(told.why) == (backend == "auto")
    fluxfire.restore_pipeline(pipe)
    assert {key: value for key, value in attributes(pipe).items() if key[0] not in ("pipe", "scheduler")} == {
        key: value for key, value in before.items() if key[0] not in ("pipe", "scheduler")
    }
    assert backends(pipe) == {"None"} and torch.equal(run(pipe), baseline)


@pytest.mark.parametrize("name", ["Flux2KleinKVPipeline", "Flux3ModularPipeline"])
def test_other_families_have_processors_of_their_own(name: str) -> None:
    pipe = classes.make(name)
    classes.run(pipe)
    fluxfire.apply_attention(pipe, "math")
    classes.run(pipe)
    found = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    assert found and {one._attention_backend for one in found} == {AttentionBackendName._NATIVE_MATH}


def test_a_processor_that_comes_later_gets_the_backend_too(pipe: Any) -> None:
    fluxfire.apply_attention(pipe, "math")
    run(pipe, steps=1)
    late = FluxAttnProcessor()
    pipe.transformer.single_transformer_blocks[0].attn.set_processor(late)
    run(pipe, steps=1)
    assert late._attention_backend == AttentionBackendName._NATIVE_MATH
    fluxfire.restore_pipeline(pipe)
    assert late._attention_backend is None


def test_a_graph_for_each_backend_and_two_pipelines_side_by_side() -> None:
    torch._dynamo.reset()
    one, other = make_pipe(FluxPipeline), make_pipe(FluxPipeline)
    baseline = run(one)
    for pipe, backend in ((one, "math"), (other, "flash")):
        fluxfire.apply_attention(pipe, backend)
        fluxfire.apply_compile(pipe, backend="eager", megacache=None)
        assert (run(pipe) - baseline).norm() <= 1e-5 * baseline.norm()
        graphs = fluxfire.report(pipe).compile
        assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)
    assert (backends(one), backends(other)) == ({"_native_math"}, {"_native_flash"})


def test_ahead_of_time_blocks_are_told_apart_by_backend(pipe: Any) -> None:
    block, device = pipe.transformer.transformer_blocks[0], torch.device("cpu")
    plain = describe(block, device)
    fluxfire.apply_attention(pipe, "math")
    run(pipe, steps=1)
    assert describe(block, device) != plain
    fluxfire.restore_pipeline(pipe)
    assert describe(block, device) == plain


def test_another_flash_attention_is_active_only_while_the_denoiser_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, active = make_pipe(FluxPipeline), torch.nn.attention.current_flash_attention_impl
    removed: list[bool] = []

    class Handle:
        def remove(self) -> None:
            removed.append(True)

    torch.nn.attention.register_flash_attention_impl("FLUXTEST", register_fn=Handle)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "fa3", ("FLUXTEST", "torch.nn", ""))
    fluxfire.apply_attention(pipe, "fa3")
    seen: list[str | None] = []
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: seen.append(active()))
    assert active() is None
    run(pipe, steps=2)
    assert seen == ["FLUXTEST"] * 2 and active() is None and len(removed) == 3  # one was the check's
    block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(pipe, steps=2)
    assert active() is None


@pytest.mark.filterwarnings("ignore:.*verrid:UserWarning")  # torch's, of the kernels that FlashAttention-4 replaces
def test_torch_gets_two_results_of_flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which newer ones give more; torch's own shim, which runs without a GPU, takes them from fluxfire.fa4."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> tuple[Any, ...]:
        assert settings["return_lse"] and settings["softmax_scale"] == 0.5
        return q + k + v, q[..., 0], None, None, None

    fake = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=lambda *args: args)
    monkeypatch.setitem(sys.modules, fa4.INTERFACE, fake)
    fa4.register()
    before = torch.nn.attention.current_flash_attention_impl()
    q = torch.ones(1, 4, 2, 8)
    with attention._implementation("fa4"):
        assert torch.nn.attention.current_flash_attention_impl() == fa4.NAME
        from torch.nn.attention import _fa4

        given = dict.fromkeys(inspect.signature(_fa4._fa4_run_forward).parameters)  # torch's versions differ
        out, lse = _fa4._fa4_run_forward(**given | {"query": q, "key": q, "value": q, "scale": 0.5, "is_causal": False})
    assert torch.equal(out, 3 * q) and torch.equal(lse, q[..., 0])
    assert torch.nn.attention.current_flash_attention_impl() == before
    assert fa4._flash_attn_bwd(q, q) == (q, q)


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("fa3", "no flash_attn_interface, .* build it"),
        ("fa4", "no flash_attn.*: pip install --pre flash-attn-4"),
        ("sage", 'pip install "sageattention'),
        ("cudnn", '2 heads of 16 channels in torch.float32 on cpu .*: use backend="auto"'),
    ],
)
def test_what_is_not_here_is_refused_with_what_to_type(pipe: Any, backend: str, told: str) -> None:
    before = attributes(pipe)
    with pytest.raises(fluxfire.StepError, match=told):
        fluxfire.apply_attention(pipe, backend)
    assert attributes(pipe) == before
    assert [skip.name for skip in fluxfire.plan_pipeline(pipe, attention=backend, compile=False).skips] == ["attention"]


def test_an_unknown_backend_is_no_argument(pipe: Any) -> None:
    with pytest.raises(fluxfire.ArgumentError, match="found 'fast', needed \"auto\" or one of 'native', 'cudnn'"):
        fluxfire.apply_attention(pipe, "fast")


def test_sage_makes_the_report_say_approximate(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_missing", lambda backend: None)
    monkeypatch.setattr(attention, "_attend", lambda backend, qkv: qkv[0])
    fluxfire.optimize_pipeline(pipe, attention="sage", compile=False, cache_threshold=None)
    assert str(fluxfire.report(pipe)).startswith("pictures   approximate, because of attention")


def test_sage_is_one_operator_in_graphs_and_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipe(FluxPipeline, blocks=(1, 1))
    calls: list[str] = []

    def sageattn(q: Any, k: Any, v: Any, tensor_layout: str, **settings: Any) -> Any:
        torch._dynamo.graph_break()  # as the real one's torch.cuda.set_device
        calls.append(tensor_layout)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr(attention_dispatch, "sageattn", sageattn)
    monkeypatch.setattr(attention, "_missing", lambda backend: None)
    torch._dynamo.reset()
    baseline = run(pipe, steps=2)
    fluxfire.apply_attention(pipe, "sage")
    fluxfire.apply_compile(pipe, backend="eager", megacache=None)
    calls.clear()
    assert (run(pipe, steps=2) - baseline).norm() <= 1e-5 * baseline.norm()
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)
    assert calls == ["NHD"] * 2 * len(processors(pipe))
    # Called with more than the operator has, it is SageAttention's own.
    q = torch.randn(1, 8, 2, 16)
    assert attention_dispatch.sageattn(q, q, q, tensor_layout="NHD", is_causal=True).shape == q.shape
    fluxfire.restore_pipeline(pipe)
    assert attention_dispatch.sageattn is sageattn and torch.equal(run(pipe, steps=2), baseline)


def test_auto_takes_the_fastest_that_is_exact_and_clearly_faster() -> None:
    errors = {"native": 1e-3, "cudnn": 1.05e-3, "flash": 1e-3, "fa3": 5e-3}
    assert attention.choose({"native": 1.0, "cudnn": 0.9, "flash": 0.8, "fa3": 0.5}, errors) == "flash"
    assert attention.choose({"native": 1.0, "cudnn": 0.98}, errors) == "native"
    assert attention.choose({"native": 1.0, "fa3": 0.5}, errors) == "native"


def test_the_measurement_leaves_out_what_does_not_run() -> None:
    state = torch.get_rng_state()
    times, errors = attention.measure(
        (1, 40, 2, 16), torch.device("cpu"), torch.float32, ("native", "flash", "cudnn", "fa4")
    )
    assert times.keys() == errors.keys() == {"native", "flash"}
    assert max(errors.values()) < 1e-5 and min(times.values()) > 0
    assert torch.equal(torch.get_rng_state(), state)
