"""Linear layers whose weights are 8-bit numbers: their products, and what a layer must be to be changed at all.

Row-wise scales: each output row of a weight W (N, K) has one float32 scale, and so has each token of an input
(M, K), found anew in every call ("dynamic"). With Q the 8-bit numbers and s the scales, W = s_w Q_w, x = s_x Q_x:

    x W^T + b  =  s_x (Q_x Q_w^T) s_w^T + b

- "float8": Q in float8 e4m3, by `torch._scaled_mm`, which applies both scales inside the kernel.
- "float8-after": the same product with scales of 1 in the kernel; the true ones are applied to its output by plain
  operations, which a compiler fuses into what comes next. Kernels for one scale are faster than those for rows.
- "int8": Q in int8, by `torch._int_mm` (GPUs before Ada, CPUs); scales after it.
- "int8-weights": only the weight is int8; the product is in the model's data type.

The scales of inputs are plain operations too, for a compiler to fuse into the norm or the activation before.
Sums of rows of different layers need no care: a fused layer's weight and scales are the layers' below each other.

Shapes: M tokens of all samples, K channels in, N channels out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS: Final = ("float8", "float8-after", "int8", "int8-weights")
MULTIPLE: Final = 16  # of K and N, for the kernels
_FLOAT8_MAX: Final = torch.finfo(torch.float8_e4m3fn).max


def quantized(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, K) as 8-bit numbers with a float32 scale for each row (R, 1)."""
    limit = 127.0 if kind.startswith("int8") else _FLOAT8_MAX
    scale = (x.abs().amax(-1, keepdim=True).float() / limit).clamp_min(1e-12)
    numbers = x.float() * scale.reciprocal()
    if kind.startswith("int8"):
        return numbers.round().to(torch.int8), scale
    return numbers.to(torch.float8_e4m3fn), scale


def product(
    kind: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    one: torch.Tensor | None,
) -> torch.Tensor:
    """Tokens x (..., K) times the weight (N, K) with its scales (N, 1), in x's data type."""
    flat = x.reshape(-1, x.shape[-1])
    if kind == "int8-weights":
        out = (flat @ weight.to(x.dtype).t()).float() * scale.t()
        out = (out if bias is None else out + bias.float()).to(x.dtype)
    else:
        numbers, scales = quantized(flat, kind)
        out = multiplied(kind, numbers.contiguous(), scales, weight, scale, bias, one, x.dtype)
    return out.view(*x.shape[:-1], -1)


def multiplied(
    kind: str,
    numbers: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    one: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows quantized already, numbers (R, K) and scales (R, 1), times the weight: (R, N) in `dtype`."""
    if kind == "float8":
        return torch._scaled_mm(numbers, weight.t(), scales, scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True)
    if kind == "float8-after":
        assert one is not None
        out = torch._scaled_mm(numbers, weight.t(), one, one, out_dtype=dtype, use_fast_accum=True).float()
    else:
        rows = numbers.shape[0]
        if rows < 17:  # on CUDA the product wants more
            numbers = nn.functional.pad(numbers, (0, 0, 0, 32 - rows))
        out = torch._int_mm(numbers, weight.t())[:rows].float()
    out = out * scales * scale.t()
    return (out if bias is None else out + bias.float()).to(dtype)


class Original:
    """The layer that a quantized one stands for; no part of a graph, and none of the module tree."""

    __slots__ = ("layer",)

    def __init__(self, layer: nn.Linear | None) -> None:
        self.layer = layer

    def traced(self) -> None:
        """Graphs read nothing of it."""


class QuantizedLinear(nn.Linear):
    """A linear layer of 8-bit numbers, in the place of `original`.

    `weight` only looks like one: nan of the original's shape and data type without its memory, from which peft and
    diffusers read how an adapter must be. `state_dict` gives the original's tensors as long as there are any.
    """

    scale: torch.Tensor
    one: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, kind: str, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=False)
        del self._parameters["weight"]
        self.kind, self.dtype = kind, dtype
        self.original = Original(None)
        numbers = torch.empty(
            out_features, in_features, device="meta", dtype=torch.int8 if kind[:4] == "int8" else torch.float8_e4m3fn
        )
        self.numbers = _fixed(numbers)  # (N, K)
        self.register_parameter("scale", _fixed(torch.empty(out_features, 1, device="meta")))  # (N, 1)
        # A number on the device, for the kernel that wants one.
        self.register_parameter("one", _fixed(torch.ones((), device="meta")) if kind == "float8-after" else None)

    @classmethod
    def of(cls, original: nn.Linear, kind: str) -> QuantizedLinear:
        """In the place of this layer, whose bias it shares."""
        layer = cls(original.in_features, original.out_features, kind, original.weight.dtype)
        numbers, scale = quantized(original.weight.detach(), kind)
        layer.numbers, layer.scale, layer.bias = _fixed(numbers), _fixed(scale), original.bias
        if layer.one is not None:
            layer.one = _fixed(scale.new_ones(()))
        layer.original = Original(original)
        return layer.train(original.training)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Nan in the shape of the weight."""
        nan = torch.full((1,), torch.nan, dtype=self.dtype, device=self.numbers.device)
        return nan.expand(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        return product(self.kind, x, self.numbers, self.scale, self.bias, self.one)

    def extra_repr(self) -> str:
        """As torch's, with the kind."""
        return f"{super().extra_repr()}, kind={self.kind}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves with the model; a cast is for the bias, and for the data type in which the original comes back."""
        ours = (self.numbers, self.scale, self.one)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if any(tensor is one for one in ours) and new.dtype != tensor.dtype else new

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        save = self.original.layer._save_to_state_dict if self.original.layer else super()._save_to_state_dict
        save(destination, prefix, keep_vars)


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def obstacle(linear: Any) -> str | None:
    """What makes a layer more than a product with its weight: "<found>, needed <what>: <what to type>", or None."""
    if hasattr(linear, "base_layer"):
        return (
            f"under an adapter ({type(linear).__name__} of peft), needed the layer alone: pipe.fuse_lora() and "
            "pipe.unload_lora_weights() keep the adapter in the weights"
        )
    weight = getattr(linear, "weight", None)
    ours = isinstance(linear, QuantizedLinear)
    plain = type(linear) is nn.Linear and type(weight) is nn.Parameter and weight.dtype in DTYPES
    if not plain and not ours:
        kind = f"{type(linear).__name__} with a {type(weight).__name__} of {getattr(weight, 'dtype', None)}"
        return f"as {kind}, needed an nn.Linear with floating-point weights: load the transformer without quantization"
    if hooked(linear):
        hooks = ", ".join(getattr(vars(linear).get("_diffusers_hook"), "hooks", ())) or "a hook on the layer"
        return f"with {hooks}, which would be skipped; needed none: load the pipeline without it"
    if linear.weight.device.type == "meta":
        return "on the meta device, needed weights in memory: load the pipeline without offload"
    return None


def hooked(linear: Any) -> bool:
    """Whether calling the layer does more than its own forward: layerwise casting, an offload, a user's hook."""
    return "forward" in linear.__dict__ or bool(linear._forward_pre_hooks) or bool(linear._forward_hooks)
