"""What a picture draws: NVML's power over time, and how busy the GPU says it is.

- **Joules**: the driver's own counter of energy where the GPU has one (since Volta), else its power integrated over
  time by the trapezoid rule. Both are of the whole board, idle draw included.
- **GPU utilization**: the share of time in which at least one kernel ran, as NVML samples it (every 1/6 to 1 s). A
  small kernel on one of 132 multiprocessors counts as busy.
- **Memory utilization**: the share of time in which memory was read or written. It is not a bandwidth: NVML has none. A
  bandwidth is given beside it, from bytes counted over time (`runner.py`).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from statistics import mean
from types import TracebackType
from typing import Any, Protocol

import torch

_EVERY_S = 0.05


class Reader(Protocol):
    """What is read of a GPU."""

    def power_w(self) -> float:
        """The board's draw now."""

    def busy_percent(self) -> tuple[float, float]:
        """Of the multiprocessors and of the memory."""

    def joules(self) -> float | None:
        """The driver's counter, or None."""


class Nvml:
    """One GPU through NVML (package nvidia-ml-py).

    Raises:
        ModuleNotFoundError: the package is missing.
        pynvml.NVMLError: no driver, or no such GPU.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def power_w(self) -> float:
        """The board's draw now."""
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._gpu)) / 1e3

    def busy_percent(self) -> tuple[float, float]:
        """Of the multiprocessors and of the memory."""
        rates = self._nvml.nvmlDeviceGetUtilizationRates(self._gpu)
        return float(rates.gpu), float(rates.memory)

    def joules(self) -> float | None:
        """The driver's counter, or None."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3
        except self._nvml.NVMLError:
            return None

    def driver(self) -> str:
        """The driver's version."""
        return str(self._nvml.nvmlSystemGetDriverVersion())


def open_nvml(device: torch.device) -> tuple[Nvml | None, str | None]:
    """The GPU's reader, or why there is none."""
    if device.type != "cuda":
        return None, "no NVIDIA GPU"
    try:
        return Nvml(device), None
    except ModuleNotFoundError:
        return None, "needs nvidia-ml-py: pip install 'fluxfire[bench]'"
    except Exception as error:  # NVMLError is only known once the package is there
        return None, str(error)


@dataclass(frozen=True, slots=True)
class Energy:
    """What was read between start and stop."""

    joules: float
    mean_w: float
    gpu_percent: float
    memory_percent: float
    source: str  # "counter" or "power integrated"


class Meter:
    """Reads while a block runs: `with Meter(reader) as meter: ...`, then `meter.result`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._samples: list[tuple[float, float, float, float]] = []  # time, W, %, %
        self._stop = threading.Event()
        self.result: Energy | None = None

    def __enter__(self) -> Meter:
        self._joules = self._reader.joules()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self.result = self._energy()

    def _run(self) -> None:
        while True:
            self._sample()
            if self._stop.wait(_EVERY_S):
                return self._sample()

    def _sample(self) -> None:
        busy: tuple[Any, Any] = self._reader.busy_percent()
        self._samples.append((time.perf_counter(), self._reader.power_w(), *busy))

    def _energy(self) -> Energy:
        times, watts, gpu, memory = zip(*self._samples, strict=True)
        pairs = zip(self._samples, self._samples[1:], strict=False)
        joules, source = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs), "power integrated"
        mean_w = joules / (times[-1] - times[0]) if times[-1] > times[0] else watts[0]
        if self._joules is not None and (after := self._reader.joules()) is not None:
            joules, source = after - self._joules, "counter"
        return Energy(joules, mean_w, mean(gpu), mean(memory), source)
