"""torch.compile, block by block ("regional compilation"): one graph serves all blocks of a kind.

Compiling the denoiser whole takes minutes, since its 57 blocks are traced one after the other; by block, the two kinds
of FLUX.1 blocks are traced once each and give the same kernels (PyTorch's recipe,
https://docs.pytorch.org/tutorials/recipes/regional_compilation.html). It also leaves the space between the blocks free,
which is where the first-block cache decides.

What keeps it at one graph for each kind of block and for batch 1 and batch >= 2, over all picture sizes:
- `dynamic=True`, and sizes that happen to be equal in the first call (text and image tokens) are not taken for one
  (`use_duck_shape=False`).
- A block traced on a view sees its base and its strides, and the next block's input is no such view: another graph. So
  every block gets plain contiguous tensors (a new tensor over the same storage where only the view must go), and None
  for an empty dict.
- Numbers that a block has (the eps of its norms) are constants as long as no adapter is loaded, whose scale may change:
  `dynamic=True` makes each an input, which is a new CPU tensor in every call, and traces a block again for those that
  cannot be one. With CUDA graphs they always are, since such an input is a copy that no graph can hold.
- Graphs belong to the class's code and are limited to 8 a process, for all pipelines together; the limit is raised
  while one of ours runs.
Another data type, grad mode, autocast, inference mode, a LoRA or a sequence of one token has graphs of its own.

`fullgraph=True`: a graph break is an error, not a slowdown. Inductor's options are given to each compilation, and
torch's settings are changed only while an optimized denoiser runs: nothing global stays. Lossless up to rounding.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, Final

import torch
from torch.utils._pytree import tree_map_only

from fluxfire.artifacts import artifacts_of, check_place
from fluxfire.blocks import compiled_by_others, denoiser_of, family_of, wrapped_by
from fluxfire.errors import ArgumentError
from fluxfire.patches import Workaround, applying
from fluxfire.plan import CUDA_GRAPHS, Step
from fluxfire.run import on_plain_inputs
from fluxfire.stats import CompileStats

SCOPES: Final = ("blocks", "denoiser")
MODES: Final = ("default", *CUDA_GRAPHS, "max-autotune-no-cudagraphs")

COMPILERS: Final = {  # where to get one for the CPU; elsewhere g++
    "win32": "install Visual Studio's Build Tools, and start from their prompt",
    "darwin": "xcode-select --install",
}

# Compiled graphs that all pipelines of a process may have for one kind of block. torch's own limit is 8, and with
# `fullgraph=True` the ninth raises: two data types at batch 1 and 2 are four already.
GRAPH_LIMIT: Final = 256


def _fails_on_numbers(same_meta: Callable[..., bool]) -> bool:
    number = types.SimpleNamespace(meta={"val": 1.0})
    try:
        same_meta(number, number)
    except AttributeError:
        return True
    return False


def _for_tensors_only(same_meta: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(same_meta)
    def guarded(*nodes: Any) -> bool:
        return all(isinstance(node.meta.get("val"), torch.Tensor) for node in nodes) and same_meta(*nodes)

    return guarded


# With dynamic sizes, graphs hold symbolic numbers, and a pass of inductor asks them for their tensor size.
# torch 2.11 and 2.12; mended in 2.13 (https://github.com/pytorch/pytorch/pull/181752).
SAME_META: Final = Workaround("torch._inductor.fx_passes.post_grad", "same_meta", _fails_on_numbers, _for_tensors_only)


class Graphs:
    """Counts what one pipeline compiles, and sets torch up for it while its modules run."""

    def __init__(self, denoiser: Any, mode: str, kinds: int) -> None:
        self._denoiser = weakref.ref(denoiser)  # which the VAE's decoder, that has us too, may outlive
        self._kinds = kinds
        self._cuda_graphs = mode in CUDA_GRAPHS
        self._graphs = self._graph_breaks = 0
        self._seconds = 0.0

    def stats(self) -> CompileStats:
        """A snapshot of the counts."""
        recompilations = max(self._graphs - self._kinds, 0)
        return CompileStats(self._graphs, recompilations, self._graph_breaks, self._seconds)

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls on with torch set up for our graphs."""
        from torch._dynamo.utils import counters

        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        start = time.perf_counter()
        with _torch_settings(constants=self._cuda_graphs or not _adapted(self._denoiser())):
            try:
                out = forward(*args, **kwargs)
                # A guidance branch or a scheduler keeps it, and a graph of the whole would write it over.
                return tree_map_only(torch.Tensor, torch.clone, out) if self._cuda_graphs else out
            finally:
                compiled = counters["stats"]["unique_graphs"] - graphs
                if compiled > 0:
                    self._graphs += compiled
                    self._graph_breaks += sum(counters["graph_break"].values()) - breaks
                    self._seconds += time.perf_counter() - start


