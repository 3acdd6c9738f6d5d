"""What will be done, and what was done, as plain values.

A `Plan` is made before anything is touched: the `Step`s in order and the `Skip`s with their reasons. The order and the
bad pairs of steps are data here, so that no step has to know another. A `Handle` is the mark that an
optimized pipeline's denoiser carries: what was applied, with the `Patch` that takes it back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fluxfire.errors import CopyError

if TYPE_CHECKING:
    from fluxfire.patches import Patch

COPY: Final = (
    "a module that fluxfire has patched cannot be copied or pickled: the copy would run the original's weights. Call "
    "fluxfire.restore_pipeline(pipe), copy, then optimize both"
)

# Steps are applied in this order.
ORDER: Final = (
    "memory_format",  # first: what is compiled later is compiled for this layout
    "quantization",  # before fusing: 8-bit layers are fused as such, in one copy
    "fused_qkv",  # before compilation: the graphs hold the fused projection
    "attention",  # before compilation: the graphs hold the kernel
    "fused_kernels",  # before compilation: the graphs hold the kernels; after quantization, whose layers they feed
    "compile",  # the blocks' own forward, so that no graph holds a later step's decision
    "static_blocks",  # over the compiled blocks, and under the cache: rows of a batch are the cache's to choose
    "cache",  # over the compiled blocks: its decision depends on data and stays outside the graphs
    "modulation_table",  # over the cache: it hands rows of a batch on as it does other inputs of a block
    "prompts",
    "vae_tiling",
    "offload",  # last: its hooks stand around everything
)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two steps that do not go together with these settings (none named: with any), and why. In `ORDER`.

    Of a setting that is a tuple, such as parts, one member is named.
    """

    first: str
    first_settings: tuple[tuple[str, object], ...]
    second: str
    second_settings: tuple[tuple[str, object], ...]
    reason: str

    def hits(self, first: Step, second: Step) -> bool:
        """Whether these two steps, with their settings, are such a pair."""
        return (
            (self.first, self.second) == (first.name, second.name)
            and _has(first, self.first_settings)
            and _has(second, self.second_settings)
        )


