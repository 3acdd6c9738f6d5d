"""What Prometheus is told at /metrics. Labels come from this code, never from a request."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._calls = self._hits = 0

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"fluxfire_{name}", text, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fluxfire_{name}", text, labels, registry=registry)

        self.ready = gauge("ready", "1 when the worker is warm")
        self.queue_pictures = gauge("queue_pictures", "Pictures that wait")
        self.queue_cost = gauge("queue_cost", "What they cost, in pixels x steps")
        self.running = gauge("running_pictures", "Pictures of the batch under way")
        self.recompilations = gauge("recompilations", "Graphs compiled beyond one for each kind of block")
        self.gpu_used = gauge("gpu_used_bytes", "GPU memory in use, of all processes")
        self.gpu_total = gauge("gpu_total_bytes", "GPU memory there is")
        self.requests = counter("requests", "Requests answered", "route", "status")
        self.rejections = counter("rejections", "Requests refused or failed, by the error's code", "code")
        self.pictures = counter("pictures", "Pictures finished, encoded and kept")
        self.steps = counter("denoising_steps", "Denoising steps of batches")
        self.hits = counter("cache_hits", "Denoiser calls that the cache skipped, in samples")
        self.computed = counter("cache_computed", "Denoiser calls that were computed, in samples")
        self.hit_rate = gauge("cache_hit_rate", "Of all denoiser calls of pictures, the part that the cache skipped")
        self.restarts = counter("worker_restarts", "Workers started in the place of one that died")
        self.storage_failures = counter("storage_failures", "Pictures that could not be kept where they should be")
        self.stages = Histogram(
            "fluxfire_stage_seconds",
            "Seconds a picture spent in a stage",
            ("stage",),
            buckets=SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            "fluxfire_batch_pictures", "Pictures in a batch", buckets=(1, 2, 3, 4, 6, 8, 16), registry=registry
        )

    def count_calls(self, hits: int, computed: int) -> None:
        """Adds a picture's denoiser calls."""
        self.hits.inc(hits)
        self.computed.inc(computed)
        self._calls += hits + computed
        self._hits += hits
        self.hit_rate.set(self._hits / max(1, self._calls))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