def _adapted(denoiser: Any) -> bool:
    """Whether a LoRA or an IP-Adapter is loaded, by what diffusers and peft note."""
    notes = ("_hf_peft_config_loaded", "peft_config", "encoder_hid_proj")
    return any(getattr(denoiser, note, None) for note in notes)


@contextmanager
def _torch_settings(constants: bool) -> Iterator[None]:
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as symbolic

    limits = {"recompile_limit": GRAPH_LIMIT, "accumulated_recompile_limit": 4 * GRAPH_LIMIT}
    with dynamo.patch({**limits, "specialize_float": constants}), symbolic.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        yield


def check_compile(
    pipe: Any,
    *,
    mode: str = "default",
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
    scope: str = "blocks",
    dynamic: bool = True,
    vae: bool = False,
    megacache: str | PathLike[str] | None = "auto",
    share: bool = False,
) -> str | None:
    """Why `apply_compile` with these arguments would refuse this pipeline, or None.

    Raises:
        ArgumentError: an argument that no pipeline could take.
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_compile(pipe, backend="eager")
    """
    if mode not in MODES:
        raise ArgumentError(f"mode: found {mode!r}, needed one of torch's {', '.join(map(repr, MODES))}")
    if scope not in SCOPES:
        raise ArgumentError(f'scope: found {scope!r}, needed "blocks" (each kind once) or "denoiser" (one graph)')
    if not isinstance(dynamic, bool):
        raise ArgumentError(f"dynamic: found {dynamic!r}, needed True (any size) or False (a graph for each size)")
    if backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        raise ArgumentError(f"backend: found {backend!r}, needed one of torch.compile's by name: {', '.join(known)}")
    if not isinstance(vae, bool):
        raise ArgumentError(f"vae: found {vae!r}, needed True (the decoder is compiled too) or False")
    check_place(megacache, share)
    if backend != "inductor" and (mode != "default" or options):
        raise ArgumentError(f'mode and options are inductor\'s: found backend {backend!r}, needed backend="inductor"')
    try:
        torch._TorchCompileInductorWrapper("default", dict(options or {}), dynamic)  # type: ignore[no-untyped-call]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"options: found {options!r}, needed inductor's by name with their types: {error}"
        ) from None
    denoiser = denoiser_of(pipe)
    if vae and not hasattr(getattr(pipe, "vae", None), "decoder"):
        return f"found no VAE decoder in {type(pipe).__name__}, needed one for vae=True: leave vae out"
    if mode in CUDA_GRAPHS and any(base.__name__ == "Flux2KleinKVPipeline" for base in type(pipe).__mro__):
        why = "keeps keys and values that its blocks return, which a replay of CUDA graphs overwrites"
        return f'found mode "{mode}" for a pipeline that {why}: use mode="max-autotune-no-cudagraphs"'
    targets = _targets(pipe, scope, vae)
    if reason := compiled_by_others([denoiser, *targets]):
        return reason
    for module in targets:
        if owner := wrapped_by(module):
            return f"found {type(module).__name__} wrapped by {owner}"
    return _missing_compiler(next(denoiser.parameters()).device.type) if backend == "inductor" else None


def _targets(pipe: Any, scope: str, vae: bool) -> list[torch.nn.Module]:
    """The modules whose forward is compiled. Of the VAE the decoder: tiling calls it tile by tile, from outside."""
    denoiser = denoiser_of(pipe)
    family = family_of(pipe)
    blocks = dict.fromkeys(itertools.chain(family.blocks(denoiser), *family.static_blocks(denoiser)))
    targets = list(blocks) if scope == "blocks" else [denoiser]
    return [*targets, pipe.vae.decoder] if vae else targets


