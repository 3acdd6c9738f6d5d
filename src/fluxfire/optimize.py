"""The one call: make a plan, apply its steps in order, show what was done, take it all back.

Each step stands in its own file and can be applied by hand; here they are only chosen and put in order. Which steps go
together is data in `plan.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final

import torch

from fluxfire.attention import APPROXIMATE, apply_attention, check_attention
from fluxfire.blocks import denoiser_of, family_of
from fluxfire.cache import apply_cache, check_cache
from fluxfire.compile import apply_compile, check_compile
from fluxfire.errors import ArgumentError, NotOptimizedError, StepError, UndoError
from fluxfire.fuse import apply_fused_qkv, check_fused_qkv
from fluxfire.fused_kernels import apply_fused_kernels, check_fused_kernels
from fluxfire.kernels import OPTIONAL, PARTS
from fluxfire.memory import apply_memory_format, apply_vae_tiling, check_memory_format, check_vae_tiling
from fluxfire.modulation import apply_modulation_table, check_modulation_table
from fluxfire.offload import apply_offload, check_offload
from fluxfire.patches import handle_of, mark, unmark
from fluxfire.plan import ORDER, Plan, Skip, Step, refusal
from fluxfire.prompts import apply_prompts, check_prompts
from fluxfire.quantize import apply_quantization, check_quantization
from fluxfire.setting import Threshold
from fluxfire.static_blocks import apply_static_blocks, check_static_blocks, has_static_blocks
from fluxfire.stats import Report


@dataclass(frozen=True, slots=True)
class _Recipe:
    check: Callable[..., str | None]
    apply: Callable[..., Any]
    kind: str


RECIPES: Final = {
    "memory_format": _Recipe(check_memory_format, apply_memory_format, "lossless"),
    "quantization": _Recipe(check_quantization, apply_quantization, "approximate"),
    "fused_qkv": _Recipe(check_fused_qkv, apply_fused_qkv, "lossless"),
    "attention": _Recipe(check_attention, apply_attention, "lossless"),
    "fused_kernels": _Recipe(check_fused_kernels, apply_fused_kernels, "lossless"),
    "compile": _Recipe(check_compile, apply_compile, "lossless"),
    "static_blocks": _Recipe(check_static_blocks, apply_static_blocks, "lossless"),
    "cache": _Recipe(check_cache, apply_cache, "approximate"),
    "modulation_table": _Recipe(check_modulation_table, apply_modulation_table, "lossless"),
    "prompts": _Recipe(check_prompts, apply_prompts, "lossless"),
    "vae_tiling": _Recipe(check_vae_tiling, apply_vae_tiling, "approximate"),
    "offload": _Recipe(check_offload, apply_offload, "lossless"),
}


_WHERE_MEASURED: Final = ("fused_qkv", "fused_kernels", "modulation_table")  # on by default, but not everywhere


def plan_pipeline(
    pipe: Any,
    *,
    cache_threshold: Threshold | None = 0.12,
    compile: bool | str = True,
    attention: str | None = None,
    quantize: str | None = None,
    static_blocks: bool | None = None,
    fuse_qkv: bool | None = None,
    fused_kernels: bool | str | None = None,
    memory_format: bool = False,
    modulation: bool | str | None = None,
    prompts: bool | str = False,
    vae_tiling: bool = False,
    offload: str | None = None,
    megacache: str | PathLike[str] | None = "auto",
    share: bool = False,
    strict: bool = False,
) -> Plan:
    """What `optimize_pipeline` with the same arguments would do. Nothing is touched.

    Args:
        pipe: a FLUX pipeline.
        cache_threshold: see `apply_cache`; None leaves the cache out, 0 applies it and never hits. Or what `tune`
            found, or the path of its file.
        compile: True, False, or a mode of torch by name (`apply_compile`).
        attention: None, "auto" for the fastest kernel by measurement, or one by name (`apply_attention`).
        quantize: None, or the blocks' products in 8 bits: "float8", "int8", ... (`apply_quantization`). Approximate.
        static_blocks: what is the same in every step, once a run (`apply_static_blocks`); None: where there is such.
        fuse_qkv: one projection in the place of three in each attention (`apply_fused_qkv`). None, here and in the next
            two: for FLUX.1 on a Hopper GPU, where it was measured, and without an offload.
        fused_kernels: hand-written kernels between FLUX.1's products, on a CUDA GPU (`apply_fused_kernels`);
            "attention": with attention in 8 bits, on Hopper GPUs. Approximate.
        memory_format: the VAE in channels_last (`apply_memory_format`).
        modulation: FLUX.1's modulation once a run (`apply_modulation_table`); "cpu": its weights in host memory.
        prompts: remember encoded prompts (`apply_prompts`); "cpu": the text encoders in host memory too.
        vae_tiling: pictures larger than a tile in tiles (`apply_vae_tiling`).
        offload: None, or where weights wait: "model", "group" or "sequential" (`apply_offload`).
        megacache: where compiled code is found and kept: "auto", a path, a URL, or None (`apply_compile`).
        share: put what is compiled here at the URL too, signed (`apply_compile`).
        strict: raise for the first step that would be left out.

    Raises:
        ArgumentError: an argument that no pipeline could take, or a setting found on another model.
        NotFluxError: `pipe` is no FLUX pipeline.
        StepError: with `strict`, the reason of the first skip.

    Examples:
        >>> print(fluxfire.plan_pipeline(pipe, compile=False, fuse_qkv=True, offload="group"))
        fused_qkv(), lossless
        cache(threshold=0.12), approximate
        offload: left out, an offload moves the three projections apart, ...
    """
    if not isinstance(compile, bool | str):
        raise ArgumentError(f"compile: found {compile!r}, needed True, False, or a mode of torch by name")
    if fused_kernels not in (None, True, False, *OPTIONAL):
        raise ArgumentError(f"fused_kernels: found {fused_kernels!r}, needed None, True, False, or {OPTIONAL[0]!r}")
    static_blocks = has_static_blocks(pipe) if static_blocks is None else static_blocks
    handle = handle_of(pipe)
    applied = tuple(handle.steps) if handle else ()
    graphs = {"mode": compile if isinstance(compile, str) else "default", "megacache": megacache, "share": share}
    asked: dict[str, tuple[object, dict[str, Any]]] = {  # step: (whether, with what)
        "memory_format": (memory_format, {}),
        "fused_qkv": (fuse_qkv, {}),
        "quantization": (quantize is not None, {"weights": quantize}),
        "attention": (attention is not None, {"backend": attention}),
        "fused_kernels": (fused_kernels, {"parts": (*PARTS, fused_kernels)} if isinstance(fused_kernels, str) else {}),
        "compile": (compile, graphs),
        "static_blocks": (static_blocks, {}),
        "cache": (cache_threshold is not None, {"threshold": cache_threshold}),
        "modulation_table": (modulation, {"weights": "gpu" if modulation in (None, True) else modulation}),
        "prompts": (prompts, {"encoders": "stay" if prompts is True else prompts}),
        "vae_tiling": (vae_tiling, {}),
        "offload": (offload is not None, {"kind": offload}),
    }
    # What nobody asked for is left out without a word where it does not fit.
    ours = {name for name in _WHERE_MEASURED if asked[name][0] is None}
    ours = ours if ours and offload is None and _on_hopper(pipe) else set()
    wanted = {name: settings for name, (whether, settings) in asked.items() if whether or name in ours}
    inexact = {"attention": attention in APPROXIMATE, "fused_kernels": isinstance(fused_kernels, str)}
    steps, skips = list[Step](), list[Skip]()
    for name in (name for name in ORDER if name in wanted):
        kind = "approximate" if inexact.get(name) else RECIPES[name].kind
        step = Step(name, kind, tuple(wanted[name].items()))
        reason = refusal(step, (*applied, *steps)) or RECIPES[name].check(pipe, **wanted[name])
        if reason is None:
            steps.append(step)
        elif strict and name not in ours:
            raise StepError(f"{name}: {reason}")
        elif name not in ours:
            skips.append(Skip(name, reason))
    return Plan(tuple(steps), tuple(skips))


def _on_hopper(pipe: Any) -> bool:
    """Whether this is FLUX.1 on a GPU of the kind on which the steps that only move work around were measured."""
    device = next(denoiser_of(pipe).parameters()).device
    if family_of(pipe).name != "FLUX.1" or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def optimize_pipeline(
    pipe: Any,
    *,
    cache_threshold: Threshold | None = 0.12,
    compile: bool | str = True,
    attention: str | None = None,
    quantize: str | None = None,
    static_blocks: bool | None = None,
    fuse_qkv: bool | None = None,
    fused_kernels: bool | str | None = None,
    memory_format: bool = False,
    modulation: bool | str | None = None,
    prompts: bool | str = False,
    vae_tiling: bool = False,
    offload: str | None = None,
    megacache: str | PathLike[str] | None = "auto",
    share: bool = False,
    strict: bool = False,
) -> Any:
    """Makes a FLUX pipeline fast, in place. Approximate.

    The cache is the one approximate step that is on by default; with `cache_threshold=None` the
    defaults are lossless.

    Args:
        pipe: a FLUX pipeline, on the device and in the data type in which it will run.
        cache_threshold: see `apply_cache`; None leaves the cache out, 0 applies it and never hits. Or what `tune`
            found, or the path of its file.
        compile: True, False, or a mode of torch by name (`apply_compile`).
        attention: None, "auto" for the fastest kernel by measurement, or one by name (`apply_attention`).
        quantize: None, or the blocks' products in 8 bits: "float8", "int8", ... (`apply_quantization`). Approximate.
        static_blocks: what is the same in every step, once a run (`apply_static_blocks`); None: where there is such.
        fuse_qkv: one projection in the place of three in each attention (`apply_fused_qkv`). None, here and in the next
            two: for FLUX.1 on a Hopper GPU, where it was measured, and without an offload.
        fused_kernels: hand-written kernels between FLUX.1's products, on a CUDA GPU (`apply_fused_kernels`);
            "attention": with attention in 8 bits, on Hopper GPUs. Approximate.
        memory_format: the VAE in channels_last (`apply_memory_format`).
        modulation: FLUX.1's modulation once a run (`apply_modulation_table`); "cpu": its weights in host memory.
        prompts: remember encoded prompts (`apply_prompts`); "cpu": the text encoders in host memory too.
        vae_tiling: pictures larger than a tile in tiles (`apply_vae_tiling`). Approximate too.
        offload: None, or where weights wait: "model", "group" or "sequential" (`apply_offload`).
        megacache: where compiled code is found and kept: "auto", a path, a URL, or None (`apply_compile`).
        share: put what is compiled here at the URL too, signed (`apply_compile`).
        strict: raise for the first step that cannot be applied, instead of leaving it out and reporting why.

    Returns:
        The same pipe. `report(pipe)` tells what was done, `restore_pipeline(pipe)` takes it back.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.

    Examples:
        >>> fluxfire.optimize_pipeline(pipe, compile=False) is pipe
        True
    """
    if handle := handle_of(pipe):
        applied = ", ".join(step.name for step in handle.steps) or "nothing"
        raise StepError(
            f"this pipeline is optimized already ({applied}): call fluxfire.restore_pipeline(pipe) first, "
            "or fluxfire.set_cache_threshold(pipe, threshold) to change the threshold alone"
        )
    plan = plan_pipeline(
        pipe,
        cache_threshold=cache_threshold,
        compile=compile,
        attention=attention,
        quantize=quantize,
        static_blocks=static_blocks,
        fuse_qkv=fuse_qkv,
        fused_kernels=fused_kernels,
        memory_format=memory_format,
        modulation=modulation,
        prompts=prompts,
        vae_tiling=vae_tiling,
        offload=offload,
        megacache=megacache,
        share=share,
        strict=strict,
    )
    handle = mark(pipe)
    handle.skips = plan.skips
    try:
        for step in plan.steps:
            RECIPES[step.name].apply(pipe, **dict(step.settings))
    except BaseException:
        if handle_of(pipe):  # a first step that fails takes the mark off itself
            with suppress(UndoError):  # what cannot be taken back is in the error's notes
                restore_pipeline(pipe)
        raise
    return pipe


def restore_pipeline(pipe: Any) -> Any:
    """Takes all steps back: the pipe as it was before, to the last attribute.

    Returns:
        The same pipe.

    Raises:
        NotOptimizedError: fluxfire has not touched this pipeline.
        UndoError: somebody else's wrapper cannot be kept. Nothing was changed.

    Examples:
        >>> fluxfire.restore_pipeline(fluxfire.apply_cache(pipe)) is pipe
        True
    """
    handle = handle_of(pipe)
    if handle is None:
        raise NotOptimizedError("found no step of fluxfire on this pipeline: there is nothing to restore")
    handle.patch.undo()
    unmark(handle)
    return pipe


def report(pipe: Any) -> Report:
    """What was applied, what was left out and why, and what it did so far; a table in a notebook.

    Raises:
        NotOptimizedError: fluxfire has not touched this pipeline.

    Examples:
        >>> print(fluxfire.report(fluxfire.apply_cache(pipe, 0)))
        pictures  as the pipe's own, up to rounding
        cache     cache(threshold=0, ...), approximate
        hits      0 of 0 denoiser calls (0%) at threshold 0, 0.0 MiB kept
        last run  none yet
    """
    handle = handle_of(pipe)
    if handle is None:
        raise NotOptimizedError(
            "found no step of fluxfire on this pipeline: call fluxfire.optimize_pipeline(pipe) first"
        )
    stats = {name: state.stats() for name, state in handle.states.items()}
    cache, graphs = stats.pop("cache", None), stats.pop("compile", None)
    steps, lost = tuple(handle.steps), tuple(handle.patch.lost())
    return Report(family_of(pipe).name, steps, handle.skips, cache, graphs, tuple(stats.items()), lost)
