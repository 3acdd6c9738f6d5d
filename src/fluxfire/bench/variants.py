"""What is compared: diffusers as it is, fluxfire's steps, the peers, and each step and compiler flag alone.

A variant is a function that changes a new pipeline in place. Cached patterns are forced, since random weights have no
hit rate: names that end in "half" compute every other step, `#.#.#.`, whatever the distance says, which is still
computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import fluxfire
from fluxfire.bench import peers
from fluxfire.errors import ArgumentError
from fluxfire.kernels import PARTS as KERNELS

_HALF: Final = ", every other step forced to hit"

# Changes a pipeline in place for runs of so many steps; returns what tells the last run's steps, "#.#." or "".
Apply = Callable[[Any, int], Callable[[], str]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a table."""

    name: str
    apply: Apply
    what: str  # the calls, as one would write them
    isolated: bool = False  # leaves something in the process: runs in one of its own, beside its own eager row
    whole: bool = False  # takes runs of its number of steps alone, so that its first call is none of one step
    flag: str = ""  # what an ablation is about
    group: str = "peers"


def no_marks() -> str:
    """Nothing is cached."""
    return ""


def _eager(pipe: Any, steps: int) -> Callable[[], str]:
    return no_marks


def _lossless(pipe: Any, steps: int) -> Callable[[], str]:
    fluxfire.apply_compile(pipe, megacache=None)
    return no_marks


def _cache_half(pipe: Any, steps: int) -> Callable[[], str]:
    fluxfire.apply_cache(pipe, math.inf, max_consecutive_hits=1)
    return lambda: fluxfire.cache_stats(pipe).marks()


def _scheduled(pipe: Any, steps: int) -> Callable[[], str]:
    fluxfire.apply_cache(pipe, schedule=("#." * steps)[:steps], extrapolate=2)
    return lambda: fluxfire.cache_stats(pipe).marks()


def _half(pipe: Any, steps: int) -> Callable[[], str]:
    fluxfire.apply_compile(pipe, megacache=None)
    return _cache_half(pipe, steps)


# What the article that this project began with sets in torch._inductor.config, and modes of torch.compile.
FLAGS: Final[dict[str, dict[str, Any]]] = {
    "conv_1x1_as_mm": {"conv_1x1_as_mm": True},
    "epilogue_fusion=False": {"epilogue_fusion": False},
    "coordinate_descent_tuning": {"coordinate_descent_tuning": True},
    "coordinate_descent_check_all_directions": {
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
    },
    "shape_padding=False": {"shape_padding": False},  # True is torch's default
}
MAX_AUTOTUNE: Final = "max-autotune-no-cudagraphs"
CUDA_GRAPHS: Final = "reduce-overhead"
_MODES: Final = (MAX_AUTOTUNE, CUDA_GRAPHS)
STEPS: Final = ("channels_last", "fused_qkv", "compile", "compile_vae", "cache")
# The article's, on the transformer. With the VAE's part on top it had not compiled after 400 s (an H200), so that the
# VAE's steps and flags are measured beside a VAE compiled by default.
STACK: Final = (
    *("epilogue_fusion=False", "coordinate_descent_tuning", "coordinate_descent_check_all_directions"),
    *(MAX_AUTOTUNE, "fused_qkv", "compile"),
)
VAE_STACK: Final = ("conv_1x1_as_mm", "channels_last", "compile_vae", *STACK)


def _ablated(parts: tuple[str, ...], pipe: Any, steps: int) -> Callable[[], str]:
    """These steps and flags, in the order in which fluxfire applies them; a flag or a mode means compilation."""
    if "channels_last" in parts:
        fluxfire.apply_memory_format(pipe)
    if "fused_qkv" in parts:
        fluxfire.apply_fused_qkv(pipe)
    options = {name: value for part in parts for name, value in FLAGS.get(part, {}).items()}
    mode = next((part for part in parts if part in _MODES), "default")
    if options or mode != "default" or "compile" in parts:
        fluxfire.apply_compile(pipe, mode=mode, options=options, vae="compile_vae" in parts, megacache=None)
    return _cache_half(pipe, steps) if "cache" in parts else no_marks


def _ablations() -> list[Variant]:
    """Each alone, the whole stack, and the stack without each."""
    alone = [("channels_last",), ("channels_last", "compile", "compile_vae"), ("fused_qkv",), ("cache",), ("compile",)]
    alone += [("compile", "compile_vae")]
    alone += [("compile", *(["compile_vae"] if flag.startswith("conv") else []), flag) for flag in FLAGS]
    alone += [("fused_qkv", "compile"), ("compile", CUDA_GRAPHS), ("compile", MAX_AUTOTUNE)]
    made = [
        Variant(
            "only:" + "+".join(parts), partial(_ablated, parts), " + ".join(parts), flag=parts[-1], group="ablation"
        )
        for parts in alone
    ]
    for name, stack in (("stack", STACK), ("stack+vae", VAE_STACK)):
        made.append(Variant(name, partial(_ablated, stack), " + ".join(stack), group="ablation-stack"))
    for left_out in STACK[:-1]:  # without compilation there are no flags
        parts = tuple(part for part in STACK if part != left_out)
        if left_out == "coordinate_descent_tuning":  # its directions switch it on
            parts = tuple(part for part in parts if not part.startswith("coordinate"))
        name = f"without:{left_out}"
        made.append(Variant(name, partial(_ablated, parts), " + ".join(parts), flag=left_out, group="ablation-stack"))
    return made


