"""Quantization: near the original, restored to the bit, one copy in memory, beside everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import classes
import pytest
import torch
from conftest import attributes, make_pipe, run
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import fluxfire
from fluxfire.linear import KINDS, QuantizedLinear, product, quantized
from fluxfire.structure import describe

# Its `_scaled_mm` takes one scale a tensor on a CPU, which is enough for float8-after.
needs_float8 = pytest.mark.skipif(torch.__version__ < (2, 12), reason="torch 2.11 has no row-wise float8 on a CPU")
FLOAT8 = pytest.param("float8", marks=needs_float8)


def layers(pipe: Any) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in pipe.transformer.named_modules() if isinstance(m, QuantizedLinear)}


def of_modules(pipe: Any) -> dict[tuple[str, str], int]:
    return {key: value for key, value in attributes(pipe).items() if key[0] not in ("pipe", "scheduler")}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def lora(pipe: Any) -> dict[str, torch.Tensor]:
    """For queries and outputs of the single blocks, large enough to be seen."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, torch.Tensor] = {}
    for index in range(len(pipe.transformer.single_transformer_blocks)):
        for name, channels in (("attn.to_q", 32), ("proj_out", 160)):
            key = f"transformer.single_transformer_blocks.{index}.{name}"
            found[f"{key}.lora_A.weight"] = torch.randn(2, channels, generator=generator)
            found[f"{key}.lora_B.weight"] = torch.randn(32, 2, generator=generator) * 0.1
    return found


# Of one layer with normal weights and inputs, both quantized: e4m3 has 3 bits of mantissa, int8 127 steps a row.
@pytest.mark.parametrize(
    ("kind", "error"), [pytest.param("float8", 0.04, marks=needs_float8), ("float8-after", 0.04), ("int8", 0.02)]
)
def test_a_product_is_as_exact_as_its_numbers(kind: str, error: float) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).requires_grad_(False)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(2, 5, 64)
    x[0, 0] = 0  # a row without a scale
    out = QuantizedLinear.of(linear, kind)(x)
    assert 0 < relative(out, linear(x)) < error
    numbers, scales = quantized(x.flatten(0, 1), kind)
    weight = quantized(linear.weight, kind)
    exact = (numbers.double() * scales) @ (weight[0].double() * weight[1]).t() + linear.bias
    assert relative(out.flatten(0, 1).double(), exact) < 1e-3
    assert out.shape == (2, 5, 48) and out.dtype == x.dtype and torch.equal(out[0, 0], linear.bias)


@needs_float8
def test_scales_after_the_kernel_give_what_scales_in_it_give() -> None:
    torch.manual_seed(0)
    x, (weight, scale) = torch.randn(7, 64).bfloat16(), quantized(torch.randn(48, 64).bfloat16(), "float8")
    bias, one = torch.randn(48).bfloat16(), torch.ones(())
    inside, after = (product(kind, x, weight, scale, bias, one) for kind in ("float8", "float8-after"))
    assert relative(after.float(), inside.float()) < 2**-8  # one more rounding to bfloat16


@pytest.mark.parametrize("kind", [FLOAT8, *(kind for kind in KINDS if kind != "float8")])
def test_the_blocks_products_are_quantized_and_restored_to_the_bit(pipe: Any, kind: str) -> None:
    baseline, before = run(pipe), of_modules(pipe)
    state = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    fluxfire.apply_quantization(pipe, kind)
    assert 0 < relative(run(pipe), baseline) < 0.02
    # 2 double blocks: q, k, v, out of picture and text, two MLPs of two; 2 single ones: q, k, v, MLP, out.
    assert len(layers(pipe)) == 2 * 12 + 2 * 5 and not any("norm" in name for name in layers(pipe))
    saved = pipe.transformer.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    told = dict(fluxfire.report(pipe).other)["quantization"]
    assert told.layers == 34 and 0 < told.weight_error < 0.05 and told.originals == "in host memory"
    fluxfire.restore_pipeline(pipe)
    assert of_modules(pipe) == before and torch.equal(run(pipe), baseline)


@needs_float8
@pytest.mark.parametrize("name", ["Flux2KleinPipeline", "Flux3ModularPipeline"])
def test_other_families_keep_their_modulation(name: str) -> None:
    pipe = classes.make(name)
    baseline = classes.run(pipe)
    fluxfire.apply_quantization(pipe)
    assert layers(pipe) and not any("mod" in path.rsplit(".", 2)[-2:] for path in layers(pipe))
    assert relative(classes.run(pipe), baseline) < 0.05
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(classes.run(pipe), baseline)


