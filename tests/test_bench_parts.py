"""What `fluxfire bench` is made of: limits, energy, steps, results files and the document made of them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fluxfire.bench import energy, limits, results, show, timing, workloads
from fluxfire.bench.energy import Meter

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import report  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("batch", [1, 3])
def test_counted_flops_are_torchs(batch: int) -> None:
    config = workloads.transformer_config(workloads.WORKLOADS["tiny-t2i"], (2, 3))
    model = FluxTransformer2DModel(**config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(
            hidden_states=torch.randn(batch, 24, 16),
            encoder_hidden_states=torch.randn(batch, 7, 32),
            pooled_projections=torch.randn(batch, 16),
            timestep=torch.ones(batch),
            guidance=torch.ones(batch),
            img_ids=torch.zeros(24, 3),
            txt_ids=torch.zeros(7, 3),
        )
    counts = limits.count(config, batch, (7, 24), 4)
    by_op = counter.get_flop_counts()["Global"]
    bmm = sum(flops for op, flops in by_op.items() if "bmm" in str(op))
    # pos_embed makes its angles by an outer product, which is no linear of the model's.
    assert counts.attention_flops == bmm
    assert counts.linear_flops == sum(flops for op, flops in by_op.items() if "addmm" in str(op))
    assert counts.linear_flops + counts.attention_flops == counter.get_total_flops()


def test_full_size_is_flux_1() -> None:
    """The published sizes, on the meta device: 12 B, and T5-XXL's encoder with 4.8 B."""
    workload = workloads.WORKLOADS["kontext-1024"]
    pipe = workloads.build(workload, torch.device("meta"), torch.bfloat16)
    encoders = workloads.build_text_encoders(workload, torch.device("meta"), torch.bfloat16)
    assert encoders is not None
    sizes = [sum(p.numel() for p in m.parameters()) for m in (pipe.transformer, pipe.vae, *encoders)]
    assert [round(size / 1e6) for size in sizes] == [11901, 84, 123, 4762]
    assert workloads.tokens(workload, pipe) == (512, 8192)
    counts = limits.count(workloads.transformer_config(workload), 1, (512, 8192), 2)
    assert (round(counts.linear_flops / 1e12), round(counts.attention_flops / 1e12)) == (112, 53)


def test_a_limit_adds_up() -> None:
    config = workloads.transformer_config(workloads.WORKLOADS["tiny-t2i"])
    limit = limits.measure(config, 1, (7, 16), CPU, torch.float32)
    assert limit.computed_ms == pytest.approx(limit.linear_ms + limit.attention_ms + limit.passes_ms)
    assert limit.linear_ms == pytest.approx(limit.linear_tflop / limit.gemm_tflop_s * 1e3)
    assert limit.attention_ms == pytest.approx(limit.attention_tflop / limit.attention_tflop_s * 1e3)
    assert limit.passes_ms == pytest.approx(limit.passes_gb / limit.copy_gb_s * 1e3)
    assert limit.cached_ms > 0


class Board:
    """A GPU that draws 100 W; its counter, where it has one, says 5 J more at each reading; half of it is told."""

    def __init__(self, counter: float | None) -> None:
        self.counter = counter

    def start(self) -> None:
        self.started = True

    def read(self) -> dict[str, float]:
        assert self.started
        return {"power_w": 100.0, "gpu_percent": 50.0, "dram_percent": 20.0}

    def joules(self) -> float | None:
        if self.counter is not None:
            self.counter += 5
        return self.counter


def test_energy_is_the_counters_or_power_over_time() -> None:
    with Meter(Board(None)) as meter:
        pass
    told = meter.result
    assert told is not None and told.joules is not None and told.mean_w is not None
    assert told.joules > 0 and told.mean_w <= 100
    assert (told.gpu_percent, told.dram_percent, told.memory_percent) == (50, 20, None)
    meter._samples = [(0, {"power_w": 100}), (1, {}), (2, {"power_w": 100}), (3, {"power_w": 300})]
    told = meter._energy(None, 4)
    assert (told.joules, told.mean_w) == (400, 100)
    with Meter(Board(1000.0)) as meter:
        pass
    assert meter.result is not None and meter.result.joules == 5


class Library(ModuleType):
    """In the place of pynvml: a GPU whose driver answers power, and GPM for two of three metrics."""

    class NVMLError(Exception):
        pass

    NVML_SUCCESS, NVML_GPM_METRICS_GET_VERSION = 0, 1
    freed = 0

    def nvmlDeviceGetPowerUsage(self, gpu: object) -> int:
        return 250_000

    def nvmlDeviceGetUtilizationRates(self, *arguments: object) -> object:
        raise self.NVMLError("Not Supported")

    def nvmlGpmSampleAlloc(self) -> object:
        return object()

    def nvmlGpmSampleGet(self, gpu: object, sample: object) -> object:
        return sample

    def nvmlGpmSampleFree(self, sample: object) -> None:
        self.freed += 1

    def c_nvmlGpmMetricsGet_t(self) -> SimpleNamespace:
        return SimpleNamespace(metrics=[SimpleNamespace(nvmlReturn=0, value=0.0) for _ in range(333)])

    def nvmlGpmMetricsGet(self, asked: SimpleNamespace) -> SimpleNamespace:
        assert asked.version == 1 and asked.sample1 is not asked.sample2
        for metric in asked.metrics[: asked.numMetrics]:
            metric.value, metric.nvmlReturn = metric.metricId * 7.0, int(metric.metricId == 5)
        return asked


