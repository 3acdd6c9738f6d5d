"""The queueing simulation behind docs/scaling.md: by hand where possible, by formulas where there are any."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
    assert spec and spec.loader
    module = sys.modules["scaling"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_server_by_hand(scaling: Any):
    # The first is made alone; two wait for it and are made together; the fourth finds the queue full.
    found = scaling.simulate([0.0, 1.0, 2.0, 3.0], 1, lambda batch: 10.0, 4, 2)
    assert (found.requests, found.rejected) == (4, 0.25)
    assert found.p50_s == 18.0  # of 10, 18 and 19
    assert found.busy == 1.0


def test_router_takes_the_server_with_the_fewest_pictures(scaling: Any):
    found = scaling.simulate([0.0, 0.1, 0.2], 3, lambda batch: 1.0, 1, 8)
    assert found.p95_s == pytest.approx(1.0)


def test_one_server_is_lindleys_recursion(scaling: Any):
    arrivals = scaling.poisson(60 * 0.7, 5000, seed=1)
    free, latencies = 0.0, []
    for at in arrivals:
        free = max(free, at) + 1.0
        latencies.append(free - at)
    found = scaling.simulate(arrivals, 1, lambda batch: 1.0, 1, 10**9)
    assert (found.p50_s, found.p95_s) == pytest.approx(tuple(np.percentile(latencies, (50, 95))))
    assert found.busy == pytest.approx(5000 / free)


def test_refusals_are_those_of_a_queue_with_one_place(scaling: Any):
    # Exponential service at a load of 0.75, one place to wait: 0.75^2 / (1 + 0.75 + 0.75^2) are refused.
    draw = np.random.default_rng(1).exponential
    found = scaling.simulate(scaling.poisson(45, 40_000, seed=2), 1, lambda batch: draw(1.0), 1, 1)
    assert found.rejected == pytest.approx(0.2432, rel=0.03)


def test_plan_keeps_its_promise_with_the_fewest(scaling: Any):
    work = scaling.Measured("work", 2.0, 0.05)
    gpus, found = scaling.enough(work, 60, 4.0)
    assert found.p95_s <= 4.0 and found.rejected <= scaling.REJECTED and found.busy <= scaling.BUSIEST + 0.02
    arrivals = scaling.poisson(60, 3000, 1)
    fewer = scaling.simulate(arrivals, gpus - 1, work.service(2), 1, scaling.WAITING)
    assert fewer.p95_s > 4.0 or fewer.busy > scaling.BUSIEST


def test_committed_plan_is_of_the_measured_times(scaling: Any):
    text = (ROOT / "docs/scaling.md").read_text()
    for workload in ("t2i-1024", "kontext-1024"):
        for work in scaling.measured(workload):
            assert f"{work.name} ({work.seconds:.2f} s)" in text


def test_check_sets_measured_beside_simulated(scaling: Any):
    rng = np.random.default_rng(0)
    arrivals = scaling.poisson(60, 300, 0)
    free, seen = 0.0, []
    for at in arrivals:  # a real server that takes one at a time, 0.5 s each
        free = max(free, at) + 0.5
        seen.append(scaling.Seen(at, free - at, 1, 0.5 + 1e-9 * rng.random()))
    real, simulated = scaling.compared(seen, 1, 10**6)
    assert (simulated.p50_s, simulated.p95_s) == pytest.approx((real.p50_s, real.p95_s), rel=1e-3)
    assert real.rejected == simulated.rejected == 0