@needs_float8
def test_fused_projections_hold_the_8_bit_weights_once(pipe: Any) -> None:
    fluxfire.apply_quantization(pipe)
    apart = run(pipe)
    fluxfire.apply_fused_qkv(pipe)
    assert relative(run(pipe), apart) <= 1e-6
    attention = pipe.transformer.transformer_blocks[0].attn
    for fused, names in ((attention.to_qkv, "to_q to_k to_v"), (attention.to_added_qkv, "add_q_proj add_k_proj")):
        assert fused.weight.dtype == torch.float8_e4m3fn
        for part in (getattr(attention, name) for name in names.split()):
            for tensor, whole in ((part.numbers, fused.weight), (part.scale, fused.scale)):
                assert tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert dict(fluxfire.report(pipe).other)["fused_qkv"].fused == 8  # 2 in double blocks, 1 in single ones, the VAE's


@needs_float8
def test_freed_originals_leave_no_way_back_but_loading(pipe: Any, tmp_path: Path) -> None:
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    fluxfire.optimize_pipeline(pipe, quantize="float8", cache_threshold=None, compile=False)
    fluxfire.restore_pipeline(pipe)
    fluxfire.apply_quantization(pipe, keep_original=None)
    out = run(pipe)
    assert weight.numel() == 0
    with pytest.raises(fluxfire.UndoError, match=r"were freed .*load the pipeline anew"):
        fluxfire.restore_pipeline(pipe)
    with pytest.raises(fluxfire.StepError, match=r"fluxfire\.save_quantized"):
        pipe.transformer.save_pretrained(tmp_path)
    assert torch.equal(run(pipe), out)


@needs_float8
def test_compiled_by_block_all_blocks_of_a_kind_are_one_graph() -> None:
    torch._dynamo.reset()
    pipe = make_pipe(FluxPipeline)
    fluxfire.apply_quantization(pipe)
    fluxfire.apply_fused_qkv(pipe)
    eager = run(pipe)
    fluxfire.apply_compile(pipe, backend="eager", megacache=None)
    assert relative(run(pipe), eager) <= 1e-3
    run(pipe, size=(48, 32), steps=1)
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)
    fluxfire.apply_cache(pipe, 0)
    assert relative(run(pipe), eager) <= 1e-3


@needs_float8
def test_ahead_of_time_blocks_are_told_apart(pipe: Any) -> None:
    block, device = pipe.transformer.single_transformer_blocks[0], torch.device("cpu")
    found = [describe(block, device)]
    for kind in KINDS:
        fluxfire.apply_quantization(pipe, kind)
        found.append(describe(block, device))
        fluxfire.apply_fused_qkv(pipe)
        found.append(describe(block, device))
        fluxfire.restore_pipeline(pipe)
    assert all(one not in found[:index] for index, one in enumerate(found))
    assert describe(block, device) == found[0]


@needs_float8
def test_a_lora_may_come_and_go_over_it() -> None:
    pipe = make_pipe(FluxPipeline)
    baseline = run(pipe)
    fluxfire.apply_quantization(pipe)
    plain = run(pipe)
    pipe.load_lora_weights(lora(pipe))
    with_lora = run(pipe)
    assert with_lora.isfinite().all() and relative(with_lora, plain) > 1e-3
    fluxfire.restore_pipeline(pipe)  # beneath the adapter
    exact = run(pipe)
    assert relative(with_lora, exact) < 0.05 and not layers(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), baseline)
    fluxfire.apply_quantization(pipe)
    pipe.load_lora_weights(lora(pipe))
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), plain)
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


@needs_float8
def test_a_lora_before_it_stays_as_it_is() -> None:
    pipe = make_pipe(FluxPipeline)
    pipe.load_lora_weights(lora(pipe))
    baseline = run(pipe)
    fluxfire.apply_quantization(pipe)
    assert any(name.endswith("base_layer") for name in layers(pipe)) and not any(
        "lora_" in name for name in layers(pipe)
    )
    assert 0 < relative(run(pipe), baseline) < 0.05
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)


def test_moving_keeps_the_numbers_and_casting_casts_the_bias_alone() -> None:
    layer = QuantizedLinear.of(torch.nn.Linear(32, 32), "float8-after")
    weight, scale = layer.numbers.clone(), layer.scale.clone()
    layer.to(torch.bfloat16).to("cpu")
    assert layer.numbers.dtype == torch.float8_e4m3fn and torch.equal(layer.numbers.float(), weight.float())
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, scale)
    assert layer.bias.dtype == torch.bfloat16 and layer.one is not None and layer.one.dtype == torch.float32


def test_a_product_of_few_tokens_is_as_one_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's int8 product wants more than 16 rows."""
    torch.manual_seed(0)
    layer, product = QuantizedLinear.of(torch.nn.Linear(64, 48).requires_grad_(False), "int8"), torch._int_mm
    x, rows = torch.randn(40, 64), []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: rows.append(a.shape[0]) or product(a, b))
    for count in (1, 16, 17, 40):
        assert torch.equal(layer(x[:count]), layer(x)[:count])
    assert min(rows) == 17


