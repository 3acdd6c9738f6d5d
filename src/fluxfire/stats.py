"""What an optimized pipeline tells of itself: counts as plain values, and the report as text, HTML and JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from fluxfire.plan import Skip, Step

# Families whose quality against the threshold was measured; others say so in the report's first line.
MEASURED: Final[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True)
class CacheCall:
    """One denoiser call: for every sample whether it hit, and its distance (nan: nothing to compare with).

    Examples:
        >>> latents = fluxfire.apply_cache(pipe)(**prompt).images
        >>> fluxfire.cache_stats(pipe).last_run[0]
        CacheCall(step=0, branch=0, hits=(False,), distances=(nan,))
    """

    step: int
    branch: int
    hits: tuple[bool, ...]
    distances: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since `apply_cache` in samples x denoiser calls, the last run call by call, and the memory held now.

    `outside` counts denoiser calls that belonged to no run of this pipeline, and so were computed: made after the last
    step, from another thread than the run's, or more than four a step. `other_steps` counts those of runs with another
    number of steps than that of the `Setting` in use: computed too.

    Examples:
        >>> latents = fluxfire.apply_cache(pipe, float("inf"))(**prompt).images
        >>> fluxfire.cache_stats(pipe).marks()
        '#.....'
    """

    threshold: float
    hits: int
    computed: int
    outside: int
    last_run: tuple[CacheCall, ...]
    kept_bytes: int
    other_steps: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among all calls, 0 to 1; 0 before the first call."""
        return self.hits / max(self.hits + self.computed, 1)

    def marks(self) -> str:
        """The last run's calls: # computed, . a hit, + hits for some samples of the batch."""
        return "".join("." if all(call.hits) else "+" if any(call.hits) else "#" for call in self.last_run)


@dataclass(frozen=True, slots=True)
class CompileStats:
    """Graphs compiled for this pipeline, and the seconds of the calls that did it.

    `recompilations` are graphs beyond one for each kind of module (a batch of 2 or more needs one more); `graph_breaks`
    is 0, since a break is an error. Graphs that an earlier pipeline of this process compiled are used and not counted.

    Examples:
        >>> fluxfire.report(fluxfire.apply_compile(pipe, backend="eager")).compile
        CompileStats(graphs=0, recompilations=0, graph_breaks=0, seconds=0.0)
    """

    graphs: int
    recompilations: int
    graph_breaks: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ArtifactStats:
    """The mega-cache's part in one pipeline: artifacts found and compiled, calls of blocks served by them or traced.

    `load_s` is what loading took, in whichever thread; `waited_s` what denoiser calls waited for it. `reasons` say with
    their counts what was compiled, and which block calls took the traced path, and why.

    Examples:
        >>> print(fluxfire.ArtifactStats(hits=2, bytes=2**20, served=56))
        2 found (1.0 MiB in all), 0 compiled, 0 kept; ...; 56 block calls served, 0 traced
    """

    hits: int = 0
    misses: int = 0
    kept: int = 0
    served: int = 0
    traced: int = 0
    bytes: int = 0
    load_s: float = 0.0
    waited_s: float = 0.0
    reasons: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        found = f"{self.hits} found ({self.bytes / 2**20:.1f} MiB in all), {self.misses} compiled, {self.kept} kept"
        times = f"{self.load_s:.1f} s loading, {self.waited_s:.1f} s of it waited for"
        calls = f"{self.served} block calls served, {self.traced} traced"
        return f"{found}; {times}; {calls}" + _reasons(self.reasons)


@dataclass(frozen=True, slots=True)
class TorchCacheStats:
    """The second tier's part: graphs that were traced here, and found (`hits`) or compiled (`misses`) by inductor.

    `loaded` and `kept` count torch's artifacts in the entry of the store when it was read and when it was written last.
    A graph may also be found in inductor's own folder.

    Examples:
        >>> print(fluxfire.TorchCacheStats(hits=2, loaded=9))
        2 traced graphs found, 0 compiled; 9 artifacts loaded (0.0 MiB, 0.0 s), 0 kept
    """

    hits: int = 0
    misses: int = 0
    loaded: int = 0
    kept: int = 0
    bytes: int = 0
    load_s: float = 0.0
    reasons: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        entry = f"{self.loaded} artifacts loaded ({self.bytes / 2**20:.1f} MiB, {self.load_s:.1f} s), {self.kept} kept"
        return f"{self.hits} traced graphs found, {self.misses} compiled; {entry}" + _reasons(self.reasons)


def _reasons(reasons: tuple[tuple[str, int], ...]) -> str:
    return "".join(f"; {reason}" + f" ({count} times)" * (count > 1) for reason, count in reasons)


