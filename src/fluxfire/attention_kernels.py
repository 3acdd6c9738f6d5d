"""The kernels of `kernels.attention`: attention in 8 bits for Hopper GPUs. Imported where one is about to run.

Two launches. `_prepare` (Triton) reads queries, keys and values once and writes them as 8-bit numbers with scales, in
the way the second wants them: queries with a scale for each token, keys and values with one for 128 tokens of a head;
values turned, since wgmma takes 8-bit operands with the summed index innermost alone. What all keys have in common (the
mean of 64 of them) is taken off first: softmax does not see it, and it would be most of what the scale is for.

So is what all values have in common, and it comes back at the end, since probabilities sum to one: the tensor cores cut
their sum off at some 14 bits, and one that grows with each key would come out too small (over 16,896 keys by 1.3 %). It
is the mean of every fourth, by torch: that of 64 is off by an eighth of their spread, which would add up all the same.

`_attend` (Gluon) is a flash attention of 192 queries a program, in four groups of warps: one loads blocks of 128 keys
and values by TMA, three have 64 queries each, so that one's softmax runs beside the others' products:

    S = Q K^T       int8, summed exactly in int32
    P = exp2(S c)   float32, c both scales, 1/sqrt(D) and log2(e); up to 2^8.8, so that e4m3 holds it with little loss
    O = O a + P V   e4m3, summed in wgmma's accumulator; O is in units of the block's scale of V, which goes into a

- The sum of S begins at 1.5 2^23 as float32's bits: then its bits, read as float32, are that number plus S, for
  nothing, where a conversion would take a quarter of the rate of a product.
- The registers in which wgmma leaves S are not those in which it wants P: of 8-bit numbers a lane has four other
  columns. Nothing is handed from lane to lane: each takes the columns it has for those it should have, and `_prepare`
  has put V's tokens into the same order.

Sources: that order is FlashAttention-3's (https://arxiv.org/abs/2407.08608); int8 scores, and the mean taken off the
keys, are SageAttention's (https://arxiv.org/abs/2410.02367), the values' mean is SageAttention2's
(https://arxiv.org/abs/2411.10958). Their kernels come compiled; these are Gluon's.

Shapes: B samples, L tokens, H heads of D channels; LP is L up to the next multiple of 128.
"""

# Triton brings no types, and its kernels are a language of their own.
# mypy: ignore-errors

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 has it by another name.
_by_tma = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

D = tl.constexpr(128)  # channels of a head
N = tl.constexpr(128)  # keys of a block; also the tokens of one scale of keys and values
M = tl.constexpr(64)  # queries of a group of four warps: wgmma's
G = tl.constexpr(3)  # such groups
STAGES = tl.constexpr(4)  # blocks of keys, and of values, in shared memory
ONE_AND_A_HALF = tl.constexpr(12582912.0)  # 1.5 2^23: above it float32 counts in ones
ITS_BITS = tl.constexpr(0x4B400000)
LIFT = tl.constexpr(8.8)  # 2^8.8 = 446, e4m3's largest number is 448


@triton.jit
def _tokens(x, b, h, t, stride_b, stride_l, L):
    """Tokens t of a head (T, D) in float32; zeros behind the last."""
    at = x + b.to(tl.int64) * stride_b + h * D + t[:, None].to(tl.int64) * stride_l + tl.arange(0, D)[None, :]
    return tl.load(at, mask=t[:, None] < L, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["L"])
