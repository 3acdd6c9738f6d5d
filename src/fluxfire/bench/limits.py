"""How fast a denoising step could be on this machine: its matrix products, its attention, what must move, no more.

limit = sum over linears of (FLOPs / rate of that shape) + attention FLOPs / its rate + bytes / copy rate

- **Linears**: every `nn.Linear` of the denoiser with its rows, counted by one pass on the meta device. Each distinct
  shape is measured alone in the model's data type, with bias; its inputs, weights and output move within that time.
- **Attention**: 4 x batch x heads x (text + image tokens)^2 x head size FLOPs a block, at the rate of the fastest of
  torch's own kernels (cuDNN, flash, memory-efficient, math) at that shape.
- **Bytes**, with S the size of one (batch x tokens, channels) tensor in the model's data type. Between matrix
  products, what no kernel of torch's does inside of one is read once and written once:
    - normalize and modulate: read and write S; once in a single block, twice in a double block
    - RMS norm and rotary embedding of queries and keys: read and write 2 S
    - gate and add to the residual stream: read the product and the stream, write the stream, 3 S; once in a single
      block, twice in a double block
  That is 9 S for a single and 14 S for a double block. Not counted, since they can be done inside a product or
  attention: GELU, bias, concatenating, splitting, casting.

It is a limit for the model's data type: float8 products can be below it. A cached step's limit is the same for the
first block and what stands around the blocks, plus the cache's own moves over the image tokens: read 2 and write 1 for
the first residual, read 2 for its distance, read 2 and write 1 for adding the kept rest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxfire.bench.timing import median_seconds

_DOUBLE_PASSES, _SINGLE_PASSES, _CACHE_PASSES = 14, 9, 8


@dataclass(frozen=True, slots=True)
class Counts:
    """What one denoiser call has to do."""

    linears: tuple[tuple[tuple[int, int, int], int], ...]  # ((rows, outputs, inputs), how many)
    attentions: int
    attention_shape: tuple[int, int, int, int]  # batch, heads, tokens, head size
    passes_bytes: int

    @property
    def linear_flops(self) -> int:
        """2 x rows x outputs x inputs each."""
        return sum(2 * rows * outputs * inputs * count for (rows, outputs, inputs), count in self.linears)

    @property
    def attention_flops(self) -> int:
        """Two products of tokens x tokens x head size for each head."""
        batch, heads, tokens, size = self.attention_shape
        return 4 * batch * heads * tokens * tokens * size * self.attentions

    @property
    def weight_elements(self) -> int:
        """Elements of all weights that the call reads."""
        return sum(outputs * inputs * count for (_, outputs, inputs), count in self.linears)


def count(config: dict[str, Any], batch: int, tokens: tuple[int, int], itemsize: int) -> Counts:
    """Counts one call of `FluxTransformer2DModel(**config)`.

    Args:
        config: the model's arguments.
        batch: samples.
        tokens: text and image tokens of a sample.
        itemsize: bytes of an element.
    """
    import diffusers

    linears: Counter[tuple[int, int, int]] = Counter()

    def record(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].numel() // module.in_features
        linears[rows, module.out_features, module.in_features] += 1

    with torch.device("meta"):
        model: Any = diffusers.FluxTransformer2DModel(**config)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(record)
        of, (text, image) = model.config, tokens
        model(
            hidden_states=torch.empty(batch, image, of.in_channels),
            encoder_hidden_states=torch.empty(batch, text, of.joint_attention_dim),
            pooled_projections=torch.empty(batch, of.pooled_projection_dim),
            timestep=torch.empty(batch),
            guidance=torch.empty(batch) if of.guidance_embeds else None,
            img_ids=torch.empty(image, 3),
            txt_ids=torch.empty(text, 3),
        )
    stream = batch * (text + image) * of.num_attention_heads * of.attention_head_dim * itemsize
    passes = of.num_layers * _DOUBLE_PASSES + of.num_single_layers * _SINGLE_PASSES
    shape = (batch, of.num_attention_heads, text + image, of.attention_head_dim)
    return Counts(tuple(linears.items()), of.num_layers + of.num_single_layers, shape, passes * stream)


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit of a computed and of a cached step, in ms, and what it was made of."""

    computed_ms: float
    cached_ms: float
    linear_ms: float
    attention_ms: float
    passes_ms: float
    linear_tflop: float
    attention_tflop: float
    passes_gb: float
    weights_gb: float
    gemm_tflop_s: float  # over all linears of the step
    attention_tflop_s: float
    attention_kernel: str
    copy_gb_s: float  # read and written

    def describe(self) -> str:
        """The sum in words."""
        return (
            f"{self.linear_tflop:.4g} TFLOP of linears at {self.gemm_tflop_s:.4g} TFLOP/s + {self.attention_tflop:.4g} "
            f"TFLOP of attention at {self.attention_tflop_s:.4g} TFLOP/s ({self.attention_kernel}) + "
            f"{self.passes_gb:.4g} GB moved at {self.copy_gb_s:.4g} GB/s = "
            f"{self.linear_ms:.4g} + {self.attention_ms:.4g} + {self.passes_ms:.4g} ms"
        )


