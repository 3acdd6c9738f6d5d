"""Memory, in three steps: the VAE's convolutions in channels_last, the VAE in tiles, weights that wait in host memory.

**channels_last** (`apply_memory_format`). The weights and pictures of a convolution are stored channel after channel
(torch's default) or with the channels of a pixel side by side, as the convolution kernels of GPUs want them; else they
transpose at their door. Of a FLUX pipeline only the VAE is made of convolutions. It costs nothing; sums are taken in
another order: https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html

**Tiles** (`apply_vae_tiling`). The activations of decoding grow with the picture's area; in tiles they grow with the
tile's. Every tile is normalised by itself and neighbours are blended over a quarter of their width: it takes longer and
gives another picture. What fits into one tile is not touched.

**Offload** (`apply_offload`). Weights come to the accelerator when they are needed. The computation is the same and so
are the pictures, to the bit; what it costs is transfers:
- "model": a component at a time, once a run. The denoiser must fit as a whole.
- "group": a block at a time, in every denoiser call; with `use_stream` the next one travels during computation.
- "sequential": a layer at a time, in every call: the least memory, and by far the slowest.
An offload stands around fluxfire's wrappers: in a call that hits the cache all blocks still travel, in vain but right.

The hooks are diffusers' (https://huggingface.co/docs/diffusers/optimization/memory). What is added is the way back: its
own leaves attributes behind, all components in host memory, and after "sequential" other parameter objects.
"""

from __future__ import annotations

import functools
import itertools
from importlib.util import find_spec
from typing import Any, Final

import torch

from fluxfire.blocks import denoiser_of
from fluxfire.errors import ArgumentError, UndoError
from fluxfire.patches import Patch, applying
from fluxfire.plan import Step

KINDS: Final = ("model", "sequential", "group")
OFFLOAD_TYPES: Final = ("block_level", "leaf_level")

# What diffusers leaves on a pipeline, and the names of its group offload's hooks.
_OF_PIPE: Final = ("_all_hooks", "_offload_device", "_offload_gpu_id")
_GROUP_HOOKS: Final = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def check_memory_format(pipe: Any) -> str | None:
    """Why `apply_memory_format` would refuse this pipeline, or None.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.
    """
    denoiser_of(pipe)
    vae: Any = getattr(pipe, "vae", None)
    if vae is None:
        return f"found no VAE in {type(pipe).__name__}, needed one: nothing else in it is made of convolutions"
    weights = [weight for weight in vae.parameters() if weight.dim() == 4]
    if all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights):
        return f"all {len(weights)} convolutions of {type(vae).__name__} are channels_last already"
    # CpuOffload moves the weights themselves, others keep copies of them.
    if (hook := _offload_hook(vae)) not in (None, "CpuOffload"):
        return f"found {type(vae).__name__} offloaded ({hook}): take that off and use fluxfire.apply_offload last"
    return None


def apply_memory_format(pipe: Any) -> Any:
    """Stores the VAE's convolutions channels_last. Lossless.

    Args:
        pipe: a FLUX pipeline, changed in place. Parameters stay the same objects.

    Returns:
        The same pipe.

    Raises:
        NotFluxError, StepError: nothing was changed.
    """
    with applying(pipe, Step("memory_format", "lossless"), check_memory_format(pipe)) as handle:
        for weight in pipe.vae.parameters():
            if weight.dim() == 4 and not weight.is_contiguous(memory_format=torch.channels_last):
                handle.patch.on_undo(functools.partial(_set_strides, weight, weight.stride()))
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return pipe


def _set_strides(weight: torch.nn.Parameter, strides: tuple[int, ...]) -> None:
    empty = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
    weight.data = empty.copy_(weight.data)


def check_vae_tiling(pipe: Any) -> str | None:
    """Why `apply_vae_tiling` would refuse this pipeline, or None.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.
    """
    denoiser_of(pipe)
    vae: Any = getattr(pipe, "vae", None)
    if not hasattr(vae, "use_tiling"):
        return f"found {vae and type(vae).__name__} as VAE of {type(pipe).__name__}, needed one that can work in tiles"
    return f"{type(vae).__name__} works in tiles already" if vae.use_tiling else None