# The steps of a stack by their short names, in the order in which they are applied.
PARTS: Final[dict[str, Callable[[Any], Any]]] = {
    **{
        kind: partial(fluxfire.apply_quantization, weights=kind, keep_original=None)
        for kind in ("float8", "float8-after", "int8", "int8-weights")
    },
    "fused": fluxfire.apply_fused_qkv,
    **{
        f"attention-{name}": partial(fluxfire.apply_attention, backend=name)
        for name in ("auto", "cudnn", "flash", "fa3", "fa4", "sage")
    },
    "kernels": fluxfire.apply_fused_kernels,
    **{f"kernels-{part}": partial(fluxfire.apply_fused_kernels, parts=(part,)) for part in KERNELS},
    "kernels-attention8": partial(fluxfire.apply_fused_kernels, parts=(*KERNELS, "attention")),
    "modulation-gpu": partial(fluxfire.apply_modulation_table, weights="gpu"),
    "modulation-cpu": partial(fluxfire.apply_modulation_table, weights="cpu"),
}
# What may make inductor's kernels around the products better; float8's scales are reductions in them.
REDUCTIONS: Final[dict[str, dict[str, Any]]] = {
    "coordinate_descent_tuning": FLAGS["coordinate_descent_tuning"],
    "multi_kernel": {"triton.multi_kernel": 1},  # a persistent and a looped reduction each, the faster one stays
    "cooperative_reductions": {"triton.cooperative_reductions": True},
    MAX_AUTOTUNE: {},
}


def _stacked(parts: tuple[str, ...], flag: str, cache: str, pipe: Any, steps: int) -> Callable[[], str]:
    """These parts and compilation by block, in `ORDER`; the cache between compilation and the modulation table."""
    last = [part for part in parts if part.startswith("modulation")]
    for part in parts:
        if part not in last:
            PARTS[part](pipe)
    mode = flag if flag in _MODES else "default"
    fluxfire.apply_compile(pipe, mode=mode, options=REDUCTIONS.get(flag, {}), megacache=None)
    marks = _CACHES[cache][0](pipe, steps)
    for part in last:
        PARTS[part](pipe)
    return marks


# How a stack caches: the distance decides (forced, but the host waits for it), or marks known before, with forecasts.
_CACHES: Final[dict[str, tuple[Apply, str]]] = {
    "": (_eager, ""),
    "half": (_cache_half, " + cache" + _HALF),
    "schedule": (_scheduled, " + cache, every other step by a schedule, extrapolate=2"),
}


def _stack(name: str, *parts: str, flag: str = "", cache: str = "", group: str = "speed") -> Variant:
    what = " + ".join((*parts, "compile", *([flag] if flag else []))) + _CACHES[cache][1]
    apply = partial(_stacked, parts, flag, cache)
    return Variant(name, apply, what, whole=cache == "schedule", flag=flag, group=group)


_KINDS: Final[dict[str, tuple[str, ...]]] = {"lossless": (), "float8": ("float8",)}
_LOSSLESS: Final = ("fused", "attention-auto", "modulation-gpu")
_KERNELS: Final = ("fused", "kernels", "modulation-gpu")
_ATTENTION8: Final = ("fused", "kernels-attention8", "modulation-gpu")