def _missing_compiler(device: str) -> str | None:
    if device == "cpu" and not torch.accelerator.is_available():  # else it may wait there for its accelerator
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError:
            how = COMPILERS.get(sys.platform, "install g++ (apt-get install g++) or clang")
            return f"found no C++ compiler, needed one to compile for a CPU: {how}"
    if device in ("cuda", "xpu"):
        from torch.utils._triton import has_triton

        if not has_triton():
            how = "pip install triton-windows" if sys.platform == "win32" else "pip install triton"
            how = "install a ROCm build of torch, which brings it" if torch.version.hip else how
            return f"found no working Triton, needed to compile for a GPU (compute capability 7.0 on): {how}"
    return None


def apply_compile(
    pipe: Any,
    *,
    mode: str = "default",
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
    scope: str = "blocks",
    dynamic: bool = True,
    vae: bool = False,
    megacache: str | PathLike[str] | None = "auto",
    share: bool = False,
) -> Any:
    """Compiles the denoiser's blocks, each kind once. Lossless.

    Compilation happens in the first denoiser call, and once more in the first call of a batch of 2 or more.

    Args:
        pipe: a FLUX pipeline, changed in place.
        mode: one of torch's modes; "max-autotune-no-cudagraphs" searches longer for faster kernels.
        backend: a backend of torch.compile by name; "eager" traces and runs without compiling, for tests.
        options: settings of inductor on top of the mode's, for this pipeline only, such as flux-fast's
            (https://github.com/huggingface/flux-fast) `{"conv_1x1_as_mm": True, "epilogue_fusion": False,
            "coordinate_descent_tuning": True, "coordinate_descent_check_all_directions": True, "shape_padding": True}`.
        scope: "blocks"; or "denoiser" for one graph of the whole, which takes minutes and excludes the cache.
        dynamic: True: the graphs serve all picture sizes; False: each size compiles its own.
        vae: compile the VAE's decoder too.
        megacache: where compiled code is found, and kept after the first complete picture: "auto", this user's cache
            folder; the path of a folder; a URL (s3://bucket/prefix, hf://owner/name), for what "auto" does not have and
            a trusted key has signed; or None: everything is compiled anew in each process. Blocks are compiled ahead
            of time, without CUDA graphs; other graphs are traced and found by torch; the report says what it did.
        share: put what is compiled here at the URL too, signed with your key (docs/megacache.md).

    Returns:
        The same pipe.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.

    Examples:
        >>> pipe = fluxfire.apply_compile(pipe, backend="eager")
    """
    knobs: dict[str, Any] = {"mode": mode, "backend": backend, "scope": scope, "dynamic": dynamic, "vae": vae}
    knobs |= {"megacache": megacache, "share": share}
    reason = check_compile(pipe, options=options, **knobs)
    settings = (*knobs.items(), ("options", tuple((options or {}).items())))

    def inductor() -> dict[str, Any]:  # torch refuses `mode` together with `options`, and consumes the dict
        return torch._inductor.list_mode_options(mode, dynamic) | dict(options or {})

    with applying(pipe, Step("compile", "lossless", settings), reason) as handle:
        denoiser, targets = denoiser_of(pipe), _targets(pipe, scope, vae)
        graphs = Graphs(denoiser, mode, kinds=len({type(module) for module in targets}))
        artifacts = artifacts_of(pipe, megacache, share, backend, scope, inductor, dynamic)
        for module in targets:
            more: dict[str, Any] = {"options": inductor()} if backend == "inductor" else {}
            compiled = torch.compile(module.forward, fullgraph=True, dynamic=dynamic, backend=backend, **more)
            call = artifacts.around(module, compiled)
            handle.patch.wrap(module, "forward", functools.partial(on_plain_inputs, call))
        SAME_META.hold(handle)
        entered = [denoiser, *targets[-1:] * vae]
        artifacts.install(handle, entered)
        for module in entered:
            handle.patch.wrap(module, "forward", graphs.around)
        handle.states["compile"] = graphs
    return pipe
