"""Fused projections: no memory, no stale weight, no silent loss of an adapter, nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import attributes, make_pipe, run
from diffusers import AutoencoderTiny, FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch.overrides import TorchFunctionMode

import fluxfire
from fluxfire.fuse import FusedProjection, FusedStats, apply_fused_qkv, check_fused_qkv
from fluxfire.patches import handle_of

GROUPS = 8  # of the tiny pipeline: 2 double blocks with two each, 2 single blocks, the VAE's encoder and decoder


def stats(pipe: Any) -> FusedStats:
    handle = handle_of(pipe)
    assert handle is not None
    counts = handle.states["fused_qkv"].stats()
    assert isinstance(counts, FusedStats)
    return counts


def compiled(pipe: Any) -> fluxfire.CompileStats:
    counts = fluxfire.report(pipe).compile
    assert counts is not None
    return counts


def distance(out: torch.Tensor, baseline: torch.Tensor) -> float:
    return ((out - baseline).norm() / baseline.norm()).item()


def pictures(pipe: Any, **more: Any) -> Any:
    return run(pipe, steps=2, output_type="pt", **more)


def storage_bytes(pipe: Any) -> int:
    """Bytes of all storages that weights, and what stands in `to_qkv`, hold."""
    tensors = [*pipe.transformer.parameters(), *pipe.vae.parameters()]
    for module in (*pipe.transformer.modules(), *pipe.vae.modules()):
        for value in vars(module).values():
            if isinstance(value, FusedProjection):
                tensors += [tensor for tensor in (value.weight, value.bias) if tensor is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def add_lora(pipe: Any, seed: int = 5) -> None:
    """A LoRA on all projections of the attentions, that changes the pictures."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))


def test_pictures_are_the_same_within_rounding(pipe: Any) -> None:
    baseline = pictures(pipe)
    assert apply_fused_qkv(pipe) is pipe
    assert distance(pictures(pipe), baseline) <= 1e-5
    assert stats(pipe) == FusedStats(fused=GROUPS, unfused=0, fused_again=0, reason="")


