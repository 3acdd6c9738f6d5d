"""What stands between a FLUX.1 block's products, each as one pass over its rows: functions, and what they compute.

Inductor reads a row again for each reduction over it and computes a GELU twice where its row is quantized. Here a row
is read once, stays in registers, and is written where the next product or the attention reads it:

- `norm`: residual + gate * output, LayerNorm, modulation, and the row as float8, its scale found on the way. A single
  block's text and image tokens are read where they are, and never joined before.
- `norm_rope`: RMSNorm of queries and keys, rotation; text and image tokens of a double block joined on the way.
- `quantize`: a row as float8; the attention's output and the GELU of the MLP's as one row, never joined before.
- `linear_gelu`: the GELU inside of the product's kernel (cuBLASLt's epilogue, in the tanh form that FLUX.1 has).

Everything is in float32 between reading and writing, so rounded once. One more is approximate, and by choice:

- `attention`: its two products in 8 bits (`attention_kernels.py`).

On a GPU these are Triton kernels (`triton_kernels.py`); on any other device, and for comparison, the functions named
`plain_*`, of torch's operations.

Shapes: B samples, T text tokens, L image tokens, R rows (tokens of all samples), K channels, H heads of D channels.
"""

from __future__ import annotations

import math
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from fluxfire.linear import quantized

# Where rows are quantized: numbers (B, L, K) in float8, scales (B L, 1).
Rows = tuple[Tensor, Tensor]

PARTS: Final = ("norm", "rope", "quantize", "gelu")
OPTIONAL: Final = ("attention",)  # approximate
_BLOCK: Final = 128  # keys, and tokens of one scale of keys and values


def norm(
    x: Tensor,  # (B, L, K)
    scale: Tensor,  # (B, K), as shift and gate
    shift: Tensor,
    eps: float,
    *,
    text: Tensor | None = None,  # (B, T, K): rows before those of x
    out: Tensor | None = None,  # (B, L, K), as x
    gate: Tensor | None = None,
    float8: bool = False,
) -> tuple[Tensor, Tensor | Rows]:
    """The sum x + gate * out, and LayerNorm(that) * (1 + scale) + shift, as it is or quantized."""
    if not x.is_cuda:
        return plain_norm(x, scale, shift, eps, text=text, out=out, gate=gate, float8=float8)
    x, text = x.contiguous(), None if text is None else text.contiguous()  # views, behind a block of diffusers
    new, y, scales = _launched(torch.ops.fluxfire.norm, x.device, text, x, out, gate, scale, shift, eps, float8)
    return x if out is None else new, (y, scales) if float8 else y


def plain_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    *,
    text: Tensor | None = None,
    out: Tensor | None = None,
    gate: Tensor | None = None,
    float8: bool = False,
) -> tuple[Tensor, Tensor | Rows]:
    """`norm` in torch's operations."""
    rows = (x if text is None else torch.cat([text, x], dim=1)).float()
    if out is not None and gate is not None:
        rows = rows + gate[:, None].float() * out.float()
    y = nn.functional.layer_norm(rows, rows.shape[-1:], eps=eps)
    y = y * (1 + scale[:, None].float()) + shift[:, None].float()
    return x if out is None else rows.to(x.dtype), _quantized(y) if float8 else y.to(x.dtype)


