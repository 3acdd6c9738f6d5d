"""FLUX.1's two kinds of blocks written out in the operations of `kernels.py`; the step is `fused_kernels.py`.

The classes have the modules and weights of diffusers' and no state but some attributes that the step sets: a block
becomes one by its `__class__`. What a block is called with that is not written out here (no rotation, arguments for
attention processors, float16, gradients) goes to diffusers' own forward, as does a block that is `plain`.

Shapes: B samples, T text tokens, L image tokens, D channels, M of the MLP.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

import fluxfire.kernels as kernels
from fluxfire.kernels import Rows
from fluxfire.linear import QuantizedLinear, multiplied

if torch.cuda.is_available():  # here, as an artifact's loading imports what was traced, and no more
    import fluxfire.triton_kernels  # noqa: F401  (registers the operators)

DTYPES: Final = (torch.bfloat16, torch.float32)

Three = tuple[Tensor, Tensor, Tensor]

# By these names: Dynamo takes no method from these two classes, which diffusers allows in graphs whole.
_single, _double = FluxSingleTransformerBlock.forward, FluxTransformerBlock.forward


class FusedSingleBlock(FluxSingleTransformerBlock):
    """A single block: attention and MLP side by side over text and image tokens."""

    plain: bool  # whether diffusers' forward is to run
    parts: tuple[str, ...]  # of `kernels.PARTS`, `OPTIONAL`; what is not among them is left to torch's operations
    float8: bool  # whether its layers take rows of float8

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, T, D) -> text and image tokens after the block."""
        x, text = hidden_states, encoder_hidden_states
        attn: Any = self.attn
        if image_rotary_emb is None or joint_attention_kwargs or self.plain or _not_ours(x):
            return _single(self, x, text, temb, image_rotary_emb, joint_attention_kwargs)
        shift, scale, gate = _modulation(self.norm, temb, 3)
        norm = kernels.norm if "norm" in self.parts else kernels.plain_norm
        rope = kernels.norm_rope if "rope" in self.parts else kernels.plain_norm_rope
        _, rows = norm(x, scale, shift, self.norm.norm.eps, text=text, float8=self.float8)
        qkv = _heads(attn, _three(attn, "to_qkv", ("to_q", "to_k", "to_v"), rows, x.dtype))
        weights = (attn.norm_q.weight, attn.norm_k.weight)
        attended = _attended(self, *rope(qkv, weights, image_rotary_emb, attn.norm_q.eps))
        if not isinstance(rows, Tensor):
            quantize = kernels.quantize if "quantize" in self.parts else kernels.plain_quantize
            out = _linear(self.proj_out, quantize(attended, _linear(self.proj_mlp, rows, x.dtype)), x.dtype)
        elif "gelu" in self.parts and type(self.proj_out) is nn.Linear:
            # Two products along K, so that nothing is joined; their sum is in the pass that adds the residual.
            activated, weight = kernels.linear_gelu(rows, self.proj_mlp), self.proj_out.weight
            size = attended.shape[-1]
            out = nn.functional.linear(attended, weight[:, :size], self.proj_out.bias).float()
            out = out + nn.functional.linear(activated, weight[:, size:])
        else:
            activated = nn.functional.gelu(self.proj_mlp(rows), approximate="tanh")
            out = self.proj_out(torch.cat([attended, activated], dim=2))
        delta, tokens = gate[:, None].float() * out, text.shape[1]
        return (text + delta[:, :tokens]).to(x.dtype), (x + delta[:, tokens:]).to(x.dtype)


