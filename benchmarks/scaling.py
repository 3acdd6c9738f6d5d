"""How many GPUs for how many requests a minute: a queueing simulation, and its check against the real server.

    python benchmarks/scaling.py plan    # docs/scaling.md's tables and plot, from benchmarks/results
    python benchmarks/scaling.py check   # a real server on this machine under Poisson arrivals, simulated beside

What is simulated is what `fluxfire serve` does, one server a GPU: a queue bounded in waiting pictures, beyond it 429;
batches of up to `max_batch` of what waits when the worker is free. A router hands each request to the server with the
fewest pictures, and nobody who was refused comes back. Service times are measured ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Final

import numpy as np

HERE: Final = Path(__file__).parent
DOCS: Final = HERE.parent / "docs"
RESULTS: Final = HERE / "results"
H100: Final = "NVIDIA-H100-80GB-HBM3_2026-11-23"
PRICE_PER_HOUR: Final = 3.95  # of an H100, as in the benchmarks' cost column
WAITING: Final = 32  # pictures of 1024x1024 and 28 steps that the server's queue takes unless told
RATES: Final = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)  # requests a minute
REJECTED: Final = 0.001  # most that may be refused
BUSIEST: Final = 0.95  # share of their time that GPUs are planned to work: nearer to 1 a queue never settles

Service = Callable[[int], float]  # seconds of one batch of so many pictures


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a series of requests."""

    requests: int
    rejected: float  # share
    p50_s: float  # latency of those that were served, from arrival to picture
    p95_s: float
    busy: float  # share of the GPUs' time

    def __str__(self) -> str:
        return f"p50 {self.p50_s:.2f} s, p95 {self.p95_s:.2f} s, {self.rejected:.1%} refused"


def simulate(arrivals: Sequence[float], gpus: int, service: Service, max_batch: int, waiting: int) -> Outcome:
    """Lets requests arrive.

    Args:
        arrivals: times in seconds, ascending.
        gpus: servers, one GPU each.
        service: draws the seconds of a batch.
        max_batch: most pictures of a batch.
        waiting: most pictures that wait at one server.
    """
    queues: list[deque[float]] = [deque() for _ in range(gpus)]
    load = np.zeros(gpus, dtype=int)  # pictures at each server
    running: list[list[float]] = [[] for _ in range(gpus)]
    ends: list[tuple[float, int]] = []
    latencies: list[float] = []
    rejected, busy, now = 0, 0.0, 0.0

    def begin(gpu: int) -> None:
        nonlocal busy
        running[gpu] = [queues[gpu].popleft() for _ in range(min(max_batch, len(queues[gpu])))]
        if running[gpu]:
            seconds = service(len(running[gpu]))
            busy += seconds
            heappush(ends, (now + seconds, gpu))

    for arrival in (*arrivals, math.inf):
        while ends and ends[0][0] <= arrival:
            now, gpu = heappop(ends)
            latencies += [now - since for since in running[gpu]]
            load[gpu] -= len(running[gpu])
            begin(gpu)
        if arrival == math.inf:
            break
        now, gpu = arrival, int(load.argmin())
        if len(queues[gpu]) >= waiting:
            rejected += 1
            continue
        queues[gpu].append(arrival)
        load[gpu] += 1
        if not running[gpu]:
            begin(gpu)
    p50, p95 = np.percentile(latencies, (50, 95)) if latencies else (math.nan, math.nan)
    end = max(now, arrivals[-1])
    return Outcome(len(arrivals), rejected / len(arrivals), float(p50), float(p95), busy / (gpus * end))


def poisson(per_minute: float, requests: int, seed: int) -> list[float]:
    """Arrival times of independent clients."""
    gaps = np.random.default_rng(seed).exponential(60 / per_minute, requests)
    return [float(at) for at in gaps.cumsum()]