def apply_vae_tiling(pipe: Any) -> Any:
    """Encodes and decodes pictures larger than a tile in tiles that overlap and are blended. Approximate.

    A tile has the VAE's training size (`vae.tile_sample_min_size`), 1024 pixels for FLUX.1. Pictures up to 1024x1024
    stay exact, reference pictures too; one longer side is enough to exceed it.

    Args:
        pipe: a FLUX pipeline, changed in place.

    Returns:
        The same pipe.

    Raises:
        NotFluxError, StepError: nothing was changed.
    """
    with applying(pipe, Step("vae_tiling", "approximate"), check_vae_tiling(pipe)) as handle:
        handle.patch.on_undo(pipe.vae.disable_tiling)
        pipe.vae.enable_tiling()
    return pipe


def check_offload(
    pipe: Any,
    kind: str,
    *,
    device: str | torch.device | None = None,
    offload_type: str = "block_level",
    use_stream: bool = False,
) -> str | None:
    """Why `apply_offload` with these arguments would refuse this pipeline, or None.

    Raises:
        ArgumentError: an argument that no pipeline could take.
        NotFluxError: `pipe` is no FLUX pipeline.
    """
    _check_arguments(kind, offload_type, use_stream)
    target, found = _target(pipe, device), torch.accelerator.current_accelerator(check_available=True)
    if find_spec("accelerate") is None:
        return 'found no accelerate, whose hooks move the weights: pip install "accelerate>=1.1"'
    for name, component in _components(pipe).items():
        if hook := _offload_hook(component):
            return f"found {name} offloaded already ({hook}): pipe.remove_all_hooks(), or load the pipeline anew"
        if len(devices := set(map(str, _devices(component)))) > 1:
            return f"found {name} on {', '.join(sorted(devices))}, needed it on one device: move it there first"
    # To the CPU itself, "model" and "group" copy in vain; accelerate's "sequential" fails, and it has no streams.
    places = {found and found.type} | ({"cpu"} if kind != "sequential" and not use_stream else set())
    if target is None or target.type not in places:
        return f"device: found {target or 'the CPU alone'}, needed this machine's accelerator ({found or 'none'})"
    return None


def _check_arguments(kind: str, offload_type: str, use_stream: bool) -> None:
    for name, value, known in (("kind", kind, KINDS), ("offload_type", offload_type, OFFLOAD_TYPES)):
        if value not in known:
            raise ArgumentError(f"{name}: found {value!r}, needed one of {', '.join(map(repr, known))}")
    if kind != "group" and (offload_type != "block_level" or use_stream):
        raise ArgumentError(f'offload_type and use_stream are of kind "group": found kind {kind!r}')


def apply_offload(
    pipe: Any,
    kind: str,
    *,
    device: str | torch.device | None = None,
    offload_type: str = "block_level",
    use_stream: bool = False,
) -> Any:
    """Keeps weights in host memory and brings them to the accelerator when they are needed. Lossless.

    Embeddings that you pass to the pipeline should be on `device`: else hooks copy them in every call, and the cache
    takes a copy for another prompt, so that no call hits.

    Args:
        pipe: a FLUX pipeline, changed in place; it may be in host memory as a whole.
        kind: "model" (a component at a time), "group" (a block at a time) or "sequential" (a layer at a time).
        device: where to compute; None: where the denoiser is, or this machine's accelerator if that is the CPU.
        offload_type: of "group": "block_level", or "leaf_level" for less memory and more transfers.
        use_stream: of "group": transfers while computing, from pinned host memory. CUDA and XPU.

    Returns:
        The same pipe.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.
    """
    reason = check_offload(pipe, kind, device=device, offload_type=offload_type, use_stream=use_stream)
    target = _target(pipe, device)
    knobs = {"kind": kind, "device": target and str(target), "offload_type": offload_type, "use_stream": use_stream}
    settings = tuple(knobs.items())[: None if kind == "group" else 2]
    with applying(pipe, Step("offload", "lossless", settings), reason) as handle:
        handle.patch.on_undo(_Before(pipe, kind, target, handle.patch).put_back)
        if kind == "model":
            pipe.enable_model_cpu_offload(device=target)
        elif kind == "sequential":
            if pipe.device.type == "cpu":  # the first component's; diffusers takes it for all
                pipe.to("cpu", silence_dtype_warnings=True)
            pipe.enable_sequential_cpu_offload(device=target)
        else:
            pipe.enable_group_offload(target, offload_type=offload_type, num_blocks_per_group=1, use_stream=use_stream)
    return pipe


