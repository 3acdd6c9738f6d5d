"""Tiny FLUX.1 pipelines as people load them, and with what others put on them: `NEIGHBOURS`, by name.

Every one is made by the library that people use. bitsandbytes alone is put in place here: diffusers loads with it on
GPUs only, so its layers are put where diffusers puts them, with diffusers' own function, and quantized on the CPU.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from conftest import make_pipe
from diffusers import FluxPipeline, FluxTransformer2DModel


def make() -> Any:
    """Blocks of one kind alone: half the time to trace."""
    return make_pipe(FluxPipeline, blocks=(0, 2))


def loaded(load: Callable[[Path], Any]) -> Callable[[], Any]:
    """A pipeline whose transformer comes from `load(folder)`, where diffusers saved a plain one."""

    def with_transformer() -> Any:
        pipe = make()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            pipe.transformer.save_pretrained(folder)
            pipe.transformer = load(Path(folder)).eval()
        return pipe

    return with_transformer


def gguf_q8(folder: Path) -> Any:
    import gguf

    q8 = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(folder / "flux.gguf", "flux")
    for name, tensor in FluxTransformer2DModel.from_pretrained(folder).state_dict().items():
        if name.endswith("weight") and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    more = {"config": str(folder), "quantization_config": config, "torch_dtype": torch.float32}
    return FluxTransformer2DModel.from_single_file(str(folder / "flux.gguf"), **more)


def quanto_int8(folder: Path) -> Any:
    config = diffusers.QuantoConfig(weights_dtype="int8")
    return FluxTransformer2DModel.from_pretrained(folder, quantization_config=config)


def torchao_int8(folder: Path) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    return FluxTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)


def nf4(folder: Path) -> Any:
    import bitsandbytes as bnb
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    # NF4 works in blocks of 64 weights: 64 channels, and what has fewer stays as it is.
    sizes = {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    plain = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder) | sizes)
    quantized = copy.deepcopy(plain)
    kept = ["proj_out", "x_embedder", "context_embedder", "time_text_embed"]
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    replace_with_bnb_linear(quantized, modules_to_not_convert=kept, quantization_config=config)
    for name, layer in quantized.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            given = plain.get_submodule(name)
            layer.weight = bnb.nn.Params4bit(given.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            layer.bias = given.bias
    return quantized


def layerwise(folder: Path) -> Any:
    transformer = FluxTransformer2DModel.from_pretrained(folder)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return transformer


def changed(change: Callable[[Any], object]) -> Callable[[], Any]:
    def with_change() -> Any:
        pipe = make()
        change(pipe)
        return pipe

    return with_change


def optimized_module(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compiled_forward(pipe: Any) -> None:
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend="eager")


def lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(1)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))


def fused_lora(pipe: Any) -> None:
    lora(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def flow_unipc(pipe: Any) -> None:
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


CPU = torch.device("cpu")

NEIGHBOURS: dict[str, Callable[[], Any]] = {
    "GGUF, Q8_0": loaded(gguf_q8),
    "bitsandbytes, NF4": loaded(nf4),
    "quanto, int8": loaded(quanto_int8),
    "torchao, int8 weights": loaded(torchao_int8),
    "layerwise casting to float8": loaded(layerwise),
    "torch.compile(pipe.transformer)": changed(optimized_module),
    "pipe.transformer.compile()": changed(lambda pipe: pipe.transformer.compile(backend="eager")),
    "pipe.transformer.forward compiled": changed(compiled_forward),
    "compile_repeated_blocks": changed(lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager")),
    "diffusers' first-block cache": changed(
        lambda pipe: pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    ),
    "a LoRA": changed(lora),
    "a LoRA fused into the weights": changed(fused_lora),
    "diffusers' fuse_qkv_projections": changed(lambda pipe: pipe.transformer.fuse_qkv_projections()),
    "enable_model_cpu_offload": changed(lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "enable_group_offload, by blocks": changed(
        lambda pipe: pipe.transformer.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
    ),
    "enable_group_offload, by leaves": changed(
        lambda pipe: pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")
    ),
    "UniPC with flow sigmas": changed(flow_unipc),
}
