"""What will be done, and what was done, as plain values, and how they read.

A `Plan` is made before anything is touched: the `Step`s in order and the `Skip`s with their reasons. The order, the bad
pairs and the needs of steps are data here, so that no step has to know another. A `Handle` is the mark that an optimized
pipeline and its denoiser carry: what was applied, with the `Patch` that takes it back.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fluxfire.cache import CacheStats
    from fluxfire.compile import CompileStats
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


# Families whose quality against the threshold was measured; others say so in the report's first line.
MEASURED: Final[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What was applied and left out, and the counts so far."""

    family: str
    steps: tuple[Step, ...]
    skips: tuple[Skip, ...]
    cache: CacheStats | None
    compile: CompileStats | None

    def rows(self) -> list[tuple[str, str]]:
        """The report's lines: (what, text). The first says whether pictures differ from the pipe's own."""
        approximate = [step.name for step in self.steps if step.kind == "approximate"]
        rows = [("pictures", "as the pipe's own, up to rounding")]
        if approximate:
            unmeasured = (
                "" if self.family in MEASURED else f"; unmeasured here for {self.family}: compare on your prompts"
            )
            rows = [("pictures", f"approximate, because of {', '.join(approximate)}{unmeasured}")]
        rows += [(step.name, str(step)) for step in self.steps]
        rows += [(skip.name, f"left out: {skip.reason}") for skip in self.skips]
        if self.cache:
            calls = self.cache.hits + self.cache.computed
            rows.append(("hits", f"{self.cache.hits} of {calls} denoiser calls ({self.cache.hit_rate:.0%})"))
        if self.compile:
            graphs = f"{self.compile.graphs} compiled, {self.compile.graph_breaks} graph breaks"
            rows.append(("graphs", f"{graphs}, {self.compile.seconds:.1f} s"))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(what) for what, _ in rows)
        return "\n".join(f"{what:<{width}}  {text}" for what, text in rows)

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><th style="text-align:left">{html.escape(what)}</th><td style="text-align:left">{html.escape(text)}</td></tr>'
            for what, text in self.rows()
        )
        return f"<table>{cells}</table>"


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
