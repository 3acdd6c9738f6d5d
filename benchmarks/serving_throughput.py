"""For `serving.py`: pictures a minute of FLUX.1 at full size, one at a time and four, split by stage. A GPU's part.

A row is a served model (`serving_model.py`) and what is asked of it: every step computed (threshold 0), or the model's
own threshold, at which every other step hits. So a server gives several rows. All servers are started at once and
import together; then each waits until the one before it has ended, and nothing else runs while one is measured.

Two clients keep the worker busy. The clock starts when a request of few steps is answered, while the next is under way.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, Final

from serving_server import Server, wait_until

STEPS: Final = 28
REQUESTS: Final = {1: 4, 4: 2}  # by pictures a request
ROWS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "full": ("full", {"cache_threshold": 0}),
    "full_half": ("full", {}),
    "full_float8": ("full_float8", {"cache_threshold": 0}),
    "full_float8_half": ("full_float8", {}),
    "tiny": ("tiny", {"cache_threshold": 0}),
    "tiny_half": ("tiny", {}),
}
MEASURED: Final = ("full_float8_half", "full_half", "full")  # the target first, should the time run out


def throughput(names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Measures rows by name, and gives each as soon as it is there."""
    served = list(dict.fromkeys(ROWS[name][0] for name in names))
    servers = {model: _start(model) for model in served}
    try:
        for model in served:
            server, begin = servers[model], time.monotonic()
            server.held(False)
            server.wait_ready()
            about = _phases(server) | {"ready_s": round(time.monotonic() - begin, 1)}
            print(f"{model}: {about}", file=sys.stderr)
            for name in (name for name in names if ROWS[name][0] == model):
                for batch in REQUESTS:
                    yield {"model": name, "batch": batch} | _measured(server, batch, ROWS[name][1]) | about
            server.terminate()
    finally:
        for server in servers.values():
            server.terminate()


def _start(model: str) -> Server:
    side = 32 if model == "tiny" else 1024
    name = f"serving_model:{model}"
    return Server(shut=True, model=name, device="auto", warm_sizes=[[side, side]], max_batch=max(REQUESTS))


def _phases(server: Server) -> dict[str, float]:
    """What the model's function has told of its start, in seconds."""
    mark = "serving_model took "
    line = next(line for line in server.log().splitlines() if mark in line)
    phases: dict[str, float] = json.loads(line.split(mark)[1])
    return phases


def _measured(server: Server, batch: int, fields: dict[str, Any]) -> dict[str, Any]:
    fields = {"num_images": batch} | fields

    def ask(seed: int, steps: int = STEPS) -> list[dict[str, Any]]:
        return list(server.ask(seed=seed, steps=steps, **fields).raise_for_status().json()["pictures"])

    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(ask, 0, 4)
        wait_until(lambda: first.done() or server.metric("running_pictures"))
        answers = [clients.submit(ask, seed) for seed in range(REQUESTS[batch])]
        first.result()
        begin = time.monotonic()
        made = [picture for answer in answers for picture in answer.result()]
        seconds = time.monotonic() - begin
    stages = {stage: round(median(one["timings_s"][stage] for one in made), 3) for stage in made[0]["timings_s"]}
    return {
        "pictures": len(made),
        "pictures_a_minute": round(60 * len(made) / seconds, 1),
        "stages_s_a_batch": stages,
        "cached_steps": made[0]["cached_steps"],
        "computed_steps": made[0]["computed_steps"],
        "recompilations": int(server.metric("recompilations")),
        "gpu_used_gib": round(server.metric("gpu_used_bytes") / 2**30, 1),
    }