def nvml(library: ModuleType) -> energy.Nvml:
    reader = energy.Nvml.__new__(energy.Nvml)  # its __init__ needs a GPU
    reader._nvml, reader._gpu, reader._last = library, object(), None
    return reader


def test_what_nvml_cannot_tell_is_none_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_GPM_EVERY_S", 0.01)
    library = Library("pynvml")
    reader = nvml(library)
    with Meter(reader) as meter:
        time.sleep(0.1)
    told = meter.result
    assert told is not None and told.joules is not None and told.mean_w is not None and told.mean_w <= 250
    assert (told.sm_percent, told.tensor_percent, told.dram_percent) == (14, None, 70)
    assert (told.gpu_percent, told.memory_percent) == (None, None)
    assert library.freed >= 2 and reader.dram_peak_gb_s() is None and reader.driver() is None
    monkeypatch.setattr(Library, "nvmlDeviceGetPowerUsage", Library.nvmlDeviceGetUtilizationRates)
    monkeypatch.setattr(Library, "nvmlGpmSampleGet", Library.nvmlDeviceGetUtilizationRates)
    with Meter(nvml(library)) as meter:
        pass
    assert meter.result == energy.Energy(*[None] * 7)


def test_steps_are_told_apart_and_the_first_is_left_out() -> None:
    computed, cached = timing.steps_by_kind([1.0, 10.0, 3.0, 20.0], "#.#.#")
    assert computed is not None and cached is not None
    assert (computed.median, computed.count, cached.median, cached.count) == (15, 2, 2, 2)
    assert timing.steps_by_kind([1.0], "#.")[0] is None
    assert timing.steps_by_kind([4.0, 6.0], "")[0] == timing.Spread(5, 4.2, 5.8, 2)


def test_a_results_file_is_strict_json_and_replaces_rows(tmp_path: Path) -> None:
    file = results.File(results.new_path(tmp_path, "t2i-1024", "NVIDIA H100"), {"gpu": "x"})
    same = {"workload": "w", "batch": 1}
    file.put(results.new_row(variant="a", psnr_db=float("inf"), ms_computed=1.23456789, beside="", **same))
    file.put(results.new_row(variant="b", beside="", **same))
    file.put(results.new_row(variant="a", error="it | failed", beside="", **same))
    rows = json.loads(file.path.read_text())["rows"]
    assert [(row["variant"], row["error"], row["ms_computed"]) for row in rows] == [
        ("a", "it | failed", None),
        ("b", None, None),
    ]
    assert results.new_path(tmp_path, "t2i-1024", "NVIDIA H100").stem.endswith("_2")
    assert "| `a` | **it / failed** |" in results.table([*rows, results.new_row(ms_cached=2.0, variant="c")])
    assert results.plain(1.23456789) == 1.2346 and results.plain(float("nan")) is None
    with pytest.raises(KeyError, match="speed"):
        results.new_row(speed=1)


def test_results_name_the_command_without_paths() -> None:
    arguments = ["bench", "--out", "/tmp/x y", "--variants", "eager,only:cache"]
    assert show.typed(arguments) == "fluxfire bench --variants eager,only:cache"


def test_the_document_has_every_row_and_why_others_failed(tmp_path: Path) -> None:
    of: dict[str, Any] = {"workload": "t2i-1024", "batch": 1, "steps": 8, "beside": "", "what": "calls"}
    fast = {"ms_computed": 10.0, "ms_computed_p10": 9.0, "s_picture": 0.5, "denoise_s": 0.4}
    about = dict.fromkeys(("driver", "torch", "diffusers", "date", "command"), "x") | {"gpu": "H100"}
    file = results.File(results.new_path(tmp_path, "t2i-1024", "H100"), about)
    for variant in ("limit", "eager", "fluxfire"):
        file.put(results.new_row(variant=variant, **of, **fast))
    file.put(results.new_row(variant="torchao-fp8", error="out | of memory", **of))
    again = results.File(results.new_path(tmp_path, "t2i-1024", "H100"), about)
    for variant in ("limit", "eager", "only:fused_qkv", "only:compile+reduce-overhead"):
        again.put(results.new_row(variant=variant, **of | {"batch": 4}, **fast))
    (tmp_path / "core.json").write_text(json.dumps({"run": {}, "rows": [{"variant": "of another kind"}]}))
    text = report.document(tmp_path)
    assert "Random weights" in text and "another kind" not in text
    assert "| `fluxfire` | 10.0 | 9.0 | 0.50 |" in text
    assert "- `torchao-fp8` has no figures: out | of memory" in text
    assert "| `only:fused_qkv` | 10.0 | 9.0 | 0.50 | part of the 1.5 x |" in text
    assert text.count("| `eager` |") == 3  # speed, stages and ablation


def test_docs_are_made_from_the_committed_results() -> None:
    assert report.document(ROOT / "benchmarks" / "results") == (ROOT / "docs" / "benchmarks.md").read_text()


def test_figures_in_other_pages_are_the_newest_results() -> None:
    tables = report.groups(report.load(ROOT / "benchmarks" / "results"))
    texts = {page.name: page.read_text() for page in report.pages()}
    assert sum(len(report.FIGURE.findall(text)) for text in texts.values()) > 30
    for name, text in texts.items():
        assert report.filled(text, tables) == text, f"{name}: run python benchmarks/report.py"
    stale = "1.0<!--t2i-1024 fluxfire ms_computed .1f--> ms"
    assert report.filled(stale, tables) != stale
    with pytest.raises(KeyError, match="nothing"):
        report.filled("0<!--t2i-1024 nothing ms_computed .1f-->", tables)