# Planning.


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of a benchmark: seconds a picture, and how they vary."""

    name: str
    seconds: float
    spread: float  # standard deviation over mean, from the 10th and 90th percentile of a step

    def service(self, seed: int) -> Service:
        """Draws lognormal times; batches of one, which is what was measured."""
        sigma = math.sqrt(math.log(1 + self.spread**2))
        draw = np.random.default_rng(seed).lognormal
        return lambda batch: float(draw(math.log(self.seconds) - sigma**2 / 2, sigma))


def measured(workload: str) -> list[Measured]:
    """Diffusers as it is, compiled, and with every other step cached."""
    names = {"eager": "diffusers, eager", "fluxfire": "compiled", "fluxfire-half": "compiled, every other step cached"}
    rows = json.loads((RESULTS / f"{workload}_{H100}.json").read_text())["rows"]
    found = {row["variant"]: row for row in rows if row["variant"] in names and row["batch"] == 1}
    return [
        Measured(
            names[name], row["s_picture"], (row["ms_computed_p90"] - row["ms_computed_p10"]) / 2.56 / row["ms_computed"]
        )
        for name in names
        for row in [found[name]]
    ]


def enough(work: Measured, per_minute: float, target_s: float) -> tuple[int, Outcome]:
    """The fewest GPUs with which p95 is at most the target and next to nobody is refused."""
    requests = int(min(20_000, max(3000, 6 * per_minute)))
    arrivals = poisson(per_minute, requests, seed=1)

    def outcome(gpus: int) -> Outcome:
        return simulate(arrivals, gpus, work.service(seed=2), 1, WAITING)

    def good(found: Outcome) -> bool:
        return found.p95_s <= target_s and found.rejected <= REJECTED

    low = math.ceil(per_minute / 60 * work.seconds / BUSIEST)
    high = low
    while not good(outcome(high)):
        low, high = high + 1, high + max(1, high // 20)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(outcome(middle)) else (middle + 1, high)
    return high, outcome(high)


def plan() -> None:
    """Writes the tables and the plot, and the figures behind them."""
    targets = {"t2i-1024": ("1024x1024 from text", 10.0), "kontext-1024": ("Kontext edit of 1024x1024", 20.0)}
    rows: list[dict[str, Any]] = []
    parts: list[str] = []
    for workload, (title, target_s) in targets.items():
        works = measured(workload)
        parts.append(f"### {title}: p95 of at most {target_s:g} s\n")
        parts.append(
            "| requests a minute |" + "".join(f" {w.name} ({w.seconds:.2f} s) | p50, p95 s | $ a 1000 |" for w in works)
        )
        parts.append("|---:|" + "---:|---:|---:|" * len(works))
        for rate in RATES:
            cells = []
            for work in works:
                gpus, found = enough(work, rate, target_s)
                cost = gpus * PRICE_PER_HOUR / 60 / rate * 1000
                rows.append(
                    {"workload": workload, "variant": work.name, "per_minute": rate, "gpus": gpus, "cost": cost}
                    | asdict(found)
                )
                cells.append(f" {gpus} | {found.p50_s:.1f}, {found.p95_s:.1f} | {cost:.2f} |")
            parts.append(f"| {rate:,} |" + "".join(cells))
        parts.append("")
    run = {"command": "python benchmarks/scaling.py plan", "times": H100, "price_per_hour": PRICE_PER_HOUR}
    (RESULTS / "scaling-plan.json").write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n")
    _between("plan", "\n".join(parts))
    _plot(rows)


def _between(name: str, text: str) -> None:
    """Puts a part into docs/scaling.md, between its marks."""
    file = DOCS / "scaling.md"
    head, _, rest = file.read_text().partition(f"<!-- {name} -->\n")
    tail = rest.partition(f"<!-- end of {name} -->")[2]
    file.write_text(f"{head}<!-- {name} -->\n{text.strip()}\n<!-- end of {name} -->{tail}")


def _plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    work = measured("t2i-1024")
    colours = dict(zip([w.name for w in work], ("#4a5568", "#2f8f83", "#d23f17"), strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, colour in colours.items():
        mine = [row for row in rows if row["workload"] == "t2i-1024" and row["variant"] == name]
        left.loglog([row["per_minute"] for row in mine], [row["gpus"] for row in mine], "o-", color=colour, label=name)
    left.set(xlabel="requests a minute", ylabel="H100s", title="GPUs for p95 of at most 10 s, 1024x1024 from text")
    left.legend(frameon=False)
    shares = np.linspace(0.3, 0.99, 16)
    for gpus, style in ((1, "-"), (4, "--"), (16, ":")):
        fast = work[-1]
        found = [
            simulate(poisson(share * gpus * 60 / fast.seconds, 6000, 3), gpus, fast.service(4), 1, 10**9)
            for share in shares
        ]
        right.plot(
            shares * 100,
            [one.p95_s for one in found],
            style,
            color=colours[fast.name],
            label=f"{gpus} GPU{'s' * (gpus > 1)}",
        )
    right.set(
        xlabel="load, % of what the GPUs can do",
        ylabel="p95, s",
        title="Latency by load, every other step cached",
        ylim=(0, 30),
    )
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "assets/scaling.png", dpi=110)


# The check.


@dataclass(slots=True)
class Seen:
    """One request to the real server."""

    arrival: float
    latency: float | None = None  # None: refused
    batch: int = 0
    service_s: float = 0.0


async def load(url: str, arrivals: Sequence[float], steps: int) -> list[Seen]:
    """Asks for a picture at each of these times, whatever became of the ones before."""
    import httpx2

    seen = [Seen(at) for at in arrivals]
    begin = time.monotonic()

    async def one(client: httpx2.AsyncClient, index: int) -> None:
        await asyncio.sleep(max(0.0, begin + arrivals[index] - time.monotonic()))
        start = time.monotonic()
        seen[index].arrival = start - begin
        fields = {"prompt": "octopus, fluent style", "steps": steps, "stream": True}
        async with client.stream("POST", "/inference", json=fields) as answer:
            if answer.status_code == 429:
                return
            answer.raise_for_status()
            name = ""
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: ") and name in ("begun", "picture"):
                    values = json.loads(line.removeprefix("data: "))
                    if name == "begun":
                        seen[index].batch = values["batch"]
                    else:
                        times = values["timings_s"]
                        seen[index].service_s = sum(times[stage] for stage in ("prepare", "denoise", "decode"))
                        seen[index].latency = time.monotonic() - start

    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=httpx2.Limits(max_connections=500)) as client:
        await asyncio.gather(*(one(client, index) for index in range(len(arrivals))))
    return seen


def compared(seen: list[Seen], max_batch: int, waiting: int) -> tuple[Outcome, Outcome]:
    """What was measured, and what is simulated from the same arrivals and the batches' times of the same run."""
    served = [one for one in seen if one.latency is not None]
    latencies = [one.latency for one in served]
    p50, p95 = np.percentile(latencies, (50, 95))
    end = max(one.arrival + one.latency for one in served if one.latency is not None)
    real = Outcome(
        len(seen), 1 - len(served) / len(seen), float(p50), float(p95), sum(o.service_s / o.batch for o in served) / end
    )
    draw = np.random.default_rng(5)
    by_batch = {size: [o.service_s for o in served if o.batch == size] for size in range(1, max_batch + 1)}
    known = [size for size, times in by_batch.items() if times]

    def service(batch: int) -> float:
        near = min(known, key=lambda size: abs(size - batch))
        return float(draw.choice(by_batch[near]))

    arrivals = sorted(one.arrival for one in seen)
    runs = [simulate(arrivals, 1, service, max_batch, waiting) for _ in range(20)]
    medians = {
        name: float(np.median([asdict(run)[name] for run in runs])) for name in ("rejected", "p50_s", "p95_s", "busy")
    }
    return real, Outcome(requests=len(seen), **medians)


