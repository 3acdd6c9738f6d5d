"""Measures variants of one workload at one batch size, in this process: each on a new pipeline with empty caches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fluxfire.bench import limits, timing, workloads
from fluxfire.bench.energy import Energy, Meter, open_nvml
from fluxfire.bench.results import FIELDS, Row, new_row, plain
from fluxfire.bench.variants import VARIANTS, Variant
from fluxfire.bench.workloads import DEPTH, WORKLOADS, Picture

Say = Callable[[str], None]  # told what is under way
Put = Callable[[Row], None]  # given a row whenever more of it is known


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run, as plain values: it goes to other processes as JSON."""

    workload: str
    batch: int
    variants: tuple[str, ...]
    device: str
    dtype: str
    steps: int = 28
    repeats: int = 3
    errors: bool = True
    price_per_hour: float | None = None
    beside: str = ""  # the variant for which this process was made


class Bench:
    """One workload at one batch size.

    Args:
        settings: what is run.
        say: told what is under way, for a progress bar.
    """

    def __init__(self, settings: Settings, say: Say) -> None:
        self.settings, self.say = settings, say
        self.workload = WORKLOADS[settings.workload]
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.nvml, self.no_nvml = open_nvml(self.device)
        self._limit: limits.Limit | None = None
        self._reference: torch.Tensor | None = None  # a denoiser call's output in float32
        self._text_encoders: tuple[Any, Any] | None = None
        self._eager_s: float | None = None
        self._eager_picture: torch.Tensor | None = None

    def prepare(self, put: Put) -> None:
        """Makes what all variants share: the limit, which is a row, the float32 reference, the text encoders.

        Without a limit or a reference variants can be measured all the same: why there is none is the limit's `error`.
        """
        row = self._row("limit")
        try:
            self._measure_shared(row, put)
        except Exception as error:
            row["error"] = ("float32 reference: " if self._limit else "") + _one_line(error)
            put(row)
        _free()
        self.say("text encoders")
        self._text_encoders = workloads.build_text_encoders(self.workload, self.device, self.dtype)
        if self.device.type == "cuda":  # the compiler's processes start with the first graph: not one variant's cost
            torch.compile(lambda x: x + 1)(torch.zeros(8, device=self.device))

    def _measure_shared(self, row: Row, put: Put) -> None:
        """The limit, into `row`, then the float32 reference."""
        self.say("limit")
        pipe = self._build(DEPTH)
        tokens = workloads.tokens(self.workload, pipe)
        config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
        if self.workload.model == "full":
            config |= {"num_layers": 19, "num_single_layers": 38}
        self._limit = of = limits.measure(config, self.settings.batch, tokens, self.device, self.dtype)
        row |= {"what": of.describe(), "ms_computed": plain(of.computed_ms), "ms_cached": plain(of.cached_ms)}
        put(row)
        if self.settings.errors:
            self.say("float32 reference")
            self._reference = self._output(pipe.to(torch.float32))

    def measure(self, variant: Variant, put: Put) -> Row:
        """Puts the variant's row with its times, and again with its error. What it raises is its row's `error`."""
        row = self._row(variant.name) | {"what": variant.what}
        pipe: Any = None
        try:
            with _empty_caches():
                self.say(variant.name)
                pipe = self._build(None)
                row |= self._times(variant, pipe)
                put(row)
                if self._reference is not None:
                    row |= {"rel_error": plain(self._error(variant))}
        except Exception as error:  # a peer's, of any kind
            row["error"] = ("error to float32: " if row["ms_computed"] else "") + _one_line(error)
        finally:
            del pipe
            _free()
        put(row)
        return row

    def _row(self, variant: str) -> Row:
        of = self.settings
        same = {"workload": of.workload, "batch": of.batch, "steps": of.steps}
        return new_row(variant=variant, beside=of.beside, **same)

    def _build(self, depth: tuple[int, int] | None) -> Any:
        return workloads.build(self.workload, self.device, self.dtype, depth=depth)

    def _times(self, variant: Variant, pipe: Any) -> Row:
        """First call, warm-up, then `repeats` pictures; what of the row comes from them."""
        of, device = self.settings, self.device
        job = Picture(self.workload, pipe, self._text_encoders, of.batch)
        marks = variant.apply(pipe, of.steps)
        reference = job.encode_reference()
        few = (of.steps, of.steps) if variant.whole else (1, 3)
        first_s, latents = timing.seconds(device, lambda: job.denoise(few[0], reference))
        first_decode_s, _ = timing.seconds(device, lambda: job.decode(latents))
        job.denoise(few[1], reference)  # the cached way through the blocks is warm too
        job.encode_text()
        held = timing.memory(device)
        timing.reset_peak(device)
        values: Row = {"first_call_s": None if variant.whole else first_s, "first_decode_s": first_decode_s}
        energy, stages, ms, picture = self._pictures(variant, job)
        pattern = marks()
        if pattern and len(pattern) != of.steps:
            raise RuntimeError(f"found {len(pattern)} decisions in a run of {of.steps} steps: {pattern}")
        computed, cached = timing.steps_by_kind(ms, pattern and "#" + pattern[1:] * of.repeats)
        values |= {"pattern": pattern, "ms_cached": cached.median if cached else None}
        if computed:
            values |= {"ms_computed": computed.median, "ms_computed_p10": computed.low}
            values |= {"ms_computed_p90": computed.high}
        values |= {name: median(stage[name] for stage in stages) / of.batch for name in stages[0]}
        values["s_picture"] = sum(values[name] for name in stages[0])
        if not self.workload.edit:
            values["encode_s"] = None  # nothing was encoded
        if held:
            values |= {"resident_gib": timing.gib(held[0]), "peak_gib": timing.gib(held[1])}
        values |= self._derived(values, energy) | self._compared(variant, values["denoise_s"], picture)
        return {name: plain(value) for name, value in values.items()}

    def _pictures(
        self, variant: Variant, job: Picture
    ) -> tuple[Energy | None, list[dict[str, float]], list[float], torch.Tensor]:
        """All repeats: what they drew, seconds of the stages, milliseconds of the steps, the last picture."""
        stages: list[dict[str, float]] = []
        ms: list[float] = []
        meter = Meter(self.nvml) if self.nvml else None
        with meter or _nothing():
            for repeat in range(self.settings.repeats):
                self.say(f"{variant.name}, {repeat + 1} of {self.settings.repeats}")
                timer = timing.StepTimer(self.device)
                text_s, _ = timing.seconds(self.device, job.encode_text)
                encode_s, reference = timing.seconds(self.device, job.encode_reference)
                denoise = lambda: job.denoise(self.settings.steps, reference, timer)  # noqa: B023, E731
                denoise_s, latents = timing.seconds(self.device, denoise)
                decode_s, picture = timing.seconds(self.device, lambda: job.decode(latents))  # noqa: B023
                ms += timer.ms()
                stages.append({"text_s": text_s, "encode_s": encode_s, "denoise_s": denoise_s, "decode_s": decode_s})
        return meter.result if meter else None, stages, ms, picture

    def _derived(self, values: Row, energy: Energy | None) -> Row:
        """What follows from the times: energy, cost, distance to the limit."""
        derived: Row = {}
        if energy and self.nvml:
            derived |= {name: value for name, value in asdict(energy).items() if name in FIELDS}
            if energy.joules:
                joules = energy.joules / self.settings.repeats / self.settings.batch
                derived |= {"joules_picture": joules, "pictures_wh": 3600 / joules}
            if energy.dram_percent is not None and (peak := self.nvml.dram_peak_gb_s()):
                derived["dram_gb_s"] = energy.dram_percent / 100 * peak
        if (price := self.settings.price_per_hour) is not None:
            derived["cost_picture"] = values["s_picture"] * price / 3600
        if self._limit and (ms := values.get("ms_computed")):
            derived["ratio_to_limit"] = ms / self._limit.computed_ms
            derived["dram_gb_s_at_least"] = (self._limit.weights_gb + self._limit.passes_gb) / ms * 1e3
        return derived

    def _compared(self, variant: Variant, denoise_s: float, picture: torch.Tensor) -> Row:
        """What follows from eager's time and picture of this process."""
        eager = variant.name == "eager"
        if eager:
            self._eager_s = denoise_s
        compared: Row = {} if self._eager_s is None else {"ratio_to_eager": self._eager_s / denoise_s}
        if self.workload.model == "embedded":  # random weights make no picture to compare
            from fluxfire.bench.quality import psnr

            if eager:
                self._eager_picture = picture
            elif self._eager_picture is not None:
                a, b = ((p[0].clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0) for p in (picture, self._eager_picture))
                compared["psnr_db"] = psnr(a.float().cpu().numpy(), b.float().cpu().numpy())
        return compared

    def _error(self, variant: Variant) -> float:
        """Relative error of one computed denoiser call to float32, at reduced depth where weights are random."""
        assert self._reference is not None
        self.say(f"{variant.name}, error")
        pipe = self._build(DEPTH)
        variant.apply(pipe, 1)
        difference = self._output(pipe).float() - self._reference
        return float(difference.norm() / self._reference.norm())

    def _output(self, pipe: Any) -> torch.Tensor:
        """What the denoiser returned to the pipeline in a run of one step; the same inputs for each data type."""
        step, outputs = pipe.scheduler.step, []

        def keep(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            outputs.append(output.detach().clone())
            return step(output, *args, **kwargs)

        pipe.scheduler.step = keep
        try:
            job = Picture(self.workload, pipe, None, self.settings.batch, rounded=self.dtype)
            job.denoise(1, job.random_reference())
        finally:
            del pipe.scheduler.step
        return outputs[0]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _empty_caches() -> Iterator[None]:
    """The compiler begins as in a new process, and on the disk."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, fresh_cache(dir=folder, delete=False):
        yield
    torch._dynamo.reset()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _one_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def run(settings: Settings, put: Put, say: Say, done: Put, late: Callable[[], bool]) -> None:
    """Everything of `settings` in this process.

    Args:
        settings: what is run.
        put: given each row whenever more of it is known.
        say: told what is under way.
        done: given each finished row once.
        late: whether no variant may begin any more.
    """
    bench = Bench(settings, say)
    instead = "not begun: the time limit was reached" if late() else ""
    try:
        if not instead:
            bench.prepare(put)
    except Exception as error:  # such as memory for the text encoders
        instead = _one_line(error)
    for name in settings.variants:
        if instead or late():
            row = failed(settings, name, instead or "not begun: the time limit was reached")
            put(row)
        else:
            row = bench.measure(VARIANTS[name], put)
        done(row)
    del bench
    _free()


def failed(settings: Settings, variant: str, error: str) -> Row:
    """A variant's row where there is nothing but why."""
    same = {"workload": settings.workload, "batch": settings.batch, "steps": settings.steps, "beside": settings.beside}
    return new_row(variant=variant, what=VARIANTS[variant].what, error=error, **same)