def _stacks() -> list[Variant]:
    """Each step alone on compiled blocks, then all of them; in float8 too, and that with one thing more or other."""
    more = ("int8-weights", "attention-sage", "attention-fa3")
    made = [_stack(part, part) for part in PARTS if part not in more and not part.startswith("kernels-")]
    made += [_stack(part, part, group="speed-more") for part in more]
    made += [
        _stack("lossless-all", *_LOSSLESS),
        _stack("lossless-small", "modulation-cpu"),
        _stack("float8-fused", "float8", "fused"),
        _stack("float8-all", "float8", *_LOSSLESS),
        _stack("float8-after-all", "float8-after", *_LOSSLESS),
        _stack("float8-small", "float8", "fused", "modulation-cpu"),
        _stack("float8-half", "float8", cache="half"),
        _stack("float8-all-half", "float8", *_LOSSLESS, cache="half"),
        _stack("float8-after-all-half", "float8-after", *_LOSSLESS, cache="half"),
    ]
    made += [
        _stack("lossless-all+kernels", *_KERNELS),
        _stack("float8-all+kernels", "float8", *_KERNELS),
        _stack("float8-after-all+kernels", "float8-after", *_KERNELS),
        _stack("float8-small+kernels", "float8", "fused", "kernels", "modulation-cpu"),
        _stack("float8-all+kernels-half", "float8", *_KERNELS, cache="half"),
        _stack("lossless-all+kernels-schedule", *_KERNELS, cache="schedule"),
        _stack("float8-all+kernels-schedule", "float8", *_KERNELS, cache="schedule"),
    ]
    for kind, before in _KINDS.items():  # for pictures so small that the host is behind
        made.append(
            _stack(f"{kind}-all+kernels+{CUDA_GRAPHS}", *before, *_KERNELS, flag=CUDA_GRAPHS, group="cuda-graphs")
        )
    for kind, backend in (("lossless", "fa4"), ("float8", "fa4"), ("float8", "sage")):
        with_it = (*_KINDS[kind], "fused", f"attention-{backend}", "kernels", "modulation-gpu")
        made.append(_stack(f"{kind}-all+kernels+{backend}", *with_it, group="speed-more"))
    made.append(_stack("lossless-all+attention8", *_ATTENTION8, group="speed-more"))
    for flag, cache in (("", ""), ("", "half"), ("", "schedule"), (CUDA_GRAPHS, ""), (CUDA_GRAPHS, "half")):
        name = f"float8-all+attention8{f'+{flag}' if flag else ''}{f'-{cache}' if cache else ''}"
        made.append(_stack(name, "float8", *_ATTENTION8, flag=flag, cache=cache, group="speed-more"))
    for part in KERNELS:  # one part of the kernels alone, on everything else
        for kind, before in _KINDS.items():
            if (kind, part) not in (("lossless", "quantize"), ("float8", "gelu")):
                parts = (*before, "fused", f"kernels-{part}", "modulation-gpu")
                made.append(_stack(f"{kind}-all+{part}", *parts, flag=part, group="kernels"))
    for flag in REDUCTIONS:
        for kind in ("float8", "float8-after"):
            made.append(_stack(f"{kind}-all+{flag}", kind, *_LOSSLESS, flag=flag, group="float8-ablation"))
    return made


VARIANTS: Final = {
    variant.name: variant
    for variant in (
        Variant("eager", _eager, "diffusers as it is"),
        Variant("fluxfire", _lossless, "fluxfire.apply_compile(pipe, megacache=None)"),
        Variant("fluxfire-half", _half, f"apply_compile(pipe), apply_cache(pipe, inf, max_consecutive_hits=1){_HALF}"),
        Variant("diffusers-compile", peers.compile_repeated_blocks, "compile_repeated_blocks(fullgraph=True)"),
        Variant(
            "diffusers-fbc-half",
            peers.first_block_cache,
            f"pipe.transformer.enable_cache(FirstBlockCacheConfig(...)){_HALF}",
        ),
        Variant(
            "diffusers-fbc-compile-half",
            peers.first_block_cache_compiled,
            f"compile_repeated_blocks(), enable_cache(FirstBlockCacheConfig(...)){_HALF}",
        ),
        Variant(
            "cache-dit-half",
            peers.cache_dit_compiled,
            f"cache_dit.enable_cache(pipe, DBCacheConfig(Fn=1, Bn=0)), compile_repeated_blocks(fullgraph=True){_HALF}",
            isolated=True,
        ),
        Variant(
            "torchao-fp8",
            peers.torchao_float8,
            "quantize_(transformer, Float8DynamicActivationFloat8WeightConfig(PerRow(), set_inductor_config=False)), "
            "compile_repeated_blocks(fullgraph=True)",
            isolated=True,
        ),
        Variant(
            "original-half",
            peers.original_recipe,
            "para-attn's first-block cache (repaired), fused QKV, channels_last, the whole transformer and vae.decode "
            f"compiled max-autotune-no-cudagraphs, dynamic, its inductor flags{_HALF}",
            isolated=True,
        ),
        *_stacks(),
        *_ablations(),
    )
}
GROUPS: Final = {
    "default": tuple(name for name, variant in VARIANTS.items() if variant.group == "peers" and not variant.isolated),
    **{
        group: tuple(name for name, variant in VARIANTS.items() if variant.group == group)
        for group in dict.fromkeys(variant.group for variant in VARIANTS.values())
    },
}


def named(names: str) -> list[Variant]:
    """Variants by name or group, comma-separated; eager always comes first.

    Raises:
        ArgumentError: a name that there is not.
    """
    wanted = ["eager"]
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in GROUPS and name not in VARIANTS:
            known = ", ".join((*GROUPS, *VARIANTS))
            raise ArgumentError(f"variants: found {name!r}, needed some of {known}")
        wanted += GROUPS.get(name, (name,))
    return [VARIANTS[name] for name in dict.fromkeys(wanted)]