class FusedBlock(FluxTransformerBlock):
    """A double block: text and image tokens with weights of their own, joined in the attention."""

    plain: bool
    parts: tuple[str, ...]
    float8: bool

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, T, D) -> text and image tokens after the block."""
        x, text = hidden_states, encoder_hidden_states
        attn: Any = self.attn
        if image_rotary_emb is None or joint_attention_kwargs or self.plain or _not_ours(x):
            return _double(self, x, text, temb, image_rotary_emb, joint_attention_kwargs)
        image_mod = _modulation(self.norm1, temb, 6)  # shift, scale, gate, and those of the MLP
        text_mod = _modulation(self.norm1_context, temb, 6)
        norm = kernels.norm if "norm" in self.parts else kernels.plain_norm
        rope = kernels.norm_rope if "rope" in self.parts else kernels.plain_norm_rope
        _, rows = norm(x, image_mod[1], image_mod[0], self.norm1.norm.eps, float8=self.float8)
        _, text_rows = norm(text, text_mod[1], text_mod[0], self.norm1_context.norm.eps, float8=self.float8)
        qkv = _heads(attn, _three(attn, "to_qkv", ("to_q", "to_k", "to_v"), rows, x.dtype))
        names = ("add_q_proj", "add_k_proj", "add_v_proj")
        text_qkv = _heads(attn, _three(attn, "to_added_qkv", names, text_rows, x.dtype))
        weights = (attn.norm_q.weight, attn.norm_k.weight)
        text_weights = (attn.norm_added_q.weight, attn.norm_added_k.weight)
        eps = attn.norm_q.eps
        attended = _attended(self, *rope(qkv, weights, image_rotary_emb, eps, text_qkv, text_weights))
        tokens = text.shape[1]
        if self.float8:
            quantize = kernels.quantize if "quantize" in self.parts else kernels.plain_quantize
            out: Tensor | Rows = quantize(attended, start=tokens, length=x.shape[1])
            text_out: Tensor | Rows = quantize(attended, start=0, length=tokens)
        else:
            out, text_out = attended[:, tokens:].contiguous(), attended[:, :tokens].contiguous()
        text_out, out = _linear(attn.to_add_out, text_out, x.dtype), _linear(attn.to_out[0], out, x.dtype)
        return (
            self._rest(self.norm2_context, self.ff_context, text, text_out, text_mod),
            self._rest(self.norm2, self.ff, x, out, image_mod),
        )

    def _rest(self, layer_norm: Any, ff: Any, x: Tensor, out: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        """What the attention gave added, and the MLP: (B, L, D), (B, L, D) -> (B, L, D)."""
        norm = kernels.norm if "norm" in self.parts else kernels.plain_norm
        x, rows = norm(x, mod[4], mod[3], layer_norm.eps, out=out, gate=mod[2], float8=self.float8)
        first, second = ff.net[0].proj, ff.net[2]
        if not isinstance(rows, Tensor):
            quantize = kernels.quantize if "quantize" in self.parts else kernels.plain_quantize
            out = _linear(second, quantize(None, _linear(first, rows, x.dtype)), x.dtype)
        elif "gelu" in self.parts and type(first) is nn.Linear:
            out = second(kernels.linear_gelu(rows, first))
        else:
            out = second(nn.functional.gelu(first(rows), approximate="tanh"))
        return (x + mod[5][:, None].float() * out).to(x.dtype)


def _not_ours(x: Tensor) -> bool:
    """Whether diffusers' forward is to take these tokens."""
    return x.dtype not in DTYPES or torch.is_grad_enabled()


def _modulation(norm: Any, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """What an AdaLayerNorm's layer makes of (B, D): so many parts, each (B, D), that begin where D tells."""
    numbers, size = norm.linear(norm.silu(temb)), norm.linear.out_features // parts
    return tuple(numbers[:, i * size : (i + 1) * size] for i in range(parts))


def _linear(layer: Any, x: Tensor | Rows, dtype: torch.dtype) -> Tensor:
    """A layer's product with tokens (B, L, K), or with their rows in float8: (B, L, N)."""
    if isinstance(x, Tensor):
        return layer(x)  # type: ignore[no-any-return]
    numbers, scales = x
    weight = layer.numbers if isinstance(layer, QuantizedLinear) else layer.weight  # of a fused projection
    out = multiplied(layer.kind, numbers.flatten(0, 1), scales, weight, layer.scale, layer.bias, layer.one, dtype)
    return out.view(*numbers.shape[:2], -1)


def _three(attn: Any, fused: str, names: tuple[str, str, str], x: Tensor | Rows, dtype: torch.dtype) -> Three:
    """q, k and v by one product where `apply_fused_qkv` made one, else by three: each (B, L, D)."""
    one = getattr(attn, fused, None)
    if one is not None and one.weight is not None:
        q, k, v = _linear(one, x, dtype).chunk(3, dim=-1)
    else:
        q, k, v = (_linear(getattr(attn, name), x, dtype) for name in names)
    return q, k, v


def _heads(attn: Any, qkv: Three) -> Three:
    """Each (B, L, D) -> (B, L, heads, channels)."""
    q, k, v = (x.view(*x.shape[:2], -1, attn.head_dim) for x in qkv)
    return q, k, v


def _attended(block: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In 8 bits, or by the processor's backend, as diffusers' does: three (B, L, heads, channels) -> (B, L, D)."""
    if "attention" in block.parts:
        out: Tensor = kernels.attention(q, k, v)
        return out.flatten(2, 3)
    return dispatch_attention_fn(q, k, v, backend=block.attn.processor._attention_backend).flatten(2, 3)