def measure(
    config: dict[str, Any], batch: int, tokens: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Limit:
    """Measures the machine at this workload's shapes. Under two seconds on an H100."""
    of = count(config, batch, tokens, dtype.itemsize)
    first = count(config | {"num_layers": 1, "num_single_layers": 0}, batch, tokens, dtype.itemsize)
    shapes = {shape for shape, _ in (*of.linears, *first.linears)}
    linear_s = {shape: _linear_seconds(shape, device, dtype) for shape in shapes}
    attention_s, kernel = _attention_seconds(of.attention_shape, device, dtype)
    rate = _copy_rate(device)
    total_linear_s = sum(linear_s[shape] * times for shape, times in of.linears)
    total_attention_s, passes_s = attention_s * of.attentions, of.passes_bytes / rate
    image = first.passes_bytes / _DOUBLE_PASSES * tokens[1] / sum(tokens)
    cached_s = sum(linear_s[shape] * times for shape, times in first.linears) + attention_s
    cached_s += (first.passes_bytes + _CACHE_PASSES * image) / rate
    return Limit(
        computed_ms=(total_linear_s + total_attention_s + passes_s) * 1e3,
        cached_ms=cached_s * 1e3,
        linear_ms=total_linear_s * 1e3,
        attention_ms=total_attention_s * 1e3,
        passes_ms=passes_s * 1e3,
        linear_tflop=of.linear_flops / 1e12,
        attention_tflop=of.attention_flops / 1e12,
        passes_gb=of.passes_bytes / 1e9,
        weights_gb=of.weight_elements * dtype.itemsize / 1e9,
        gemm_tflop_s=of.linear_flops / total_linear_s / 1e12,
        attention_tflop_s=of.attention_flops / total_attention_s / 1e12,
        attention_kernel=kernel,
        copy_gb_s=rate / 1e9,
    )


def _linear_seconds(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    rows, outputs, inputs = shape
    at: dict[str, Any] = {"device": device, "dtype": dtype}
    x, weight, bias = torch.randn(rows, inputs, **at), torch.randn(outputs, inputs, **at), torch.randn(outputs, **at)
    return median_seconds(device, lambda: torch.nn.functional.linear(x, weight, bias))


def _attention_seconds(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Of the fastest kernel that takes this shape, with its name."""
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    on_gpu = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    kernels = on_gpu if device.type == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    times = {}
    for kernel in kernels:
        try:
            with sdpa_kernel(kernel):
                work = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)  # noqa: E731
                times[kernel.name.lower()] = median_seconds(device, work)
        except RuntimeError:  # this kernel does not take this shape, data type or machine
            continue
    name = min(times, key=times.__getitem__)
    return times[name], name


def _copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(device, lambda: target.copy_(source))
