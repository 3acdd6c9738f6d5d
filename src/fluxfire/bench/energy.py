"""What a picture draws and how busy it keeps the GPU, read from NVML while pictures are made.

- **Joules**: the driver's own counter of energy where the GPU has one (since Volta), else its power integrated over
  time by the trapezoid rule. Both are of the whole board, idle draw included.
- **`gpu_percent`**: the share of time in which at least one kernel ran, as NVML samples it (every 1/6 to 1 s). A small
  kernel on one of 132 multiprocessors counts as busy. **`memory_percent`**: the share of time in which memory was read
  or written, which is no bandwidth.
- **`sm_percent`, `tensor_percent`, `dram_percent`**: the multiprocessors and tensor cores that were busy, and the part
  of the memory's peak bandwidth that was used, from NVML's performance counters (GPM: since Hopper, and where the
  driver lets us), as means over intervals of half a second.

All are means over everything that happens in a measurement: all stages of all its pictures. What a GPU, driver or
package cannot tell is None, and stops nothing.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from types import TracebackType
from typing import Any, Final, Protocol

import torch

_EVERY_S: Final = 0.05
_GPM_EVERY_S: Final = 0.5  # NVML asks for 0.1 s or more between two samples
_GPM: Final = {
    "sm_percent": 2,
    "tensor_percent": 5,
    "dram_percent": 10,
}  # NVML_GPM_METRIC_*: SM_UTIL, ANY_TENSOR_UTIL, DRAM_BW_UTIL


class Reader(Protocol):
    """What is read of a GPU."""

    def start(self) -> None:
        """A measurement begins: counters count from here."""

    def read(self) -> dict[str, float]:
        """What can be told now, of `power_w` and the percentages."""

    def joules(self) -> float | None:
        """The driver's counter, or None."""


class Nvml:
    """One GPU through NVML (package nvidia-ml-py).

    Args:
        device: of torch.

    Raises:
        ModuleNotFoundError: the package is missing.
        pynvml.NVMLError: no driver, or no such GPU.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        self._last: tuple[float, Any] | None = None  # when the newest GPM sample was taken, and the sample

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What NVML answers; None where the package, the driver or the GPU has no answer."""
        try:
            return getattr(self._nvml, function)(*arguments)
        except (AttributeError, self._nvml.NVMLError):
            return None

    def start(self) -> None:
        """A measurement begins: counters count from here."""
        self._free(self._last)
        self._last = self._sample()

    def read(self) -> dict[str, float]:
        """What can be told now, of `power_w` and the percentages."""
        values: dict[str, float] = {}
        if (milliwatts := self._ask("nvmlDeviceGetPowerUsage", self._gpu)) is not None:
            values["power_w"] = milliwatts / 1e3
        if (rates := self._ask("nvmlDeviceGetUtilizationRates", self._gpu)) is not None:
            values |= {"gpu_percent": float(rates.gpu), "memory_percent": float(rates.memory)}
        if self._last is not None and time.perf_counter() - self._last[0] >= _GPM_EVERY_S:
            before, self._last = self._last, self._sample()
            if self._last is not None:
                values |= self._between(before[1], self._last[1])
            self._free(before)
        return values

    def _sample(self) -> tuple[float, Any] | None:
        sample = self._ask("nvmlGpmSampleAlloc")
        if sample is None:
            return None
        if self._ask("nvmlGpmSampleGet", self._gpu, sample) is None:
            self._ask("nvmlGpmSampleFree", sample)
            return None
        return time.perf_counter(), sample

    def _free(self, of: tuple[float, Any] | None) -> None:
        if of is not None:
            self._ask("nvmlGpmSampleFree", of[1])

    def _between(self, before: Any, after: Any) -> dict[str, float]:
        """GPM's means between two samples."""
        asked = self._nvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = self._nvml.NVML_GPM_METRICS_GET_VERSION, len(_GPM)
        asked.sample1, asked.sample2 = before, after
        for position, number in enumerate(_GPM.values()):
            asked.metrics[position].metricId = number
        if self._ask("nvmlGpmMetricsGet", asked) is None:
            return {}
        answers = zip(_GPM, asked.metrics, strict=False)
        return {name: answer.value for name, answer in answers if answer.nvmlReturn == self._nvml.NVML_SUCCESS}

    def joules(self) -> float | None:
        """The driver's counter, or None."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption", self._gpu)
        return None if millijoules is None else millijoules / 1e3

    def driver(self) -> str | None:
        """The driver's version."""
        version = self._ask("nvmlSystemGetDriverVersion")
        return None if version is None else str(version)

    def dram_peak_gb_s(self) -> float | None:
        """The memory's peak: bits of the bus, twice a clock."""
        bits = self._ask("nvmlDeviceGetMemoryBusWidth", self._gpu)
        mhz = self._ask("nvmlDeviceGetMaxClockInfo", self._gpu, 2)  # NVML_CLOCK_MEM
        return None if bits is None or mhz is None else 2 * mhz * 1e6 * bits / 8 / 1e9


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
    """What was read between start and stop; None where there was no answer."""

    joules: float | None
    mean_w: float | None
    gpu_percent: float | None
    memory_percent: float | None
    sm_percent: float | None
    tensor_percent: float | None
    dram_percent: float | None


class Meter:
    """Reads while a block runs: `with Meter(reader) as meter: ...`, then `meter.result`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._samples: list[tuple[float, dict[str, float]]] = []  # time, what was told
        self._stop = threading.Event()
        self.result: Energy | None = None

    def __enter__(self) -> Meter:
        self._reader.start()
        self._joules, self._began = self._reader.joules(), time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self.result = self._energy(self._reader.joules(), time.perf_counter() - self._began)

    def _run(self) -> None:
        while True:
            self._samples.append((time.perf_counter(), self._reader.read()))
            if self._stop.wait(_EVERY_S):
                self._samples.append((time.perf_counter(), self._reader.read()))
                return

    def _energy(self, counter: float | None, elapsed_s: float) -> Energy:
        if self._joules is not None and counter is not None:
            joules: float | None = counter - self._joules
        else:
            watts = [(when, values["power_w"]) for when, values in self._samples if "power_w" in values]
            joules = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(watts)) or None
        means: dict[str, float | None] = {}
        for name in ("gpu_percent", "memory_percent", *_GPM):
            told = [values[name] for _, values in self._samples if name in values]
            means[name] = mean(told) if told else None
        return Energy(joules, joules / elapsed_s if joules else None, **means)