def _prepare(
    q, k, v, q8, q_scales, k8, k_scales, v8, v_scales, v_means, L, LP,
    q_stride_b, q_stride_l, k_stride_b, k_stride_l, v_stride_b, v_stride_l, factor, H: tl.constexpr,
):  # fmt: skip
    """q8 and k8 (B H, LP, D), v8 (B H, D, LP); q_scales (B H, LP) with the factor in it, the others (B H, LP / N).

    v_means (B H, D) is read. NaN stays NaN in queries, by an infinite scale, and in values, but not in keys.
    """
    h, block, b, which = tl.program_id(0), tl.program_id(1), tl.program_id(2) // 3, tl.program_id(2) % 3
    head = b * H + h
    i = tl.arange(0, N)
    d = tl.arange(0, D)
    t = block * N + i
    if which == 2:
        # Of 16 places the ith is for the token whose column of S the lane has that gives the ith of P.
        t = block * N + ((i & -15) | ((i & 2) << 2) | ((i & 12) >> 1))
        x = _tokens(v, b, h, t, v_stride_b, v_stride_l, L) - tl.load(v_means + head * D + d)[None, :]
        x = tl.where(t[:, None] < L, x, 0.0)
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-6) / 448.0
        tl.store(v_scales + head * (LP // N) + block, scale)
        columns = (head.to(tl.int64) * D + d[:, None]) * LP + block * N + i[None, :]
        tl.store(v8 + columns, tl.trans((x * (1.0 / scale)).to(tl.float8e4nv)))
    else:  # with one end for both: two would take 172 registers instead of 128
        if which == 0:
            x = _tokens(q, b, h, t, q_stride_b, q_stride_l, L)
            scales = tl.maximum(tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1), 1e-6) / 127.0
            tl.store(q_scales + head * LP + t, scales * factor)
            x = x * (1.0 / scales)[:, None]
            out = q8
        else:
            x = _tokens(k, b, h, t, k_stride_b, k_stride_l, L)
            some = _tokens(k, b, h, (tl.arange(0, 64) * L) // 64, k_stride_b, k_stride_l, L)
            x = tl.where(t[:, None] < L, x - (tl.sum(some, 0) * (1.0 / 64))[None, :], 0.0)
            scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-6) / 127.0
            tl.store(k_scales + head * (LP // N) + block, scale)
            x = x * (1.0 / scale)
            out = k8
        rows = (head.to(tl.int64) * LP + t[:, None]) * D + d[None, :]
        tl.store(out + rows, tl.floor(x + 0.5).to(tl.int8))


@gluon.jit
def _load(q8, k8, v8, q_tiles, k_tiles, v_tiles, bars, head, block, L, LP):
    """The loading warp. `bars`: of each stage k full, k empty, v full, v empty; the last one is the queries'."""
    mbarrier.expect(bars.index(4 * STAGES), G * M * D)
    for g in gl.static_range(G):
        at = head * LP + (block * G + g) * M
        _by_tma(q8, [at, 0], bars.index(4 * STAGES), q_tiles.index(g))
    for j in range((L + N - 1) // N):
        stage = j % STAGES
        odd = (j // STAGES) & 1
        mbarrier.wait(bars.index(STAGES + stage), odd ^ 1)
        mbarrier.expect(bars.index(stage), N * D)
        _by_tma(k8, [head * LP + j * N, 0], bars.index(stage), k_tiles.index(stage))
        mbarrier.wait(bars.index(3 * STAGES + stage), odd ^ 1)
        mbarrier.expect(bars.index(2 * STAGES + stage), N * D)
        _by_tma(v8, [head * D, j * N], bars.index(2 * STAGES + stage), v_tiles.index(stage))


@gluon.jit
def _softmax(s, c, top, total, first, L, RAGGED: gl.constexpr, S_LAYOUT: gl.constexpr):
    """S as it was summed (M, N) -> P, what older sums are worth now, the largest score so far, the sum of P so far."""
    s = s.to(gl.float32, bitcast=True)
    if RAGGED:
        columns = first + gl.arange(0, N, layout=gl.SliceLayout(0, S_LAYOUT))
        s = gl.where((columns < L)[None, :], s, float("-inf"))
    new = gl.maximum(top, (gl.max(s, 1) - ONE_AND_A_HALF) * c)
    p = gl.exp2(s * c[:, None] - (ONE_AND_A_HALF * c + new - LIFT)[:, None])
    alpha = gl.exp2(top - new)
    return p, alpha, new, total * alpha + gl.sum(p, 1)


@gluon.jit
def _operand(p, O_LAYOUT: gl.constexpr):
    """P in e4m3 as wgmma's operand, in the order of `_prepare`'s values: four numbers of a lane as one of its words."""
    even, odd = gl.split(p.reshape([M, N // 32, 2, 2, 4, 2]).permute([0, 1, 2, 4, 3, 5]))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    word = gl.inline_asm_elementwise(
        "{.reg .b16 x, y; cvt.rn.satfinite.e4m3x2.f32 x, $2, $1; cvt.rn.satfinite.e4m3x2.f32 y, $4, $3; "
        "mov.b32 $0, {x, y};}",
        "=r,f,f,f,f",
        [a, b, c, d],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    a = word.to(gl.int8).to(gl.float8e4nv, bitcast=True)
    b = (word >> 8).to(gl.int8).to(gl.float8e4nv, bitcast=True)
    c = (word >> 16).to(gl.int8).to(gl.float8e4nv, bitcast=True)
    d = (word >> 24).to(gl.int8).to(gl.float8e4nv, bitcast=True)
    numbers = gl.join(gl.join(a, c), gl.join(b, d)).reshape([M, N])
    return gl.convert_layout(numbers, gl.DotOperandLayout(0, O_LAYOUT, 4))


@gluon.jit
def _multiply(
    q_scales, k_scales, v_scales, v_means, out, q_tiles, k_tiles, v_tiles, bars, head, block, L, LP,
    g: gl.constexpr, H: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 queries over all keys."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    rows = (block * G + g) * M + gl.arange(0, M, layout=gl.SliceLayout(1, S_LAYOUT))
    q_scale = gl.load(q_scales + head * LP + gl.minimum(rows, LP - 1))
    top = gl.full([M], -1e30, gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    total = gl.zeros([M], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    o = gl.zeros([M, D], gl.float32, layout=O_LAYOUT)
    k_scales += head * (LP // N)
    v_scales += head * (LP // N)
    mbarrier.wait(bars.index(4 * STAGES), 0)
    q = q_tiles.index(g)
    for j in range((L + N - 1) // N):
        stage = j % STAGES
        odd = (j // STAGES) & 1
        k_scale = gl.load(k_scales + j)
        ratio = gl.load(v_scales + gl.maximum(j - 1, 0)) / gl.load(v_scales + j)
        mbarrier.wait(bars.index(stage), odd)
        s = gl.full([M, N], ITS_BITS, gl.int32, layout=S_LAYOUT)
        s = warpgroup_mma(q, k_tiles.index(stage).permute([1, 0]), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(bars.index(STAGES + stage), count=1)
        p, alpha, top, total = _softmax(s, q_scale * k_scale, top, total, j * N, L, RAGGED, S_LAYOUT)
        p = _operand(p, O_LAYOUT)
        o = o * gl.convert_layout(alpha * ratio, gl.SliceLayout(1, O_LAYOUT))[:, None]
        mbarrier.wait(bars.index(2 * STAGES + stage), odd)
        o = warpgroup_mma(p, v_tiles.index(stage).permute([1, 0]), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(bars.index(3 * STAGES + stage), count=1)
    unit = gl.load(v_scales + (L - 1) // N) / total
    rows = (block * G + g) * M + gl.arange(0, M, layout=gl.SliceLayout(1, O_LAYOUT))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
    mean = gl.load(v_means + head * D + columns)
    o = o * gl.convert_layout(unit, gl.SliceLayout(1, O_LAYOUT))[:, None] + mean[None, :]
    at = out + ((head // H).to(gl.int64) * L + rows[:, None]) * (H * D) + (head % H) * D + columns[None, :]
    gl.store(at, o.to(out.dtype.element_ty), mask=(rows < L)[:, None])


@gluon.jit(do_not_specialize=["L"])
def _attend(
    q8, q_scales, k8, k_scales, v8, v_scales, v_means, out, L, LP, H: gl.constexpr, RAGGED: gl.constexpr
):  # fmt: skip
    block, head = gl.program_id(0), gl.program_id(1)
    q_tiles = gl.allocate_shared_memory(q8.dtype, [G, M, D], q8.layout)
    k_tiles = gl.allocate_shared_memory(k8.dtype, [STAGES, N, D], k8.layout)
    v_tiles = gl.allocate_shared_memory(v8.dtype, [STAGES, D, N], v8.layout)
    bars = gl.allocate_shared_memory(gl.int64, [4 * STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(STAGES + i), count=G)
        mbarrier.init(bars.index(2 * STAGES + i), count=1)
        mbarrier.init(bars.index(3 * STAGES + i), count=G)
    mbarrier.init(bars.index(4 * STAGES), count=1)
    fence_async_shared()
    # The first stays in the warps of the launch; then, of the others, how many warps and how many registers a thread.
    gl.warp_specialize([
        (_multiply, (q_scales, k_scales, v_scales, v_means, out, q_tiles, k_tiles, v_tiles, bars, head, block,
                     L, LP, gl.constexpr(0), H, RAGGED)),
        (_multiply, (q_scales, k_scales, v_scales, v_means, out, q_tiles, k_tiles, v_tiles, bars, head, block,
                     L, LP, gl.constexpr(1), H, RAGGED)),
        (_multiply, (q_scales, k_scales, v_scales, v_means, out, q_tiles, k_tiles, v_tiles, bars, head, block,
                     L, LP, gl.constexpr(2), H, RAGGED)),
        (_load, (q8, k8, v8, q_tiles, k_tiles, v_tiles, bars, head, block, L, LP)),
    ], [4, 4, 1], [160, 160, 24])  # fmt: skip


@cache
def _layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three (B, L, H, D), D = 128, in any floating-point type -> (B, L, H, D) in q's. On the tensors' GPU."""
    batch, length, heads, size = q.shape
    assert size == D.value and q.shape == k.shape == v.shape
    padded, all_heads, blocks = -(-length // 128) * 128, batch * heads, -(-length // 128)
    # A head's channels lie together in views too, such as those of a fused projection.
    q, k, v = (x if x.stride()[2:] == (size, 1) else x.contiguous() for x in (q, k, v))
    q8 = torch.empty((all_heads * padded, size), dtype=torch.int8, device=q.device)
    k8 = torch.empty_like(q8)
    v8 = torch.empty((all_heads * size, padded), dtype=torch.float8_e4m3fn, device=q.device)
    q_scales = torch.empty((all_heads, padded), dtype=torch.float32, device=q.device)
    k_scales = torch.empty((all_heads, blocks), dtype=torch.float32, device=q.device)
    v_scales = torch.empty_like(k_scales)
    v_means = v[:, ::4].mean(1, dtype=torch.float32).contiguous()
    out = torch.empty((batch, length, heads, size), dtype=q.dtype, device=q.device)
    with torch.cuda.device(q.device):  # Triton launches on the current one
        _prepare[(heads, blocks, 3 * batch)](
            q, k, v, q8, q_scales, k8, k_scales, v8, v_scales, v_means, length, padded,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            math.log2(math.e) / math.sqrt(size), H=heads, num_warps=8,
        )  # fmt: skip
        tiles = [TensorDescriptor.from_tensor(x, [n, 128], _layout()) for x, n in ((q8, 64), (k8, 128), (v8, 128))]
        _attend[(-(-length // 192), all_heads)](
            tiles[0], q_scales, tiles[1], k_scales, tiles[2], v_scales, v_means, out, length, padded,
            H=heads, RAGGED=length % 128 != 0, num_warps=4,
        )  # fmt: skip
    return out