@needs_float8
def test_weights_come_back_in_the_data_type_that_the_model_has_then() -> None:
    pipe = make_pipe(FluxPipeline)
    fluxfire.apply_quantization(pipe)
    pipe.transformer.to(torch.bfloat16)
    assert {layer.dtype for layer in layers(pipe).values()} == {torch.bfloat16}
    pipe.transformer.to(torch.float64)
    fluxfire.restore_pipeline(pipe)
    assert {weight.dtype for weight in pipe.transformer.parameters()} == {torch.float64}


@needs_float8
def test_a_failure_after_weights_were_freed_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, of = make_pipe(FluxPipeline), QuantizedLinear.of
    left = iter(range(3))

    def fails(*args: Any) -> QuantizedLinear:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no memory") from OSError("no page")
        return of(*args)

    monkeypatch.setattr(QuantizedLinear, "of", fails)
    with pytest.raises(torch.OutOfMemoryError, match="no memory") as failed:
        fluxfire.apply_quantization(pipe, keep_original=None)
    assert "quantization cannot be taken back: the weights before" in failed.value.__notes__[0]
    assert str(failed.value.__cause__) == "no page"
    with pytest.raises(fluxfire.UndoError, match="load the pipeline anew"):
        fluxfire.restore_pipeline(pipe)


@pytest.mark.parametrize("kind", [FLOAT8, "float8-after", "int8"])
def test_what_is_saved_is_loaded_and_never_quantized_again(kind: str, tmp_path: Path) -> None:
    pipe = make_pipe(FluxPipeline)
    fluxfire.apply_quantization(pipe, kind)
    fluxfire.apply_fused_qkv(pipe)
    out = run(pipe)
    fluxfire.save_quantized(pipe, tmp_path)
    assert torch.equal(run(pipe), out)
    numbers = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    on_disk = load_file(tmp_path / "quantized.safetensors")
    assert on_disk["transformer_blocks.0.attn.to_q.numbers"].dtype == numbers
    loaded = make_pipe(FluxPipeline, seed=5)
    loaded.transformer, loaded.vae = fluxfire.load_quantized(tmp_path), pipe.vae
    assert not any(parameter.is_meta for parameter in loaded.transformer.parameters())
    assert relative(run(loaded), out) <= 1e-6
    assert fluxfire.check_quantization(loaded) is not None
    fluxfire.optimize_pipeline(loaded, quantize=kind, fuse_qkv=True, cache_threshold=None, compile=False)
    assert [skip.name for skip in fluxfire.report(loaded).skips] == ["quantization"]
    assert relative(run(loaded), out) <= 1e-6
    with pytest.raises(fluxfire.StepError, match=r"save_quantized"):
        loaded.transformer.save_pretrained(tmp_path / "other")


@needs_float8
def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fluxfire.ArgumentError, match=r"found no quantized\.safetensors"):
        fluxfire.load_quantized(tmp_path)
    pipe = make_pipe(FluxPipeline)
    with pytest.raises(fluxfire.NotOptimizedError, match="apply_quantization"):
        fluxfire.save_quantized(pipe, tmp_path)
    fluxfire.apply_quantization(pipe)
    fluxfire.save_quantized(pipe, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, told in (
        ({"_class_name": "os"}, "found 'os', needed one of FluxT"),
        ({"num_layers": 1}, "no attr|other"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises((fluxfire.ArgumentError, AttributeError), match=told):
            fluxfire.load_quantized(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "quantized.safetensors")
    with pytest.raises(fluxfire.ArgumentError, match="found format None"):
        fluxfire.load_quantized(tmp_path)


def test_what_it_cannot_take_is_refused_with_what_to_do(pipe: Any) -> None:
    with pytest.raises(fluxfire.ArgumentError, match="found 'int4', needed one of 'float8'"):
        fluxfire.apply_quantization(pipe, "int4")
    with pytest.raises(fluxfire.ArgumentError, match="keep_original: found 'disk'"):
        fluxfire.apply_quantization(pipe, keep_original="disk")
    pipe.transformer = FluxTransformer2DModel.from_config(pipe.transformer.config)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert "needed" in str(fluxfire.check_quantization(pipe))
    before = of_modules(pipe)
    with pytest.raises(fluxfire.StepError, match="quantization: found"):
        fluxfire.apply_quantization(pipe)
    assert of_modules(pipe) == before


def test_a_product_that_this_machine_has_not_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0")

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    assert 'try weights="int8"' in str(fluxfire.check_quantization(pipe))
    assert fluxfire.check_quantization(pipe, "int8") is None


@needs_float8
def test_without_compilation_the_report_warns(pipe: Any) -> None:
    fluxfire.apply_quantization(pipe)
    assert "slower than bfloat16 without compilation" in str(fluxfire.report(pipe))
    fluxfire.apply_compile(pipe, backend="eager", megacache=None)
    assert "warning" not in str(fluxfire.report(pipe))
