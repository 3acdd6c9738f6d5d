"""The Triton kernels of `kernels.py`, as operators that inductor takes into its graphs. Imported where there is a GPU.

One program makes one row. A row of K numbers is kept in registers as three thirds of N, a power of two: FLUX.1's rows
of 3072 and 12288 are three times 1024 and 4096, so that no lane idles. Sizes of a row are constants of a kernel,
numbers of tokens are not: one kernel for all pictures. Nothing is tuned when it runs. Rows are multiples of 16 numbers,
as far as Triton can see: then it reads and writes 16 bytes at once.

Shapes: B samples, T text tokens, L image tokens, R rows (tokens of all samples), K channels, H heads of D channels.
"""

# Triton brings no types, and its kernels are a language of their own.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def _third(row, i: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    at = i * N + tl.arange(0, N)
    return tl.load(row + at, mask=at < K, other=0.0).to(tl.float32)


@triton.jit
def _row(row, K: tl.constexpr, N: tl.constexpr):
    return _third(row, 0, K, N), _third(row, 1, K, N), _third(row, 2, K, N)


@triton.jit
def _third_of_two(a, b, is_a, is_b, i: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    at = i * N + tl.arange(0, N)
    x = tl.load(a + at, mask=(at < K) & is_a, other=0.0)
    return x.to(tl.float32) + tl.load(b + at, mask=(at < K) & is_b, other=0.0).to(tl.float32)


@triton.jit
def _store_third(row, x, i: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    at = i * N + tl.arange(0, N)
    tl.store(row + at, x.to(row.dtype.element_ty), mask=at < K)


@triton.jit
def _store(row, x0, x1, x2, K: tl.constexpr, N: tl.constexpr):
    _store_third(row, x0, 0, K, N)
    _store_third(row, x1, 1, K, N)
    _store_third(row, x2, 2, K, N)


@triton.jit
def _amax(x0, x1, x2):
    return tl.max(tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.abs(x2)), 0)


@triton.jit
def _float8_scale(amax):
    return tl.maximum(amax / 448.0, 1e-12)


@triton.jit
def _gelu(x):
    """The tanh form, x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)); the exponential in base 2."""
    return x / (1.0 + tl.exp2(-2.3022081985 * x * (1.0 + 0.044715 * x * x)))


@triton.jit
def _layer_norm(x0, x1, x2, eps: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    mean = tl.sum(x0 + x1 + x2, 0) / K
    x0 = tl.where(at < K, x0 - mean, 0.0)
    x1 = tl.where(N + at < K, x1 - mean, 0.0)
    x2 = tl.where(2 * N + at < K, x2 - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x0 * x0 + x1 * x1 + x2 * x2, 0) / K + eps)
    return x0 * rstd, x1 * rstd, x2 * rstd


@triton.jit
def _norm_kernel(
    text, x, out, gate, scale, shift, summed, y, scales, T, L, gate_stride, scale_stride, shift_stride,
    eps: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    TEXT: tl.constexpr, RESIDUAL: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // (T + L)
    token = row - sample * (T + L)
    if TEXT:
        a, b = text + (sample * T + token) * K, x + (sample * L + token - T) * K
        x0 = _third_of_two(a, b, token < T, token >= T, 0, K, N)
        x1 = _third_of_two(a, b, token < T, token >= T, 1, K, N)
        x2 = _third_of_two(a, b, token < T, token >= T, 2, K, N)
    else:
        x0, x1, x2 = _row(x + row * K, K, N)
    if RESIDUAL:
        g0, g1, g2 = _row(gate + tl.multiple_of(sample * gate_stride, 16), K, N)
        o0, o1, o2 = _row(out + row * K, K, N)
        x0, x1, x2 = x0 + g0 * o0, x1 + g1 * o1, x2 + g2 * o2
        _store(summed + row * K, x0, x1, x2, K, N)
    x0, x1, x2 = _layer_norm(x0, x1, x2, eps, K, N)
    s0, s1, s2 = _row(scale + tl.multiple_of(sample * scale_stride, 16), K, N)
    h0, h1, h2 = _row(shift + tl.multiple_of(sample * shift_stride, 16), K, N)
    x0, x1, x2 = x0 * (1.0 + s0) + h0, x1 * (1.0 + s1) + h1, x2 * (1.0 + s2) + h2
    if FLOAT8:
        s8 = _float8_scale(_amax(x0, x1, x2))
        tl.store(scales + row, s8)
        x0, x1, x2 = x0 * (1.0 / s8), x1 * (1.0 / s8), x2 * (1.0 / s8)
    _store(y + row * K, x0, x1, x2, K, N)


@triton_op("fluxfire::norm", mutates_args=())
def norm(
    text: Tensor | None, x: Tensor, out: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor,
    eps: float, float8: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`kernels.norm`: (x + gate out, or nothing; the normed rows, numbers of float8 if wanted; their scales)."""
    batch, length, channels = x.shape
    before = 0 if text is None else text.shape[1]
    rows = batch * (before + length)
    summed = x.new_empty(0) if out is None else torch.empty_like(x)
    kind = torch.float8_e4m3fn if float8 else x.dtype
    y = torch.empty((batch, before + length, channels), dtype=kind, device=x.device)
    scales = torch.empty((rows if float8 else 0, 1), dtype=torch.float32, device=x.device)
    # What is absent is not read: anything may stand for it.
    wrap_triton(_norm_kernel)[(rows,)](
        x if text is None else text, x, x if out is None else out, scale if gate is None else gate, scale, shift,
        summed, y, scales, before, length,
        scale.stride(0) if gate is None else gate.stride(0), scale.stride(0), shift.stride(0),
        eps=eps, K=channels, N=triton.next_power_of_2(triton.cdiv(channels, 3)),
        TEXT=text is not None, RESIDUAL=out is not None, FLOAT8=float8, num_warps=4,
    )  # fmt: skip
    return summed, y, scales


@triton.jit
def _quantize_kernel(
    x, mlp, numbers, scales, start, length, total,
    K: tl.constexpr, N: tl.constexpr, M: tl.constexpr, P: tl.constexpr, X: tl.constexpr, MLP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // length
    out = numbers + row * (K + M)
    amax = 0.0
    if X:
        x0, x1, x2 = _row(x + (sample * total + start + row - sample * length) * K, K, N)
        amax = _amax(x0, x1, x2)
    if MLP:
        m0, m1, m2 = _row(mlp + row * M, M, P)
        m0, m1, m2 = _gelu(m0), _gelu(m1), _gelu(m2)
        amax = tl.maximum(amax, _amax(m0, m1, m2))
    s8 = _float8_scale(amax)
    tl.store(scales + row, s8)
    if X:
        _store(out, x0 * (1.0 / s8), x1 * (1.0 / s8), x2 * (1.0 / s8), K, N)
    if MLP:
        _store(out + K, m0 * (1.0 / s8), m1 * (1.0 / s8), m2 * (1.0 / s8), M, P)


@triton_op("fluxfire::quantize", mutates_args=())
def quantize(x: Tensor | None, mlp: Tensor | None, start: int, length: int) -> tuple[Tensor, Tensor]:
    """`kernels.quantize`: numbers (B, length, K + M), scales (B length, 1)."""
    given = x if x is not None else mlp
    batch, total = given.shape[:2]
    k, m = 0 if x is None else x.shape[2], 0 if mlp is None else mlp.shape[2]
    numbers = torch.empty((batch, length, k + m), dtype=torch.float8_e4m3fn, device=given.device)
    scales = torch.empty((batch * length, 1), dtype=torch.float32, device=given.device)
    wrap_triton(_quantize_kernel)[(batch * length,)](
        given, given if mlp is None else mlp, numbers, scales, start, length, total,
        K=k, N=triton.next_power_of_2(triton.cdiv(max(k, 3), 3)),
        M=m, P=triton.next_power_of_2(triton.cdiv(max(m, 3), 3)),
        X=x is not None, MLP=mlp is not None, num_warps=8 if m else 4,
    )  # fmt: skip
    return numbers, scales


@triton.jit
def _head(row, at):
    return tl.load(row + at).to(tl.float32)


@triton.jit
def _heads(row, at, here):
    return tl.load(row + at, mask=here, other=0.0)


@triton.jit
def _normed(x, weight, eps: tl.constexpr, D: tl.constexpr):
    """RMSNorm of heads (HB, D)."""
    return x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * weight[None, :]


@triton.jit
def _rotated(x, c0, c1, s0, s1, HB: tl.constexpr, D: tl.constexpr):
    """Pairs of channels (2i, 2i + 1) of heads (HB, D) turned by a token's angles."""
    a, b = tl.split(tl.reshape(x, (HB, D // 2, 2)))
    even = a * c0[None, :] - b * s0[None, :]
    odd = b * c1[None, :] + a * s1[None, :]
    return tl.reshape(tl.join(even, odd), (HB, D))


@triton.jit
def _rope_kernel(
    q, k, v, q_text, k_text, v_text, q_weight, k_weight, q_text_weight, k_text_weight, cos, sin,
    q_out, k_out, v_out, T, L, stride: tl.constexpr, text_stride: tl.constexpr,
    eps: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, D: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // (T + L)
    token = row - sample * (T + L)
    d = tl.arange(0, D)
    head = tl.arange(0, HB)[:, None]
    at = head * D + d[None, :]
    here = head < H
    c0, c1 = tl.split(tl.reshape(_head(cos + token * D, d), (D // 2, 2)))
    s0, s1 = tl.split(tl.reshape(_head(sin + token * D, d), (D // 2, 2)))
    i = (sample * L + token - T) * stride
    if TEXT:
        is_text = here & (token < T)
        is_image = here & (token >= T)
        t = (sample * T + token) * text_stride
        wq = _head(q_text_weight if token < T else q_weight, d)
        wk = _head(k_text_weight if token < T else k_weight, d)
        xq = _heads(q + i, at, is_image).to(tl.float32) + _heads(q_text + t, at, is_text).to(tl.float32)
        xk = _heads(k + i, at, is_image).to(tl.float32) + _heads(k_text + t, at, is_text).to(tl.float32)
        xv = _heads(v + i, at, is_image) + _heads(v_text + t, at, is_text)
        tl.store(v_out + row * (H * D) + at, xv, mask=here)
    else:
        wq = _head(q_weight, d)
        wk = _head(k_weight, d)
        xq = _heads(q + i, at, here).to(tl.float32)
        xk = _heads(k + i, at, here).to(tl.float32)
    yq = _rotated(_normed(xq, wq, eps, D), c0, c1, s0, s1, HB, D)
    tl.store(q_out + row * (H * D) + at, yq.to(q_out.dtype.element_ty), mask=here)
    yk = _rotated(_normed(xk, wk, eps, D), c0, c1, s0, s1, HB, D)
    tl.store(k_out + row * (H * D) + at, yk.to(k_out.dtype.element_ty), mask=here)


@triton_op("fluxfire::norm_rope", mutates_args=())
def norm_rope(
    q: Tensor, k: Tensor, v: Tensor, q_text: Tensor | None, k_text: Tensor | None, v_text: Tensor | None,
    q_weight: Tensor, k_weight: Tensor, q_text_weight: Tensor | None, k_text_weight: Tensor | None,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`kernels.norm_rope`: q and k of all tokens (B, T + L, H, D), and v where there is text."""
    batch, length, heads, size = q.shape
    text = q_text is not None
    before = q_text.shape[1] if text else 0
    shape = (batch, before + length, heads, size)
    q_out = torch.empty(shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(shape, dtype=q.dtype, device=q.device)
    v_out = torch.empty(shape if text else (0,), dtype=q.dtype, device=q.device)
    wrap_triton(_rope_kernel)[(batch * (before + length),)](
        q, k, v, q_text if text else q, k_text if text else k, v_text if text else v,
        q_weight, k_weight, q_text_weight if text else q_weight, k_text_weight if text else k_weight,
        cos, sin, q_out, k_out, v_out, before, length,
        stride=q.stride(1), text_stride=q_text.stride(1) if text else q.stride(1),
        eps=eps, H=heads, HB=triton.next_power_of_2(heads), D=size, TEXT=text, num_warps=8,
    )  # fmt: skip
    return q_out, k_out, v_out