class _Before:
    """A pipeline before an offload: where its components were, which tensors and attributes their modules had."""

    def __init__(self, pipe: Any, kind: str, target: torch.device | None, patch: Patch) -> None:
        self._pipe, self._kind, self._target, self._patch = pipe, kind, target, patch
        self._of_pipe = {name: vars(pipe)[name] for name in _OF_PIPE if name in vars(pipe)}
        self._devices = {part: next(iter(_devices(part)), None) for part in _components(pipe).values()}
        self._attributes = {module: frozenset(vars(module)) for part in self._devices for module in part.modules()}
        # Only "sequential" puts other parameters in the place of these, over the same memory.
        sequential = self._attributes if kind == "sequential" else ()
        self._tensors = {module: (dict(module._parameters), dict(module._buffers)) for module in sequential}

    def put_back(self) -> None:
        """Removes the hooks and all that they leave behind.

        Raises:
            UndoError: somebody wrapped a module over its hook. Nothing was changed.
        """
        for module in self._attributes:
            self._check_on_top(module)
        if self._target and self._target.type != "cpu":
            torch.accelerator.synchronize(self._target)  # a stream may still be bringing weights
        if self._kind != "group":
            self._pipe.remove_all_hooks()
        for part, device in self._devices.items():
            for module in part.modules():
                self._clean(module)
            if device and any(now != device for now in _devices(part)):
                part.to(device)
        for name in _OF_PIPE:
            vars(self._pipe).pop(name, None)
        vars(self._pipe).update(self._of_pipe)

    def _check_on_top(self, module: torch.nn.Module) -> None:
        hooks, owner = vars(module).get("_hf_hook"), "accelerate.hooks"
        if self._kind == "group":
            hooks, owner = _group_hooks(module), "diffusers.hooks.hooks"
        forward = vars(module).get("forward")
        if hooks and getattr(getattr(forward, "func", None), "__module__", None) != owner:
            self._patch.on_undo(self.put_back)  # the undo that called us has forgotten us: once more, next time
            what = f"{type(module).__name__}.forward was wrapped over the offload's hook by {forward!r}"
            raise UndoError(f"{what}: take that off, then call fluxfire.restore_pipeline(pipe)")

    def _clean(self, module: torch.nn.Module) -> None:
        attributes = self._attributes.get(module, frozenset())  # none: a LoRA's, loaded since
        registry: Any = vars(module).get("_diffusers_hook")
        for name in _group_hooks(module):
            registry.remove_hook(name, recurse=False)
        if registry and not registry.hooks and "_diffusers_hook" not in attributes:
            del module._diffusers_hook
        # Hooks put what they found back as an attribute, also where it was the class's own method.
        own = getattr(vars(module).get("forward"), "__func__", None) is type(module).forward
        if own and "forward" not in attributes:
            del module.forward
        parameters, buffers = self._tensors.get(module, ({}, {}))
        module._parameters.update(parameters)
        module._buffers.update(buffers)


def _components(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _devices(module: torch.nn.Module) -> list[torch.device]:
    return [tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())]


def _target(pipe: Any, device: str | torch.device | None) -> torch.device | None:
    """Where the offloaded weights are to come for computation; None: there is no such place."""
    now = next(denoiser_of(pipe).parameters()).device
    if device is None:
        return now if now.type != "cpu" else torch.accelerator.current_accelerator(check_available=True)
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(f'device: found {device!r}, needed a torch device, such as "cuda:0", or None') from None


def _offload_hook(module: torch.nn.Module) -> str | None:
    """The first hook of accelerate, or of diffusers' group offload, on the module or below it."""
    for part in module.modules():
        if hook := vars(part).get("_hf_hook"):
            return type(hook).__name__
        if hooks := _group_hooks(part):
            return hooks[0]
    return None


def _group_hooks(module: torch.nn.Module) -> list[str]:
    registry = vars(module).get("_diffusers_hook")
    return [name for name in getattr(registry, "hooks", ()) if name in _GROUP_HOOKS]
