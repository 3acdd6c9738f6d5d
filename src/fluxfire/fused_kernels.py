"""Fused kernels: what stands between a FLUX.1 block's products, in one pass over the tokens each.

Of a compiled step at 1024x1024 on an H100, 15 ms of 132 pass between its products and its attention, and 20 of 99 in
float8. Inductor makes these kernels from diffusers' code, and reads rows twice or three times where a norm or a scale
is found on the way. Here they are written by hand (`kernels.py`), and the blocks' forward is written out with them
(`fused_blocks.py`). Lossless up to rounding: in float32 between the products, where diffusers rounds in between.

A block becomes one of ours by its class, and its own again by `restore_pipeline`; modules, weights and what other steps
put into them stay. What a block has that is not written out (a LoRA, an IP-Adapter, hooks of an offload, a processor of
somebody's own) is looked for before each denoiser call, and such a block runs diffusers' forward, counted and with the
reason in the report.

One part is off unless it is asked for: "attention", its two products in 8 bits, on Hopper GPUs
(`attention_kernels.py`). It is approximate, as SageAttention is, which does the same kind of thing.

How it differs from the peers': SageAttention's, Nunchaku's and flash-attn's kernels come as compiled extensions for a
list of GPUs and versions; these are Triton, compiled by the torch that is there, into the same graphs, and kept with
them by the mega-cache. FLUX.2's and FLUX.3's blocks have other activations and are not written out.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import fluxfire.kernels as kernels
from fluxfire.blocks import denoiser_of, family_of, wrapped_by
from fluxfire.errors import ArgumentError
from fluxfire.kernels import OPTIONAL, PARTS
from fluxfire.linear import hooked, obstacle
from fluxfire.patches import applying
from fluxfire.plan import Step
from fluxfire.seal import Seal

ON_CPU = False  # True: also where there is no GPU, by the functions of torch's operations; for tests and to measure

_LAYERS: Final = {  # of a kind of block: what must be a layer alone
    "FluxTransformerBlock": (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        *("attn.to_out.0", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    "FluxSingleTransformerBlock": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"),
}
_NORMS: Final = {
    "FluxTransformerBlock": ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
    "FluxSingleTransformerBlock": ("attn.norm_q", "attn.norm_k"),
}
_FLOAT8: Final = ("float8", "float8-after")


@dataclass(frozen=True, slots=True)
class FusedKernelsStats:
    """Blocks that run fused, those that run as diffusers wrote them, and the first one's reason."""

    fused: int
    plain: int
    reason: str


def check_fused_kernels(pipe: Any, *, parts: tuple[str, ...] = PARTS) -> str | None:
    """Why `apply_fused_kernels` would refuse this pipeline, or None.

    Raises:
        ArgumentError: an argument that no pipeline could take.
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_fused_kernels(pipe)
        "found the denoiser on a cpu, needed a CUDA GPU: pipe.to('cuda') first"
    """
    if not (isinstance(parts, tuple) and parts and all(part in (*PARTS, *OPTIONAL) for part in parts)):
        known = ", ".join(map(repr, (*PARTS, *OPTIONAL)))
        raise ArgumentError(f"parts: found {parts!r}, needed a tuple with some of {known}")
    family, denoiser = family_of(pipe), denoiser_of(pipe)
    if family.name != "FLUX.1":
        return f"found {family.name}, whose blocks are others, needed FLUX.1: leave fused_kernels out"
    device = denoiser.x_embedder.weight.device
    if not ON_CPU and device.type != "cuda":
        return f"found the denoiser on a {device.type}, needed a CUDA GPU: pipe.to('cuda') first"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        gpu = torch.cuda.get_device_name(device)
        return f"found a {gpu}, needed an NVIDIA GPU of compute capability 8.0 or more: leave fused_kernels out"
    if not ON_CPU and not find_spec("triton"):
        return "found no Triton, needed for the kernels: pip install triton"
    dtype = denoiser.x_embedder.weight.dtype
    if dtype not in (torch.bfloat16, torch.float32):
        return f"found a denoiser in {dtype}, needed torch.bfloat16 (or float32): load it with dtype=torch.bfloat16"
    kinds = {name: block for block in family.blocks(denoiser) for name in (_kind(block),)}
    if other := next((kind for kind in kinds if kind not in _LAYERS), None):
        return f"found a {other} among the blocks, needed diffusers' own: restore what was changed, or load it anew"
    size = denoiser.config.attention_head_dim
    if size & (size - 1) or denoiser.inner_dim % 16:
        return f"found heads of {size} channels, needed a power of two, for the kernels: leave fused_kernels out"
    for block in family.blocks(denoiser):
        if owner := wrapped_by(block):
            return f"found {_kind(block)} wrapped by {owner}"
        if reason := _odd(block):
            return reason
    return _no_attention(device, dtype, size) if "attention" in parts and device.type == "cuda" else None


