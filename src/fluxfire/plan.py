"""What will be done, and what was done, as plain values.

A `Plan` is made before anything is touched: the `Step`s in order and the `Skip`s with their reasons. The order, the bad
pairs and the needs of steps are data here, so that no step has to know another. A `Handle` is the mark that an
optimized pipeline and its denoiser carry: what was applied, with the `Patch` that takes it back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fluxfire.patches import Patch

# Steps are applied in this order.
ORDER: Final = (
    "memory_format",  # first: what is compiled later is compiled for this layout
    "fused_qkv",  # before compilation: the graphs hold the fused projection
    "compile",  # the blocks' own forward, so that no graph holds a later step's decision
    "cache",  # over the compiled blocks: its decision depends on data and stays outside the graphs
    "vae_tiling",
    "offload",  # last: its hooks stand around everything
)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two steps that do not go together, the settings of the first for which that is so (`()`: all), and why."""

    first: str
    second: str
    settings: tuple[tuple[str, object], ...]
    reason: str


_GRAPHS = (
    "replays CUDA graphs, which overwrite their outputs, and the cache keeps outputs over steps: "
    'use mode="max-autotune-no-cudagraphs" or mode="default"'
)
CONFLICTS: Final = (
    Conflict("compile", "cache", (("mode", "reduce-overhead"),), f'mode "reduce-overhead" {_GRAPHS}'),
    Conflict("compile", "cache", (("mode", "max-autotune"),), f'mode "max-autotune" {_GRAPHS}'),
    Conflict(
        "compile",
        "cache",
        (("scope", "denoiser"),),
        "the cache decides between the blocks, on data, and one graph of the whole denoiser has no such place: "
        'use apply_compile(pipe, scope="blocks")',
    ),
)

# Steps that need another one: (step, what it needs, why).
REQUIRES: Final[tuple[tuple[str, str, str], ...]] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name in `ORDER`, what it costs in exactness, and the settings it is applied with."""

    name: str
    kind: str  # "lossless" (up to rounding) or "approximate"
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.name}({settings}), {self.kind}"


@dataclass(frozen=True, slots=True)
class Skip:
    """A step that was asked for and is left out, with the reason in full."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: left out, {self.reason}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What `optimize_pipeline` will do: steps in order, and what it leaves out."""

    steps: tuple[Step, ...]
    skips: tuple[Skip, ...] = ()

    def __str__(self) -> str:
        return "\n".join(str(line) for line in (*self.steps, *self.skips)) or "nothing to do"


@dataclass(slots=True)
class Handle:
    """The mark on an optimized pipeline and on its denoiser."""

    pipe: Any
    denoiser: Any
    patch: Patch
    steps: list[Step] = field(default_factory=list)
    skips: tuple[Skip, ...] = ()
    states: dict[str, Any] = field(
        default_factory=dict
    )  # step name -> its state: the cache, the compiled graphs' count


def refusal(new: Step, earlier: tuple[Step, ...]) -> str | None:
    """Why `new` may not follow the steps `earlier`, or None: its place in `ORDER`, `CONFLICTS`, `REQUIRES`."""
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
            # Conflicts are written with the step that comes first in ORDER as `first`.
            if (conflict.first, conflict.second) == (step.name, name) and set(conflict.settings) <= set(step.settings):
                return conflict.reason
    for needy, needed, reason in REQUIRES:
        if needy == name and all(step.name != needed for step in earlier):
            return reason
    return None
