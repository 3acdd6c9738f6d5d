"""Offload: weights wait in host memory and come to the accelerator when they are needed.

The computation is the same and so are the pictures, to the bit; what it costs is transfers:
- "model": a component at a time, once a run. The denoiser must fit as a whole.
- "group": a block at a time, in every denoiser call; with `use_stream` the next one travels during computation.
- "sequential": a layer at a time, in every call: the least memory, and by far the slowest.
An offload stands around fluxfire's wrappers: in a call that hits the cache all blocks still travel, in vain but right.

The hooks are diffusers' (https://huggingface.co/docs/diffusers/optimization/memory). What is added is the way back: its
own leaves attributes behind, all components in host memory, and after "sequential" other parameter objects.
"""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from typing import Any, Final

import torch

from fluxfire.blocks import code_of, denoiser_of, group_hooks, is_own, offload_hook
from fluxfire.errors import ArgumentError, UndoError
from fluxfire.patches import applying
from fluxfire.plan import Step

KINDS: Final = ("model", "sequential", "group")
OFFLOAD_TYPES: Final = ("block_level", "leaf_level")

OFFLOAD_HOOKS: Final = {"model": "CpuOffload", "sequential": "AlignDevicesHook"}  # accelerate's

# What diffusers leaves on a pipeline.
_OF_PIPE: Final = ("_all_hooks", "_offload_device", "_offload_gpu_id")


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

    Examples:
        >>> fluxfire.check_offload(pipe, "group", device="cpu")
    """
    _check_arguments(kind, offload_type, use_stream)
    target, found = _target(pipe, device), torch.accelerator.current_accelerator(check_available=True)
    if not hasattr(pipe, "enable_group_offload"):
        return (
            f"found a {type(pipe).__name__}, a modular pipeline, which has no offload of its own: use diffusers' "
            "ComponentsManager().enable_auto_cpu_offload(device)"
        )
    if find_spec("accelerate") is None:
        return 'found no accelerate, whose hooks move the weights: pip install "accelerate>=1.2"'
    for name, component in _components(pipe).items():
        if hook := offload_hook(component):
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

    Examples:
        >>> pipe = fluxfire.apply_offload(pipe, "group", device="cpu")
    """
    reason = check_offload(pipe, kind, device=device, offload_type=offload_type, use_stream=use_stream)
    target = _target(pipe, device)
    knobs = {"kind": kind, "device": target and str(target), "offload_type": offload_type, "use_stream": use_stream}
    settings = tuple(knobs.items())[: None if kind == "group" else 2]
    with applying(pipe, Step("offload", "lossless", settings), reason) as handle:
        handle.patch.on_undo(_Before(pipe, kind, target).put_back)
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

    def __init__(self, pipe: Any, kind: str, target: torch.device | None) -> None:
        self._pipe, self._kind, self._target = pipe, kind, target
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
        for part, device in self._devices.items():
            for module in part.modules():
                self._clean(module)
            if device and any(now != device for now in _devices(part)):
                part.to(device)
        for name in _OF_PIPE:
            vars(self._pipe).pop(name, None)
        vars(self._pipe).update(self._of_pipe)

    def _check_on_top(self, module: torch.nn.Module) -> None:
        hook, owner = vars(module).get("_hf_hook"), "accelerate.hooks"
        ours = type(hook).__name__ == OFFLOAD_HOOKS.get(self._kind)
        if self._kind == "group":
            ours, owner = bool(group_hooks(module)), "diffusers.hooks.hooks"
        what, forward = type(module).__name__, vars(module).get("forward")
        if ours and getattr(getattr(forward, "func", None), "__module__", None) != owner:
            what = f"{what}.forward was wrapped over the offload's hook by {code_of(forward)}"
        elif type(hook).__name__ == "SequentialHook" and self._kind != "group":
            what = f"{what} has another hook of accelerate joined to the offload's"
        else:
            return
        raise UndoError(f"{what}: take that off, then call fluxfire.restore_pipeline(pipe)")

    def _clean(self, module: torch.nn.Module) -> None:
        attributes = self._attributes.get(module, frozenset())  # none: a LoRA's, loaded since
        if type(vars(module).get("_hf_hook")).__name__ == OFFLOAD_HOOKS.get(self._kind):
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(module)
        registry: Any = vars(module).get("_diffusers_hook")
        for name in group_hooks(module):
            registry.remove_hook(name, recurse=False)
        if registry and not registry.hooks and "_diffusers_hook" not in attributes:
            del module._diffusers_hook
        # Hooks put what they found back as an attribute, also where it was the class's own method.
        if "forward" not in attributes and is_own(module, "forward"):
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
