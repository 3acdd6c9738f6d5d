"""Where `apply_compile` gets its graphs: blocks compiled ahead of time, else torch's own artifacts, else compilation.

Mega-cache is no step: this puts its two tiers, `aot.py` and `torch_cache.py`, around what is compiled.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from fluxfire.aot import Blocks
from fluxfire.blocks import denoiser_of
from fluxfire.errors import ArgumentError
from fluxfire.megacache import megacache_at
from fluxfire.plan import Handle
from fluxfire.stats import ArtifactStats
from fluxfire.store.shelves import is_url, shelf_at
from fluxfire.torch_cache import TorchCache


def check_place(megacache: object, share: object = False) -> None:
    """Refuses what is no place for artifacts.

    Raises:
        ArgumentError: neither "auto", nor a path, nor a URL, nor None; or what is to be shared has no URL.
    """
    if megacache is not None and (not isinstance(megacache, str | os.PathLike) or not str(megacache)):
        raise ArgumentError(f'megacache: found {megacache!r}, needed "auto", the path of a folder, a URL, or None')
    if not isinstance(share, bool) or (share and not is_url(megacache)):
        raise ArgumentError(f"share: found {share!r} with megacache={megacache!r}, needed a URL for True, or False")
    if is_url(megacache):
        try:
            shelf_at(str(megacache))
        except Exception as error:  # each library refuses a bad URL in its own way
            raise ArgumentError(f"megacache: {error}") from None


def prefetch(megacache: str | os.PathLike[str] = "auto") -> threading.Thread:
    """Begins to load this machine's artifacts, and to import what they need, while you load the weights.

    Call it first, then `from_pretrained`, then `optimize_pipeline`. diffusers, which you are about to import anyway, is
    imported before this returns, so that no two threads import it at once; the rest passes beside you. The most
    recently used artifacts for the current device are loaded, 16 at most; the others when they are needed.

    Args:
        megacache: "auto", a path or a URL, as for `optimize_pipeline`.

    Returns:
        The thread that does it; nobody needs to wait for it.

    Raises:
        ArgumentError: `megacache` is neither "auto", nor a path, nor a URL.

    Examples:
        >>> thread = fluxfire.prefetch()
    """
    check_place(megacache or b"")
    importlib.import_module("diffusers.pipelines.flux.pipeline_flux")
    thread = threading.Thread(target=megacache_at(megacache).prefetch, name="fluxfire-prefetch")
    thread.start()
    return thread


@dataclass(frozen=True, slots=True)
class NotServed:
    """In the place of `Blocks` where nothing can be served: why."""

    reason: str

    def stats(self) -> ArtifactStats:
        """The reason as the report's only count."""
        return ArtifactStats(reasons=((f"not used: {self.reason}", 1),))


class Uncached:
    """What stands around compiled modules without a mega-cache: the compiled function in the place of the forward."""

    def around(self, module: torch.nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What to put around the module's forward."""
        return lambda forward, *args, **kwargs: compiled(*args, **kwargs)

    def install(self, handle: Handle, modules: list[torch.nn.Module]) -> None:
        """Wraps the modules whose calls tell when a run is over, and adds to the report."""


class Cached(Uncached):
    """Both tiers, each where it can serve."""

    def __init__(self, ahead: Blocks | NotServed, second: TorchCache | None) -> None:
        self._ahead, self._second = ahead, second

    def around(self, module: torch.nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What to put around the module's forward."""
        traced = self._second.around(compiled) if self._second else compiled
        if isinstance(self._ahead, Blocks) and self._ahead.serves(module):
            return self._ahead.around(module, traced)
        return super().around(module, traced)

    def install(self, handle: Handle, modules: list[torch.nn.Module]) -> None:
        """Wraps the modules whose calls tell when a run is over, and adds to the report."""
        if isinstance(self._ahead, Blocks):
            handle.patch.wrap(handle.denoiser, "forward", self._ahead.around_denoiser)
        handle.states["megacache"] = self._ahead
        if self._second:
            for module in modules:
                handle.patch.wrap(module, "forward", self._second.around_run)
            handle.states["torch_cache"] = self._second


def artifacts_of(
    pipe: Any,
    place: str | PathLike[str] | None,
    share: bool,
    backend: str,
    scope: str,
    options: Callable[[], dict[str, Any]],
    dynamic: bool,
) -> Uncached:
    """What serves this pipeline's compiled modules from the mega-cache at `place`."""
    if place is None:
        return Uncached()
    if backend != "inductor":
        return Cached(NotServed(f"backend {backend!r} makes nothing that can be kept"), None)
    from torch._dynamo.convert_frame import compile_lock

    config, told = torch._inductor.config, {}
    with compile_lock:  # who compiles or loads in another thread changes settings meanwhile
        for name, value in config.save_config_portable().items():
            if value != vars(config)["_config"][name].default:
                told[name] = value
    asked = options()
    cuda_graphs = asked.get("triton.cudagraphs", config.triton.cudagraphs)
    told = {name: repr(value) for name, value in (told | asked).items()}
    if unknown := [name for name, value in told.items() if " at 0x" in value]:
        why = f"inductor's {', '.join(unknown)} cannot be told apart from process to process"
        return Cached(NotServed(why), None)
    denoiser, cache = denoiser_of(pipe), megacache_at(place, share)
    model = {name: repr(value) for name, value in denoiser.config.items() if not name.startswith("_")}
    fields = {"options": told, "dynamic": dynamic, "config": model}
    second = TorchCache(pipe, cache, fields | {"torch": {"scope": scope, "class": type(denoiser).__name__}})
    if scope != "blocks":
        why = f"scope {scope!r} is one graph of everything, and only blocks are compiled ahead of time"
        return Cached(NotServed(why), second)
    if cuda_graphs:
        return Cached(NotServed("CUDA graphs cannot be kept"), second)
    return Cached(Blocks(pipe, cache, fields, options, dynamic), second)