def apply_fused_kernels(pipe: Any, *, parts: tuple[str, ...] = PARTS) -> Any:
    """FLUX.1's blocks with one kernel for each pass between their products. Lossless.

    With "attention" among the parts it is approximate; the report says so.

    Args:
        pipe: a FLUX.1 pipeline on a CUDA GPU, changed in place; best with fused projections, and compiled afterwards.
        parts: what is fused: "norm" (LayerNorm and modulation), "rope" (the queries' and keys' norm and rotation),
            "quantize" (float8 rows), "gelu" (in the MLP's product; not with 8-bit layers). Fewer are for measuring. One
            more is "attention": in 8 bits instead of by a backend; on a Hopper GPU, in bfloat16.

    Returns:
        The same pipe.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.

    Examples:
        >>> fluxfire.apply_fused_kernels(pipe)
        Traceback (most recent call last):
            ...
        fluxfire.errors.StepError: fused_kernels: found the denoiser on a cpu, needed a CUDA GPU: ...
    """
    reason = check_fused_kernels(pipe, parts=parts)
    kind = "approximate" if set(parts) & set(OPTIONAL) else "lossless"
    with applying(pipe, Step("fused_kernels", kind, (("parts", parts),)), reason) as handle:
        state = FusedKernels(pipe)
        handle.patch.on_undo(state.put_back)
        state.put(parts)
        look = handle.denoiser.register_forward_pre_hook(state.before_call)  # outside of a compiled forward
        handle.patch.on_undo(look.remove)
        handle.states["fused_kernels"] = state
    return pipe


class FusedKernels:
    """The blocks of one denoiser whose class is ours."""

    def __init__(self, pipe: Any) -> None:
        self._blocks: list[Any] = family_of(pipe).blocks(denoiser_of(pipe))
        self._before = {block: type(block) for block in self._blocks}
        self._seals: dict[Any, Seal] = {}
        self._reasons: dict[Any, str] = {}

    def stats(self) -> FusedKernelsStats:
        """How many run fused, as they are now."""
        self.before_call()
        reasons = list(filter(None, self._reasons.values()))
        return FusedKernelsStats(len(self._blocks) - len(reasons), len(reasons), next(iter(reasons), ""))

    def put(self, parts: tuple[str, ...]) -> None:
        """Gives every block its class."""
        from fluxfire.fused_blocks import FusedBlock, FusedSingleBlock

        ours = {"FluxTransformerBlock": FusedBlock, "FluxSingleTransformerBlock": FusedSingleBlock}
        # What is kept of a graph holds the kernels, and their source is not among what is traced.
        kernels = sha256(Path(__file__).with_name("triton_kernels.py").read_bytes()).hexdigest()[:16]
        for block in self._blocks:
            block.parts, block.plain, block.float8, block.kernels = parts, True, False, kernels
            block.__class__ = ours[_kind(block)]
        self.before_call()

    def put_back(self) -> None:
        """Gives every block its own class."""
        for block, before in self._before.items():
            block.__class__ = before
            for name in ("parts", "plain", "float8", "kernels"):
                vars(block).pop(name, None)

    def before_call(self, *_: object) -> None:
        """Before a denoiser call: looks whether all blocks are still what is written out."""
        for block in self._blocks:
            if self._reasons.get(block) or block not in self._seals or not self._seals[block].unbroken():
                self._seals[block] = _sealed(block)
                reason = self._reasons[block] = _odd(block) or ""
                block.plain = bool(reason)
                block.float8 = getattr(block.attn.to_q, "kind", "") in _FLOAT8


