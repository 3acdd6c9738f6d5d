"""Fused QKV: the query, key and value projections of an attention as one matrix product instead of three.

Three linear layers read the same tokens. One product with their weights below each other gives the same numbers, up to
rounding, from one kernel: fewer launches, and tiles that fill the GPU where the tokens are few. FLUX.1 has 76 such
groups (19 double blocks with one for the picture and one for the text, 38 single blocks), its VAE 2. Used by flux-fast,
https://github.com/huggingface/flux-fast.

The three weights become *views* of one tensor, parameter objects stay the same. So it takes no memory, `state_dict` and
`save_pretrained` give the unfused layout, and what is written into a weight in place (a LoRA fused into it) is in the
product at once. The tensor is registered nowhere; `attn.to_qkv` is a plain callable, which diffusers' processors call.

What it costs: applying copies these weights once, 4 GiB of FLUX.1's 12 B bf16 parameters, a group at a time. Each call
looks whether they are still the views. `.to()`, `load_state_dict(assign=True)`, `fuse_lora(safe_fusing=True)` put other
weights there: then a group is fused again before it runs, and counted. Gradients do not reach the three weights.

Layers that fluxfire quantized before are fused as such: 8-bit weight and scales below each other, still one copy.

What cannot be fused any more runs as its three layers: under a LoRA loaded later, with hooks of an offload.
That is no error, since the pictures are right and a server may change adapters between requests; `report` counts these
groups and says why. Without inductor it costs one copy of q, k and v more than never fused: restore if it is to stay.

How it differs from diffusers' `fuse_qkv_projections`: that one keeps a second copy of the weights, draws from the
global random generator, drops a loaded LoRA and ignores later ones, and leaves attributes behind when undone.

Shapes: B samples, L tokens, K channels in, D channels out of each of the three.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import nn

from fluxfire.blocks import denoiser_of, own_offload_hook
from fluxfire.linear import QuantizedLinear, obstacle, product
from fluxfire.patches import Wrapper, applying
from fluxfire.plan import Step
from fluxfire.seal import Seal

# What a processor calls, and the layers that it stands for.
GROUPS: Final = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@dataclass(frozen=True, slots=True)
class FusedStats:
    """Groups of three projections that run as one product now, and those that do not, with the first one's reason.

    `fused_again` counts how often a group was fused anew, since somebody had put other weights in their place.
    """

    fused: int
    unfused: int
    fused_again: int
    reason: str


class FusedProjection:
    """Three linear layers of one attention as one; a plain callable in the place of a module."""

    def __init__(self, name: str, path: tuple[nn.Module, ...], layers: tuple[str, ...]) -> None:
        self.name, self.layers, self.attention = name, layers, path[-1]
        # Whose call comes with a look at the weights: the denoiser, or the VAE's encoder or decoder.
        self.owner, self.root = path[0], path[name.startswith("vae")]
        self.weight: nn.Parameter | None = None  # (3 D, K); a Parameter, so that graphs take its shape as fixed
        self.bias: nn.Parameter | None = None  # (3 D,)
        self.scale: nn.Parameter | None = None  # (3 D, 1), of quantized layers
        self.kind, self.one = "", cast(torch.Tensor | None, None)  # theirs too
        self.path = path
        self._linears: tuple[Any, ...] = ()
        self._seal: Seal | None = None  # of the layers and their parameters, as `fuse` left them

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """q, k and v of x: (B, L, K) -> (B, L, 3 D)."""
        if self.weight is None:
            return torch.cat([getattr(self.attention, layer)(x) for layer in self.layers], dim=-1)
        if self.scale is not None:
            return product(self.kind, x, self.weight, self.scale, self.bias, self.one)
        return nn.functional.linear(x, self.weight, self.bias)

    def traced(self) -> dict[str, Any]:
        """What a graph reads of this object."""
        read = ("layers", "kind", "weight", "bias", "scale", "one")
        return {name: getattr(self, name) for name in read}

    __reduce_ex__ = Wrapper.__reduce_ex__  # a copy's product would not follow its weights

    def tied(self) -> bool:
        """Whether the layers' parameters are the views that `fuse` made, and no hook may change or move them.

        An address tells the device and the data type too: our tensor is alive, so nothing else has its place.
        """
        return self._seal is not None and self._seal.unbroken() and not any(map(own_offload_hook, self.path))

    def put_under(self, seal: Seal) -> None:
        """The layers and their parameters, as they are now."""
        seal.hold(self.attention._modules, *self.layers)
        seal.hold_unhooked(self._linears)
        for linear in self._linears:
            seal.hold(linear._parameters, *linear._parameters)
            seal.hold_addresses(linear.parameters(recurse=False))

    def fuse(self) -> None:
        """Makes the three weights, and biases, views of one tensor."""
        self.release()
        self._linears = tuple(getattr(self.attention, layer) for layer in self.layers)
        first = self._linears[0]
        names = ("numbers", "bias", "scale") if isinstance(first, QuantizedLinear) else ("weight", "bias")
        with torch.inference_mode(False), torch.no_grad():
            parts = {key: [getattr(linear, key) for linear in self._linears] for key in names}
            # All memory is taken before anything changes.
            wholes = {key: torch.cat(three) for key, three in parts.items() if three[0] is not None}
            for key, three in parts.items():
                views = wholes[key].chunk(3) if key in wholes else (None,) * 3
                for part, view in zip(three, views, strict=True):
                    if view is not None:
                        part.data = view
            fused = {key: nn.Parameter(whole, requires_grad=False) for key, whole in wholes.items()}
        self.weight, self.bias, self.scale = fused[names[0]], fused.get("bias"), fused.get("scale")
        if isinstance(first, QuantizedLinear):
            self.kind, self.one = first.kind, first.one
        self._seal = Seal()
        self.put_under(self._seal)

    def release(self) -> None:
        """Forgets the fused tensor; weights that are views of it stay so."""
        self.weight = self.bias = self.scale = self._seal = None

    def split(self) -> None:
        """Gives each of the three weights a tensor of its own."""
        self.release()
        with torch.inference_mode(False), torch.no_grad():
            for part in (part for linear in self._linears for part in linear.parameters(recurse=False)):
                if part.untyped_storage().nbytes() > part.nbytes:
                    part.data = part.data.clone()

    def obstacle(self) -> str | None:
        """Why the three layers cannot be fused now, or None."""
        if hook := next(filter(None, map(own_offload_hook, self.path)), None):
            return f"found {self.name} moved by {hook}, needed weights that stay: load the pipeline without offload"
        linears: list[Any] = [self.attention._modules[layer] for layer in self.layers]
        for layer, linear in zip(self.layers, linears, strict=True):
            if reason := obstacle(linear):
                return f"found {self.name}.{layer} {reason}"
        kinds = {tuple((p.dtype, p.device, p.shape) for p in linear.parameters(recurse=False)) for linear in linears}
        if len(kinds) > 1:
            what = f"{self.name}.({', '.join(self.layers)})"
            return f"found {what} of differing data types, devices or shapes, needed one: pipe.to(device, dtype)"
        return None


def _registered(module: nn.Module) -> dict[str, Any]:
    """The hooks in diffusers' registry of a module; a pipeline makes an empty registry for its denoiser."""
    return getattr(vars(module).get("_diffusers_hook"), "hooks", {})