@dataclass(frozen=True, slots=True)
class Report:
    """What was applied and left out, and the counts so far. `print` it, or let a notebook show it.

    Examples:
        >>> fluxfire.report(fluxfire.apply_cache(pipe, 0)).as_dict()["pictures"]
        "as the pipe's own, up to rounding"
    """

    family: str
    steps: tuple[Step, ...]
    skips: tuple[Skip, ...]
    cache: CacheStats | None
    compile: CompileStats | None
    other: tuple[tuple[str, Any], ...] = ()  # (step, its counts) for the steps without a field of their own
    lost: tuple[str, ...] = ()  # attributes of ours that somebody has thrown away

    def rows(self) -> list[tuple[str, str]]:
        """The report's lines: (what, text). The first says whether pictures differ from the pipe's own."""
        rows = [("pictures", self._exactness())]
        rows += [(step.name, str(step)) for step in self.steps]
        rows += [(skip.name, f"left out: {skip.reason}") for skip in self.skips]
        if cache := self.cache:
            calls = f"{cache.hits} of {cache.hits + cache.computed} denoiser calls ({cache.hit_rate:.0%})"
            rows.append(("hits", f"{calls} at threshold {cache.threshold:g}, {cache.kept_bytes / 2**20:.1f} MiB kept"))
            rows.append(("last run", f"{cache.marks()} (# computed, . hit)" if cache.last_run else "none yet"))
            if cache.outside:
                rows.append(
                    ("warning", f"{cache.outside} denoiser calls outside of this pipeline's runs were not cached")
                )
            if cache.other_steps:
                calls = f"{cache.other_steps} denoiser calls were in runs of another number of steps than the setting's"
                rows.append(("warning", f"{calls}, and computed: call fluxfire.tune(pipe, prompts, ...) with yours"))
        if graphs := self.compile:
            counts = f"{graphs.graphs} compiled, {graphs.recompilations} of them recompilations"
            rows.append(("graphs", f"{counts}, {graphs.graph_breaks} graph breaks, {graphs.seconds:.1f} s"))
        for name, counts in self.other:
            told = [f"{key} {value}" for key, value in asdict(counts).items() if value != ""]
            rows.append((name, str(counts) if isinstance(counts, ArtifactStats | TorchCacheStats) else ", ".join(told)))
        names = {step.name for step in self.steps}
        if "quantization" in names and "compile" not in names:
            rows.append(("warning", "8-bit products are slower than bfloat16 without compilation: compile=True"))
        if self.lost:
            what = f"a step is not in effect any more, somebody replaced {', '.join(sorted(set(self.lost)))}"
            rows.append(("warning", f"{what}: call fluxfire.restore_pipeline(pipe), then optimize again"))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """The report as values that JSON knows; nan and infinite numbers become None and "inf"."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str), parse_constant=_CONSTANTS.__getitem__)
        for step in plain["steps"]:
            step["settings"] = dict(step["settings"])
        return {"pictures": self._exactness()} | plain

    def _exactness(self) -> str:
        exact = {"cache"} if self.cache and self.cache.threshold == 0 else set()
        approximate = [step.name for step in self.steps if step.kind == "approximate" and step.name not in exact]
        if not approximate:
            return "as the pipe's own, up to rounding"
        unmeasured = "" if self.family in MEASURED else f"; unmeasured here for {self.family}: compare on your prompts"
        return f"approximate, because of {', '.join(approximate)}{unmeasured}"

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(what) for what, _ in rows)
        return "\n".join(f"{what:<{width}}  {text}" for what, text in rows)

    def _repr_html_(self) -> str:
        style = 'style="text-align:left;vertical-align:top"'
        cells = "".join(
            f"<tr><th {style}>{html.escape(what)}</th><td {style}>{html.escape(text)}</td></tr>"
            for what, text in self.rows()
        )
        plot = _plot(self.cache) if self.cache and self.cache.last_run else ""
        return f"<table>{cells}</table>{plot}"


_CONSTANTS: Final = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}


def _plot(stats: CacheStats) -> str:
    """The last run as SVG: a bar for each call, its mean distance for height, filled where it was computed."""
    width, height, top = 12, 80, _top(stats)
    y: Callable[[float], float] = lambda value: height - min(value, top) / top * height  # noqa: E731
    bars = []
    for index, call in enumerate(stats.last_run):
        known = [value for value in call.distances if math.isfinite(value)]
        distance = sum(known) / len(known) if known else top
        colour = "#2a9d8f" if all(call.hits) else "#e9c46a" if any(call.hits) else "#264653"
        label = f"step {call.step}, branch {call.branch}: " + ("hit" if all(call.hits) else "computed")
        label += f", distance {distance:.4f}" if known else ", nothing to compare with"
        bars.append(
            f'<rect x="{index * width}" y="{y(distance):.1f}" width="{width - 2}" height="{height - y(distance):.1f}" '
            f'fill="{colour}" fill-opacity="{1 if known else 0.25}"><title>{label}</title></rect>'
        )
    total = len(bars) * width
    line = f'<line x1="0" x2="{total}" y1="{y(stats.threshold):.1f}" y2="{y(stats.threshold):.1f}" stroke="#e76f51"/>'
    caption = f"distance in each call of the last run, up to {top:.3g}: dark computed, green hit; line: the threshold"
    return (
        f'<svg width="{total}" height="{height}" role="img" aria-label="{caption}">{"".join(bars)}{line}</svg>'
        f"<div><small>{caption}</small></div>"
    )


def _top(stats: CacheStats) -> float:
    """The plot's upper end: the largest distance, and the threshold if it is near enough to be shown."""
    distances = [value for call in stats.last_run for value in call.distances if math.isfinite(value)]
    largest = max(distances, default=1.0) or 1.0
    return max(largest, stats.threshold) if stats.threshold <= 3 * largest else largest
