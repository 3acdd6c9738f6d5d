"""Time and memory: of each denoising step by events on the GPU (a clock on a CPU), of each stage by the wall clock.

Events do not stop the GPU between steps, so what runs ahead on the host stays hidden as it is in real use. The first
step of a run is left out of the steps' medians: it has the run's preparation in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Waits for all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of `work` with the device done before and after, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


class StepTimer:
    """Called after each denoising step; afterwards `ms()` is the time from each to the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def __call__(self) -> None:
        """Marks the end of a step."""
        if self._device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def ms(self) -> list[float]:
        """Milliseconds of every step but the first."""
        synchronize(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [before.elapsed_time(after) for before, after in pairs]
        return [(after - before) * 1e3 for before, after in pairs]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the 10th and 90th percentile of what it was taken from."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of these values; None of none."""
        if not values:
            return None
        tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
        return cls(median(values), tenths[0], tenths[8], len(values))


def steps_by_kind(ms: Sequence[float], marks: str) -> tuple[Spread | None, Spread | None]:
    """Computed and cached steps apart.

    Args:
        ms: of every step but the first.
        marks: a character a step, `#` computed and `.` cached; empty where nothing is cached.
    """
    kinds = marks[1:] or "#" * len(ms)
    computed, cached = ([time for time, kind in zip(ms, kinds, strict=True) if kind == mark] for mark in "#.")
    return Spread.of(computed), Spread.of(cached)


def median_seconds(device: torch.device, work: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of one call: a batch of calls long enough to measure, its median over three, warmed up."""
    for _ in range(3):
        work()

    def many() -> None:
        for _ in range(repeats):
            work()

    return median(seconds(device, many)[0] for _ in range(3)) / repeats


def gib(count: int) -> float:
    """Bytes as GiB, for people."""
    return round(count / 2**30, 2)


def memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes that tensors hold now, and the most since the last `reset_peak`; None on a CPU, which does not count."""
    if device.type != "cuda":
        return None
    return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)


def reset_peak(device: torch.device) -> None:
    """Begins a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