class FusedProjections:
    """The fused projections of one pipeline: looks after their weights, and counts."""

    def __init__(self, projections: list[FusedProjection]) -> None:
        self._projections = projections
        self._fused_again = 0
        self._seals: dict[nn.Module, Seal] = {}  # of all of a root, so that a call asks once and not 76 times
        self.by_root: dict[nn.Module, list[FusedProjection]] = {}
        for one in projections:
            self.by_root.setdefault(one.root, []).append(one)

    def stats(self) -> FusedStats:
        """A snapshot of the counts."""
        unfused = [one for one in self._projections if one.weight is None]
        reason = next(filter(None, (one.obstacle() for one in unfused)), "")
        return FusedStats(len(self._projections) - len(unfused), len(unfused), self._fused_again, reason)

    def before_call(self, module: nn.Module, _: object) -> None:
        """Before a call of a root: fuses again what was untied, or leaves it to its three layers."""
        if (seal := self._seals.get(module)) and seal.unbroken():
            return
        self._seals.pop(module, None)
        for one in self.by_root[module]:
            if not one.tied():
                if one.obstacle():
                    one.release()
                else:
                    one.fuse()
                    self._fused_again += 1
        # Of diffusers' hooks `tied` tells which kind moves weights; a seal knows only that there are none.
        if all(one.weight is not None and not any(map(_registered, one.path)) for one in self.by_root[module]):
            self._seals[module] = self._sealed(module)

    def _sealed(self, root: nn.Module) -> Seal:
        """What `tied` asks for, of all of a root."""
        seal = Seal()
        for one in self.by_root[root]:
            one.put_under(seal)
            for module in one.path:
                seal.hold(vars(module), "_hf_hook", "_diffusers_hook")
                seal.hold_empty(_registered(module))
        return seal

    def around_apply(self, apply: Any, *args: Any, **kwargs: Any) -> Any:
        """After a `.to()`: keeps no fused tensor alive on the old device."""
        try:
            return apply(*args, **kwargs)
        finally:
            self._seals.clear()
            for one in self._projections:
                if not one.tied():
                    one.release()