def norm_rope(
    qkv: tuple[Tensor, Tensor, Tensor],  # each (B, L, H, D)
    weights: tuple[Tensor, Tensor],  # of q and of k, (D,)
    rotary: tuple[Tensor, Tensor],  # cosines and sines (T + L, D)
    eps: float,
    text: tuple[Tensor, Tensor, Tensor] | None = None,  # each (B, T, H, D)
    text_weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and rotation of q and k; text's tokens before the image's: each (B, T + L, H, D)."""
    if not qkv[0].is_cuda:
        return plain_norm_rope(qkv, weights, rotary, eps, text, text_weights)
    more, rotary = text or (None, None, None), (rotary[0].contiguous(), rotary[1].contiguous())
    arguments = (*qkv, *more, *weights, *(text_weights or (None, None)), *rotary, eps)
    q, k, v = _launched(torch.ops.fluxfire.norm_rope, qkv[0].device, *arguments)
    return q, k, qkv[2] if text is None else v


def plain_norm_rope(
    qkv: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    eps: float,
    text: tuple[Tensor, Tensor, Tensor] | None = None,
    text_weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_rope` in torch's operations."""
    q, k, v = qkv
    parts = [_rms_norm(q, weights[0], eps), _rms_norm(k, weights[1], eps)]
    if text is not None and text_weights is not None:
        before = [_rms_norm(x, weight, eps) for x, weight in zip(text, text_weights, strict=False)]
        parts = [torch.cat(two, dim=1) for two in zip(before, parts, strict=True)]
        v = torch.cat([text[2], v], dim=1)
    cos, sin = (table[None, :, None].float() for table in rotary)
    turned = []
    for x in parts:
        even, odd = x[..., 0::2], x[..., 1::2]
        turned.append((x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin).to(q.dtype))
    return turned[0], turned[1], v


def quantize(x: Tensor | None, mlp: Tensor | None = None, *, start: int = 0, length: int | None = None) -> Rows:
    """Rows `start` to `start + length` of every sample of x (B, ., K), each with the GELU of its row of mlp behind it.

    mlp is (B, length, M); one of the two may be None.
    """
    given = cast(Tensor, mlp if x is None else x)
    length = given.shape[1] if length is None else length
    if not given.is_cuda:
        return plain_quantize(x, mlp, start=start, length=length)
    x, mlp = (None if part is None else part.contiguous() for part in (x, mlp))
    return cast(Rows, _launched(torch.ops.fluxfire.quantize, given.device, x, mlp, start, length))


def plain_quantize(x: Tensor | None, mlp: Tensor | None = None, *, start: int = 0, length: int | None = None) -> Rows:
    """`quantize` in torch's operations."""
    parts = []
    if x is not None:
        parts.append(x[:, start : start + (x.shape[1] if length is None else length)].float())
    if mlp is not None:
        parts.append(nn.functional.gelu(mlp.float(), approximate="tanh"))
    return _quantized(torch.cat(parts, dim=-1))


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """GELU(x W^T + b), in the tanh form: (B, L, K) -> (B, L, N)."""
    if not x.is_cuda or layer.bias is None:  # on a CPU this operator has the other form of GELU
        return plain_linear_gelu(x, layer)
    out = torch._addmm_activation(layer.bias, x.flatten(0, 1), layer.weight.t(), use_gelu=True)
    return out.view(*x.shape[:2], -1)


def plain_linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """`linear_gelu` in torch's operations."""
    return nn.functional.gelu(layer(x), approximate="tanh")


@torch.library.custom_op("fluxfire::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with scores of int8 and the rest in float8 e4m3: three (B, L, H, D) -> one, contiguous. Approximate.

    An operator, so that graphs take it as it is, on every device; on a GPU D is 128.
    """
    if not q.is_cuda:
        return plain_attention(q, k, v)
    from fluxfire.attention_kernels import attention

    return attention(q, k, v)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` in torch's operations, with the same 8-bit numbers in float32; any D up to 1024."""
    length = q.shape[1]
    k_mean = k[:, torch.arange(64, device=k.device) * length // 64].float().mean(1, keepdim=True)
    v_mean = v[:, ::4].float().mean(1, keepdim=True)
    q8, q_scale = _int8(q.float().transpose(1, 2), -1)
    q_scale = q_scale * (math.log2(math.e) / math.sqrt(q.shape[-1]))
    total, out = torch.zeros_like(q_scale), torch.zeros_like(q8)
    top = torch.full_like(q_scale, -math.inf)
    for start in range(0, length, _BLOCK):  # as a kernel does: P is rounded for the largest score so far
        keys, values = (x[:, start : start + _BLOCK].float().transpose(1, 2) for x in (k - k_mean, v - v_mean))
        k8, k_scale = _int8(keys, (-2, -1))
        v_scale = values.abs().amax((-2, -1), keepdim=True).clamp_min(1e-6) / 448.0
        v8 = (values / v_scale).to(torch.float8_e4m3fn).float()
        scores = q8 @ k8.transpose(-2, -1) * (q_scale * k_scale)
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        p, alpha = torch.exp2(scores - new + 8.8), torch.exp2(top - new)
        total = total * alpha + p.sum(-1, keepdim=True)
        out = out * alpha + p.to(torch.float8_e4m3fn).float() @ v8 * v_scale
        top = new
    return ((out / total).transpose(1, 2) + v_mean).to(q.dtype).contiguous()


def _int8(x: Tensor, dims: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Whole numbers of int8's range, and their scales, one for these dimensions."""
    scale = x.abs().amax(dims, keepdim=True).clamp_min(1e-6) / 127.0
    return torch.floor(x / scale + 0.5), scale


def _launched(operator: Any, device: torch.device, *arguments: Any) -> Any:
    """Calls an operator of Triton, which launches on the current device; a graph sees to its device itself."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch.cuda.device(device):
        return operator(*arguments)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()


def _quantized(x: Tensor) -> Rows:
    numbers, scales = quantized(x.flatten(0, -2), "float8")
    return numbers.view(x.shape), scales