class Products(TorchFunctionMode):
    """Counts matrix products of linear layers."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


def test_three_products_become_one(pipe: Any) -> None:
    with Products() as before:
        run(pipe, steps=2)
    apply_fused_qkv(pipe)
    with Products() as after:
        run(pipe, steps=2)
    encoder = 2 * (type(pipe).__name__ == "FluxKontextPipeline")  # of the reference picture
    assert before.count - after.count == 2 * 2 * (GROUPS - 2) + encoder


def test_fused_weights_take_no_extra_memory(pipe: Any) -> None:
    before = storage_bytes(pipe)
    apply_fused_qkv(pipe)
    assert storage_bytes(pipe) == before
    run(pipe, steps=1)
    assert storage_bytes(pipe) == before
    pipe.transformer.to(torch.float64)  # no fused tensor stays behind at once, not only from the next call on
    single = sum(weight.nbytes for weight in (*pipe.transformer.parameters(), *pipe.vae.parameters()))
    assert storage_bytes(pipe) == single


def test_state_dict_and_save_pretrained_keep_the_unfused_layout(pipe: Any, tmp_path: Any) -> None:
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    parameters = {name: id(value) for name, value in pipe.transformer.named_parameters()}
    apply_fused_qkv(pipe)
    after = pipe.transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert {name: id(value) for name, value in pipe.transformer.named_parameters()} == parameters
    for size in ("10GB", "20KB"):
        pipe.transformer.save_pretrained(tmp_path / size, max_shard_size=size)
        loaded = type(pipe.transformer).from_pretrained(tmp_path / size).state_dict()
        assert loaded.keys() == before.keys() and all(torch.equal(loaded[name], before[name]) for name in before)
    assert len(list((tmp_path / "20KB").glob("*.safetensors"))) > 2


def test_nothing_is_drawn_from_the_global_rng(pipe: Any) -> None:
    state = torch.get_rng_state()
    apply_fused_qkv(pipe)
    run(pipe, steps=1)
    pipe.transformer.to(torch.float64).to(torch.float32)
    run(pipe, steps=1)
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_changed_in_place_are_used_at_once(pipe: Any) -> None:
    apply_fused_qkv(pipe)
    before = pictures(pipe)
    with torch.no_grad():
        for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
            block.attn.to_v.weight.data.copy_(2 * block.attn.to_v.weight)
            block.attn.to_q.bias.add_(0.5)
    out = pictures(pipe)
    assert stats(pipe).fused_again == 0 and distance(out, before) > 1e-3
    fluxfire.restore_pipeline(pipe)
    assert distance(out, pictures(pipe)) <= 1e-5


def _assign(pipe: Any) -> None:
    other = make_pipe(type(pipe), seed=7)
    pipe.transformer.load_state_dict(other.transformer.state_dict(), assign=True)


def _through_float64(pipe: Any) -> None:
    pipe.transformer.to(torch.float64).to(torch.float32)


def _one_weight(pipe: Any) -> None:
    layer = pipe.transformer.single_transformer_blocks[1].attn.to_k
    layer.weight = torch.nn.Parameter(3 * layer.weight.detach())


def _one_layer(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].attn.add_v_proj = torch.nn.Linear(32, 32)


def _bias_taken_away(pipe: Any) -> None:
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.to_q.bias = attention.to_k.bias = attention.to_v.bias = None


@pytest.mark.parametrize(
    ("change", "again"),
    [(_bias_taken_away, 1), (_assign, GROUPS - 2), (_through_float64, GROUPS - 2), (_one_weight, 1), (_one_layer, 1)],
)
def test_untied_weights_are_fused_again_and_reported(pipe: Any, change: Any, again: int) -> None:
    apply_fused_qkv(pipe)
    run(pipe, steps=1)
    change(pipe)
    out = pictures(pipe)
    assert stats(pipe) == FusedStats(fused=GROUPS, unfused=0, fused_again=again, reason="")
    assert f"fused_again {again}" in str(fluxfire.report(pipe))
    fluxfire.restore_pipeline(pipe)
    assert distance(out, pictures(pipe)) <= 1e-5


def test_a_bias_added_later_is_used() -> None:
    pipe = make_pipe(FluxPipeline)
    _bias_taken_away(pipe)
    apply_fused_qkv(pipe)
    before = pictures(pipe)
    attention = pipe.transformer.transformer_blocks[0].attn
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.bias = torch.nn.Parameter(torch.full((32,), 0.5))
    assert distance(pictures(pipe), before) > 1e-4 and stats(pipe).fused_again == 1


def test_the_vaes_weights_are_looked_after_too() -> None:
    pipe = make_pipe(FluxPipeline)
    apply_fused_qkv(pipe)
    pipe.vae.load_state_dict(make_pipe(FluxPipeline, seed=7).vae.state_dict(), assign=True)
    out = pictures(pipe)
    assert stats(pipe).fused_again == 1  # the decoder; the encoder when it is called
    fluxfire.restore_pipeline(pipe)
    assert distance(out, pictures(pipe)) <= 1e-5


def test_a_lora_loaded_later_is_not_ignored(pipe: Any) -> None:
    plain = pictures(pipe)
    apply_fused_qkv(pipe)
    run(pipe, steps=1)
    add_lora(pipe)
    out = pictures(pipe)
    counts = stats(pipe)
    assert (counts.fused, counts.unfused) == (2, GROUPS - 2) and "unload_lora_weights" in counts.reason
    assert distance(out, plain) > 1e-3
    pipe.unload_lora_weights()
    assert distance(pictures(pipe), plain) <= 1e-5
    assert stats(pipe) == FusedStats(fused=GROUPS, unfused=0, fused_again=GROUPS - 2, reason="")
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(pictures(pipe), plain)
    add_lora(pipe)
    assert distance(out, pictures(pipe)) <= 1e-5


@pytest.mark.parametrize("safe_fusing", [False, True])
def test_a_lora_fused_into_the_weights_later_is_used(pipe: Any, safe_fusing: bool) -> None:
    apply_fused_qkv(pipe)
    add_lora(pipe)
    with_lora = pictures(pipe)
    pipe.fuse_lora(safe_fusing=safe_fusing)
    assert distance(pictures(pipe), with_lora) <= 1e-5
    pipe.unload_lora_weights()
    assert distance(pictures(pipe), with_lora) <= 1e-5
    assert stats(pipe).fused == GROUPS


def test_restore_under_a_lora_keeps_the_lora(pipe: Any) -> None:
    apply_fused_qkv(pipe)
    add_lora(pipe)
    with_lora = pictures(pipe)
    fluxfire.restore_pipeline(pipe)
    assert distance(pictures(pipe), with_lora) <= 1e-5
    pipe.unload_lora_weights()
    assert distance(pictures(pipe), with_lora) > 1e-3
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in pipe.transformer.parameters())


@pytest.mark.parametrize(
    ("flux_class", "compile_first_batch"),
    [
        pytest.param(FluxPipeline, 1, id="text-to-image-1"),
        pytest.param(FluxKontextPipeline, 2, id="kontext-2"),
        pytest.param(FluxPipeline, 2, id="text-to-image-2", marks=pytest.mark.slow),
        pytest.param(FluxKontextPipeline, 1, id="kontext-1", marks=pytest.mark.slow),
    ],
)
def test_compiled_graphs_stay_two(flux_class: type, compile_first_batch: int) -> None:
    torch._dynamo.reset()
    pipe = make_pipe(flux_class, blocks=(3, 4))
    baseline = run(pipe, steps=2)
    apply_fused_qkv(pipe)
    fluxfire.apply_compile(pipe, backend="eager")
    for number, batch in enumerate((compile_first_batch, 3 - compile_first_batch), start=1):
        for size in ((32, 48), (64, 32)):
            run(pipe, batch=batch, size=size, steps=2)
        assert compiled(pipe).graphs == 2 * number
    pipe.transformer.load_state_dict(copy.deepcopy(pipe.transformer.state_dict()), assign=True)
    assert distance(run(pipe, steps=2), baseline) <= 1e-5
    assert stats(pipe).fused_again == 10 and compiled(pipe).graphs == 4  # other tensors, the same graphs
    assert compiled(pipe).graph_breaks == 0


def test_the_graphs_take_the_fused_weight_as_a_static_input() -> None:
    torch._dynamo.reset()
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        seen.extend(node.meta for node in nodes if "to_qkv" in node.name and "weight" in node.name)
        return graph.forward

    pipe = make_pipe(FluxPipeline)
    apply_fused_qkv(pipe)
    for block in pipe.transformer.single_transformer_blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend)
    run(pipe, steps=1)
    assert {tuple(meta["example_value"].shape) for meta in seen} == {(96, 32)}  # numbers, no symbols
    assert {meta["tensor_dict"]["_dynamo_static_input_type"] for meta in seen} == {"unguarded"}  # CUDA graphs copy none


@pytest.mark.parametrize(
    ("flux_class", "scope"),
    [
        pytest.param(FluxKontextPipeline, "blocks", id="kontext-blocks"),
        pytest.param(FluxPipeline, "denoiser", id="text-to-image-denoiser"),
        pytest.param(FluxPipeline, "blocks", id="text-to-image-blocks", marks=pytest.mark.slow),
        pytest.param(FluxKontextPipeline, "denoiser", id="kontext-denoiser", marks=pytest.mark.slow),
    ],
)
def test_with_compilation_and_the_cache_at_0(pipe: Any, scope: str) -> None:
    torch._dynamo.reset()
    baseline = pictures(pipe)
    apply_fused_qkv(pipe)
    fluxfire.apply_compile(pipe, backend="eager", scope=scope, vae=True)
    if scope == "blocks":
        fluxfire.apply_cache(pipe, 0)
    assert distance(pictures(pipe), baseline) <= 1e-5
    assert compiled(pipe).graph_breaks == 0
    pipe.transformer.load_state_dict(copy.deepcopy(pipe.transformer.state_dict()), assign=True)
    assert distance(pictures(pipe), baseline) <= 1e-5 and stats(pipe).fused_again == GROUPS - 2
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(pictures(pipe), baseline)


@pytest.mark.slow
def test_inductors_kernels_on_fused_weights(pipe: Any) -> None:
    torch._dynamo.reset()
    baseline = run(pipe, steps=2)
    apply_fused_qkv(pipe)
    fluxfire.apply_compile(pipe)
    assert distance(run(pipe, steps=2), baseline) <= 1e-5
    add_lora(pipe)
    with_lora = run(pipe, steps=2)
    fluxfire.restore_pipeline(pipe)
    assert distance(with_lora, run(pipe, steps=2)) <= 1e-5


def test_ip_adapter_processors_use_the_product() -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipe = make_pipe(FluxPipeline)
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 24))
    tokens = [torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(9))]
    baseline = run(pipe, steps=2, joint_attention_kwargs={"ip_hidden_states": tokens})
    apply_fused_qkv(pipe)
    assert distance(run(pipe, steps=2, joint_attention_kwargs={"ip_hidden_states": tokens}), baseline) <= 1e-5
    assert distance(run(pipe, steps=2, joint_attention_kwargs={"ip_hidden_states": [2 * tokens[0]]}), baseline) > 1e-5


def test_restore_leaves_nothing_and_every_weight_its_own_tensor(pipe: Any) -> None:
    baseline = pictures(pipe)
    before = attributes(pipe)
    values = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    for _ in range(2):
        apply_fused_qkv(pipe)
        pictures(pipe)
        fluxfire.restore_pipeline(pipe)
    after = attributes(pipe)
    assert after.keys() == before.keys()
    assert [key for key in before if before[key] != after[key] and key[0] not in ("pipe", "scheduler")] == []
    assert all(torch.equal(value, values[name]) for name, value in pipe.transformer.state_dict().items())
    for module in (pipe.transformer, pipe.vae):
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in module.parameters())
        assert all(value.is_contiguous() for value in module.parameters())
        assert not module._forward_pre_hooks
    assert torch.equal(pictures(pipe), baseline)


def test_a_failure_half_way_leaves_nothing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = attributes(pipe)
    fuse, count = FusedProjection.fuse, [0]

    def fail_at_the_fourth(self: FusedProjection) -> None:
        count[0] += 1
        if count[0] == 4:
            raise torch.OutOfMemoryError
        fuse(self)

    monkeypatch.setattr(FusedProjection, "fuse", fail_at_the_fourth)
    with pytest.raises(torch.OutOfMemoryError):
        apply_fused_qkv(pipe)
    assert attributes(pipe) == before
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in pipe.transformer.parameters())


def test_class_is_untouched(pipe: Any) -> None:
    other = make_pipe(type(pipe))
    classes = (FluxAttention, type(pipe.vae.decoder.mid_block.attentions[0]), type(pipe.transformer), torch.nn.Linear)
    before = [dict(vars(cls)) for cls in classes]
    apply_fused_qkv(pipe)
    run(pipe, steps=1)
    assert [dict(vars(cls)) for cls in classes] == before
    assert not other.transformer.transformer_blocks[0].attn.fused_projections


def test_apply_in_inference_mode_and_use_outside(pipe: Any) -> None:
    baseline = pictures(pipe)
    with torch.inference_mode():
        apply_fused_qkv(pipe)
        pipe.transformer.load_state_dict(copy.deepcopy(pipe.transformer.state_dict()), assign=True)
        assert distance(pictures(pipe), baseline) <= 1e-5
    pipe.transformer.transformer_blocks[0].attn.to_q.weight.data.mul_(1)
    assert distance(pictures(pipe), baseline) <= 1e-5


def test_a_second_pipeline_may_share_the_vae() -> None:
    pipe, other = make_pipe(FluxPipeline), make_pipe(FluxPipeline, seed=3)
    other.vae = pipe.vae
    baseline = pictures(other)
    apply_fused_qkv(pipe)
    apply_fused_qkv(other)
    assert (stats(pipe).fused, stats(other).fused) == (GROUPS, GROUPS - 2)
    fluxfire.restore_pipeline(pipe)
    assert distance(pictures(other), baseline) <= 1e-5
    fluxfire.restore_pipeline(other)
    assert torch.equal(pictures(other), baseline)


def test_a_vae_without_attention_is_left_alone() -> None:
    pipe = make_pipe(FluxPipeline)
    pipe.vae = AutoencoderTiny(latent_channels=4)
    apply_fused_qkv(pipe)
    assert stats(pipe).fused == GROUPS - 2


def test_a_second_apply_is_refused(pipe: Any) -> None:
    apply_fused_qkv(pipe)
    for same in (pipe, FluxImg2ImgPipeline(**pipe.components) if isinstance(pipe, FluxPipeline) else pipe):
        with pytest.raises(fluxfire.StepError, match="applied already"):
            apply_fused_qkv(same)


def test_a_copy_is_refused_with_the_way_out(pipe: Any) -> None:
    apply_fused_qkv(pipe)
    for module in (pipe.transformer, pipe.transformer.transformer_blocks[0].attn, pipe.vae):
        with pytest.raises(fluxfire.CopyError, match="restore_pipeline"):
            copy.deepcopy(module)


def _layerwise(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def _group_offload(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def _accelerate(pipe: Any) -> None:
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(pipe.transformer, CpuOffload("cpu"))


def _hook(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks[0].attn.to_v.register_forward_hook(lambda *_: None)


def _fused_by_diffusers(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


def _quantized(pipe: Any) -> None:
    class Linear4bit(torch.nn.Linear):
        pass

    pipe.transformer.transformer_blocks[1].attn.to_q = Linear4bit(32, 32)


def _float8(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[1].attn.to_q.to(torch.float8_e4m3fn)


def _meta(pipe: Any) -> None:
    pipe.transformer.to("meta")


def _mixed(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[1].attn.to_k.to(torch.bfloat16)


REFUSALS = [
    (add_lora, "adapter.*needed.*unload_lora_weights"),
    (_layerwise, "layerwise_casting.*needed none.*load the pipeline"),
    (_group_offload, "group_offloading.*needed weights that stay.*without offload"),
    (_accelerate, "CpuOffload.*needed weights that stay.*without offload"),
    (_hook, r"single_transformer_blocks.0.attn.to_v with a hook.*needed none"),
    (_fused_by_diffusers, "fuse_qkv_projections.*load the pipeline anew"),
    (_quantized, "Linear4bit.*needed an nn.Linear.*without quantization"),
    (_float8, "float8_e4m3fn.*needed an nn.Linear"),
    (_meta, "meta device, needed weights in memory"),
    (_mixed, "differing data types.*needed one"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS)
def test_what_cannot_be_fused_is_refused_with_the_reason(pipe: Any, change: Any, reason: str) -> None:
    assert check_fused_qkv(pipe) is None
    change(pipe)
    before = attributes(pipe)
    with pytest.raises(fluxfire.StepError, match=reason):
        apply_fused_qkv(pipe)
    assert attributes(pipe) == before


@pytest.mark.parametrize("change", [_layerwise, _group_offload, _accelerate, _hook, _quantized])
def test_what_comes_later_and_cannot_be_fused_runs_unfused_and_right(pipe: Any, change: Any) -> None:
    twin = make_pipe(type(pipe))
    apply_fused_qkv(pipe)
    torch.manual_seed(4)
    change(pipe)
    torch.manual_seed(4)
    change(twin)
    assert distance(pictures(pipe), pictures(twin)) <= 1e-5
    counts = stats(pipe)
    assert counts.unfused == (1 if change in (_hook, _quantized) else GROUPS - 2) and counts.reason.startswith("found")