def check_fused_qkv(pipe: Any) -> str | None:
    """Why `apply_fused_qkv` would refuse this pipeline, or None.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_fused_qkv(pipe)
    """
    denoiser = denoiser_of(pipe)
    projections = list(_projections(pipe))
    if not any(one.root is denoiser for one in projections):
        return f"found no projections of query, key and value in {type(denoiser).__name__}, needed some to fuse"
    for one in projections:
        if isinstance(vars(one.attention).get("to_qkv"), FusedProjection):
            continue  # ours: the plan says that the step is applied already
        if getattr(one.attention, "fused_projections", False):
            return f"found {one.name} fused by fuse_qkv_projections(), which keeps two copies: load the pipeline anew"
        if reason := one.obstacle():
            return reason
    return None


def apply_fused_qkv(pipe: Any) -> Any:
    """Query, key and value of every attention from one matrix product, in the denoiser and the VAE. Lossless.

    Args:
        pipe: a FLUX pipeline, changed in place.

    Returns:
        The same pipe.

    Raises:
        NotFluxError, StepError: nothing was changed.

    Examples:
        >>> pipe = fluxfire.apply_fused_qkv(pipe)
    """
    with applying(pipe, Step("fused_qkv", "lossless"), check_fused_qkv(pipe)) as handle:
        from diffusers.models.attention_processor import FusedAttnProcessor2_0

        patch = handle.patch
        # A VAE may be fused already, through another pipeline that shares it.
        projections = [one for one in _projections(pipe) if "to_qkv" not in vars(one.attention)]
        state = FusedProjections(projections)
        patch.on_undo(_give_back)
        for one in projections:
            patch.on_undo(one.split)
            one.fuse()
        for one in projections:
            patch.set(one.attention, next(name for name, layers in GROUPS.items() if layers == one.layers), one)
            if not vars(one.attention).get("fused_projections"):
                patch.set(one.attention, "fused_projections", True)
            if one.owner is not pipe.transformer:
                patch.set(one.attention, "processor", FusedAttnProcessor2_0())
        for root in state.by_root:
            patch.on_undo(root.register_forward_pre_hook(state.before_call).remove)  # outside of a compiled forward
        for owner in dict.fromkeys(one.owner for one in projections):
            patch.wrap(owner, "_apply", state.around_apply)
        _give_back()
        handle.states["fused_qkv"] = state
    return pipe


def _projections(pipe: Any) -> Iterator[FusedProjection]:
    """All groups of three layers that can be one, with nothing done to them yet."""
    for part in ("transformer", "vae"):
        owner = getattr(pipe, part, None)
        for name, module in owner.named_modules() if isinstance(owner, nn.Module) else ():
            # The denoiser's attentions say it themselves; of the VAE's, those whose processor has a fused twin.
            processor = type(getattr(module, "processor", None)).__name__
            if getattr(module, "_supports_qkv_fusion", processor == "AttnProcessor2_0"):
                path = tuple(itertools.accumulate(name.split("."), getattr, initial=owner))
                for layers in GROUPS.values():
                    if module._modules.keys() >= set(layers):
                        yield FusedProjection(f"{part}.{name}", path, layers)


def _give_back() -> None:
    """Frees the pieces that single weights left in the accelerator's cache: a group of three does not fit into them."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