def check(requests: int, steps: int, waiting: int, max_batch: int, out: Path) -> None:
    """Starts a server with the embedded model, finds its pace, and loads it below, near and above that."""
    environment = os.environ | {
        "FLUXFIRE_QUEUE_COST": str(waiting * steps * 128 * 128),
        "FLUXFIRE_MAX_BATCH": str(max_batch),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", "from fluxfire.cli import main; main(['serve', '--port', '0'])"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout
        url = json.loads(server.stdout.readline())["url"]
        _until_ready(url)
        alone = [asyncio.run(load(url, [0.0], steps))[0] for _ in range(6)][1:]  # the first is a warm-up
        pace = float(np.median([one.service_s for one in alone]))
        rows = []
        for share in (0.5, 0.9, 1.5, 3.0):
            arrivals = poisson(share * 60 / pace, requests, seed=int(share * 10))
            real, simulated = compared(asyncio.run(load(url, arrivals, steps)), max_batch, waiting)
            rows.append({"share": share, "measured": asdict(real), "simulated": asdict(simulated)})
            print(f"{share:.1f} x one at a time: measured {real}; simulated {simulated}", file=sys.stderr, flush=True)
        about = {"command": f"python benchmarks/scaling.py check --requests {requests} --steps {steps}"}
        about |= {"waiting": waiting, "max_batch": max_batch, "alone_s": pace}
        out.write_text(json.dumps({"run": about, "rows": rows}, indent=1) + "\n")
        _between("check", check_table(rows))
    finally:
        server.terminate()
        server.wait(60)


def check_table(rows: list[dict[str, Any]]) -> str:
    """Measured and simulated beside each other."""
    lines = ["| load | p50 s | simulated | p95 s | simulated | refused | simulated |", "|---:|" + "---:|" * 6]
    for row in rows:
        cells = [f"{row['share']:g} x"]
        for name, form in (("p50_s", ".2f"), ("p95_s", ".2f"), ("rejected", ".0%")):
            cells += [format(row[which][name], form) for which in ("measured", "simulated")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _until_ready(url: str) -> None:
    import httpx2

    for _ in range(600):
        if httpx2.get(f"{url}/readyz").status_code == 200:
            return
        time.sleep(0.5)
    raise SystemExit("the server did not get ready within 300 s")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "check"))
    parser.add_argument("--requests", type=int, default=60, help="of each load of the check")
    parser.add_argument("--steps", type=int, default=8, help="of a picture of the check")
    parser.add_argument("--waiting", type=int, default=8, help="pictures that the checked server's queue takes")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling-check.json")
    given = parser.parse_args()
    if given.what == "plan":
        plan()
    else:
        check(given.requests, given.steps, given.waiting, given.max_batch, given.out)


if __name__ == "__main__":
    main()