def _no_attention(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Why the attention in 8 bits cannot be had on this GPU, for heads of this size, or None."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        gpu = torch.cuda.get_device_name(device)
        return f'found a {gpu}, needed a Hopper GPU (H100, H200) for attention in 8 bits: leave "attention" out'
    if size != 128 or dtype != torch.bfloat16:
        found = f"heads of {size} channels in {dtype}"
        return f'found {found}, needed 128 in torch.bfloat16 for attention in 8 bits: leave "attention" out'
    return _tried(device)


@cache
def _tried(device: torch.device) -> str | None:
    """What is wrong with the attention in 8 bits on this GPU, by one of more keys than stages hold; None: nothing."""
    generator = torch.Generator(device).manual_seed(0)
    made = (torch.randn(1, 700, 2, 128, generator=generator, device=device) + mean for mean in (0, 0, 1))
    q, k, v = (x.to(torch.bfloat16) for x in made)
    try:
        with torch.no_grad():
            out = kernels.attention(q, k, v).float()
            scores = torch.einsum("blhd,bmhd->bhlm", q.float(), k.float()) / math.sqrt(128)
            exact = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v.float())
        error = ((out - exact).norm() / (exact - 1).norm()).item()
        found = "" if error < 0.1 else f"a relative error of {error:.2g} instead of 0.05"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Gluon changes with Triton's versions, and a compiler raises anything
        found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not found:
        return None
    triton = getattr(sys.modules.get("triton"), "__version__", "")
    return (
        f"found that the attention in 8 bits does not work with Triton {triton} ({found}), needed one whose Gluon has "
        'what it is written in, such as 3.6: leave "attention" out'
    )


def _sealed(block: Any) -> Seal:
    """The block's modules as they are, without hooks."""
    seal = Seal()
    seal.hold_children(block)
    seal.hold_unhooked(list(block.modules())[1:])
    seal.hold(vars(block.attn), "processor")
    seal.hold(vars(block.attn.processor), "_parallel_config")
    return seal


def _kind(block: Any) -> str:
    """The name of diffusers' class of this block, also where it is ours; else what it is."""
    cls = next((c for c in type(block).__mro__ if not c.__module__.startswith("fluxfire.")), type(block))
    return cls.__name__ if cls.__module__.startswith("diffusers.") else f"{cls.__module__}.{cls.__name__}"


def _odd(block: Any) -> str | None:
    """What in a block is not written out, or None."""
    processor, names = block.attn.processor, _LAYERS[_kind(block)]
    if type(processor).__name__ != "FluxAttnProcessor" or getattr(processor, "_parallel_config", None):
        return f"found a {type(processor).__name__} in an attention, needed diffusers' own, in one process"
    if hook := next((name for name, part in block.named_modules() if name and hooked(part)), None):
        return f"found a hook on {hook} of a block, which would be skipped; needed none: load the pipeline without it"
    layers: list[Any] = [block.get_submodule(name) for name in names]
    for name, layer in zip(names, layers, strict=True):
        if reason := obstacle(layer):
            return f"found {name} of a block {reason}"
    if len({getattr(layer, "kind", "") for layer in layers}) > 1:
        return "found some layers of a block quantized and others not, needed all or none: leave fused_kernels out"
    if any(
        type(norm := block.get_submodule(name)) is not nn.RMSNorm or norm.weight is None or norm.eps is None
        for name in _NORMS[_kind(block)]
    ):
        return (
            "found another norm of queries and keys than FLUX.1's, needed RMSNorm with weights: leave fused_kernels out"
        )
    return None