CUDA_GRAPHS: Final = ("reduce-overhead", "max-autotune")  # the modes of torch.compile that replay such
_GRAPHS = (
    "replays CUDA graphs, which overwrite their outputs, and this step keeps outputs over denoising steps: "
    'use mode="max-autotune-no-cudagraphs" or mode="default"'
)
_MOVED = (
    "replays CUDA graphs, which hold the addresses of weights, and an offload moves them: "
    'use mode="max-autotune-no-cudagraphs" or mode="default"'
)
_WHOLE = (
    "this step decides between the blocks what they are given, and one graph of the whole denoiser has no such place: "
    'use apply_compile(pipe, scope="blocks")'
)
_INSIDE = (
    'the offload\'s hooks would stand inside a compiled graph, which they break: use kind "model", or "group" by '
    'blocks with scope="blocks" and vae=False'
)
_TWO_ATTENTIONS = (
    "attention cannot be in 8 bits and by a backend of that name: leave the backend out, or have the kernels without "
    '"attention" (fused_kernels=True)'
)
_BETWEEN: Final = ("static_blocks", "cache", "modulation_table")
CONFLICTS: Final = (
    *(
        Conflict("compile", (("mode", mode),), other, settings, f'mode "{mode}" {why}')
        for mode in CUDA_GRAPHS
        for other, settings, why in (
            ("static_blocks", (), _GRAPHS),
            ("cache", (("backend", "para-attn"),), _GRAPHS),  # ours keeps differences, which are its own tensors
            ("offload", (), _MOVED),
        )
    ),
    *(Conflict("compile", (("scope", "denoiser"),), keeper, (), _WHOLE) for keeper in _BETWEEN),
    Conflict(
        "attention",
        (),
        "compile",
        (("scope", "denoiser"),),
        "the attention kernel is chosen around each denoiser call, which one graph of all would hold: use "
        'apply_compile(pipe, scope="blocks")',
    ),
    *(
        Conflict("attention", (("backend", backend),), "fused_kernels", (("parts", "attention"),), _TWO_ATTENTIONS)
        for backend in ("cudnn", "flash", "efficient", "math", "fa3", "fa4", "sage")
    ),
    Conflict(
        "fused_qkv",
        (),
        "offload",
        (),
        "an offload moves the three projections apart, so that none stays fused: say fuse_qkv=False",
    ),
    Conflict("compile", (("scope", "denoiser"),), "offload", (("kind", "group"),), _INSIDE),
    Conflict("compile", (("vae", True),), "offload", (("kind", "group"),), _INSIDE),
    Conflict(
        "compile",
        (),
        "offload",
        (
            ("kind", "group"),
            ("offload_type", "leaf_level"),
        ),
        _INSIDE,
    ),
    Conflict("compile", (), "offload", (("kind", "sequential"),), _INSIDE),
    Conflict(
        "modulation_table",
        (("weights", "cpu"),),
        "offload",
        (),
        'an offload keeps these weights in host memory anyway: weights="gpu"',
    ),
    Conflict(
        "modulation_table",
        (),
        "offload",
        (("kind", "sequential"),),
        'an offload by layers brings the weights of one layer, and all are needed at once: kind "model" or "group"',
    ),
    Conflict(
        "modulation_table",
        (),
        "offload",
        (("use_stream", True),),
        "diffusers learns from the first call in which order weights travel, and a table changes it: use_stream=False",
    ),
    Conflict(
        "prompts",
        (("encoders", "cpu"),),
        "offload",
        (),
        'an offload keeps the encoders in host memory anyway: encoders="stay"',
    ),
    Conflict(
        "vae_tiling",
        (),
        "offload",
        (("use_stream", True),),
        "diffusers learns from the first call in which order weights travel, and tiles change it: use_stream=False",
    ),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name in `ORDER`, what it costs in exactness, and the settings it is applied with.

    Examples:
        >>> print(fluxfire.Step("cache", "approximate", (("threshold", 0.1),)))
        cache(threshold=0.1), approximate
    """

    name: str
    kind: str  # "lossless" (up to rounding) or "approximate"
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.name}({settings}), {self.kind}"


@dataclass(frozen=True, slots=True)
class Skip:
    """A step that was asked for and is left out, with the reason in full.

    Examples:
        >>> print(fluxfire.Skip("compile", "found no C++ compiler, ..."))
        compile: left out, found no C++ compiler, ...
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: left out, {self.reason}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What `optimize_pipeline` will do: steps in order, and what it leaves out.

    Examples:
        >>> [step.name for step in fluxfire.plan_pipeline(pipe, compile=False).steps]
        ['cache']
    """

    steps: tuple[Step, ...]
    skips: tuple[Skip, ...] = ()

    def __str__(self) -> str:
        return "\n".join(str(line) for line in (*self.steps, *self.skips)) or "nothing to do"


@dataclass(slots=True)
class Handle:
    """The mark on the denoiser of an optimized pipeline."""

    denoiser: Any
    patch: Patch
    steps: list[Step] = field(default_factory=list)
    skips: tuple[Skip, ...] = ()
    states: dict[str, Any] = field(default_factory=dict)  # step name -> what counts for it

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise CopyError(COPY)


def _has(step: Step, settings: tuple[tuple[str, object], ...]) -> bool:
    mine = {name: value if isinstance(value, tuple) else (value,) for name, value in step.settings}
    return all(value in mine.get(name, ()) for name, value in settings)


def refusal(new: Step, earlier: tuple[Step, ...]) -> str | None:
    """Why `new` may not follow the steps `earlier`, or None: its place in `ORDER`, `CONFLICTS`."""
    name = new.name
    for step in earlier:
        if step.name == name:
            return "it is applied already: fluxfire.restore_pipeline(pipe) takes all steps back, then apply it anew"
        if ORDER.index(step.name) > ORDER.index(name):
            calls = ", ".join(f"apply_{step}" for step in ORDER if step == name or any(e.name == step for e in earlier))
            return (
                f"{step.name} is applied already and must come after {name}: call fluxfire.restore_pipeline(pipe), "
                f"then, in this order, {calls}"
            )
        for conflict in CONFLICTS:
            if conflict.hits(step, new):
                return conflict.reason
    return None
