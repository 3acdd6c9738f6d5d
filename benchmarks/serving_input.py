"""For `serving.py`: what is sent to it. Requests made up by schemathesis, and pictures made to do harm."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from serving_server import FORKS, ms, serving
from tqdm import tqdm


def fuzzing(small: bool) -> dict[str, Any]:
    """Schemathesis makes requests from the OpenAPI description, right ones and wrong ones."""
    program = Path(sys.executable).parent / "st"
    if not program.exists():
        sys.exit("found no schemathesis, which this part needs: pip install schemathesis==4.32.5")
    wanted, seed, stumbles = 200 if small else 5000, 0, 0
    judged: Counter[str] = Counter()
    routes = ("/inference", "/v1/images/generations", "/v1/images/edits")
    limits = {"max_pixels": 64 * 64, "max_steps": 4, "max_pictures": 2}
    with (
        serving(model="serving_model:embedded", warm_sizes=[[32, 32]], **limits) as server,
        tqdm(total=wanted, desc="fuzzing") as bar,
    ):
        statuses: Counter[str] = Counter()
        while (cases := sum(statuses.values())) < wanted and seed < 12:
            bar.update(cases - bar.n)
            seed += 1
            command = [str(program), "run", f"{server.url}/openapi.json", "--no-color"]
            options = {"checks": "not_a_server_error", "max-examples": wanted // 4, "seed": seed, "workers": 2}
            options |= {"phases": "examples,coverage,fuzzing", "generation-database": "none"}
            options["max-time"] = 30 if small else 300
            options |= {"request-timeout": 120, "include-path-regex": "inference|images"}
            run = subprocess.run(
                [*command, *(f"--{name}={value}" for name, value in options.items())],
                cwd=server.folder,
                capture_output=True,
                text=True,
            )
            counts = re.search(r"(\d+) generated(?:, (\d+) passed)?", run.stdout)
            judged.update(generated=int(counts[1]), passed=int(counts[2] or 0)) if counts else None
            if run.returncode:  # a case has failed; or schemathesis has: its generator stumbles over some binary fields
                stumbles += "Runtime Error" in run.stdout
                print(run.stdout[-6000:], run.stderr[-2000:], file=sys.stderr)
            statuses = Counter()
            for name, value in server.metrics().items():
                if name.startswith("fluxfire_requests_total") and any(f'route="{route}"' in name for route in routes):
                    statuses[name.split('status="')[1][:3]] += int(value)
        pictures = int(server.metric("pictures_total"))
        alive = server.ask(steps=1, width=16, height=16).status_code
    return {
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "pictures_made": pictures,
        "server_errors": sum(number for status, number in statuses.items() if status >= "500"),
        **judged,
        "errors_of_schemathesis_itself": stumbles,
        "next_request_works": alive == 200,
    }


def bombing(small: bool) -> dict[str, Any]:
    """Every bomb, each in a new process: what refusing it takes."""
    import bombs

    rows = {}
    for kind, corpus in (("bomb", bombs.corpus()), ("damaged", bombs.damaged())):
        for name, data in tqdm(corpus.items(), desc=kind):
            ours, theirs = FORKS.Pipe(False)
            process = FORKS.Process(target=_bomb, args=(kind, name, theirs))
            process.start()
            rows[name] = {"kind": kind, "bytes": len(data)} | ours.recv()
            process.join()
    refused = [row for row in rows.values() if row["kind"] == "bomb"]
    return {
        "worker": "none: the decoder alone",
        "bombs": len(refused),
        "refused": sum(row["refused"] for row in refused),
        "ms_most": max(row["ms"] for row in refused),
        "peak_mib_most": max(row["peak_mib"] for row in refused),
        "damaged": len(rows) - len(refused),
        "damaged_ms_most": max(row["ms"] for row in rows.values() if row["kind"] == "damaged"),
        "damaged_peak_mib_most": max(row["peak_mib"] for row in rows.values() if row["kind"] == "damaged"),
        "each": rows,
    }


def _bomb(kind: str, name: str, answer: Any) -> None:
    import resource

    import bombs

    from fluxfire.serve import pictures
    from fluxfire.serve.errors import ServeError

    data = (bombs.corpus() if kind == "bomb" else bombs.damaged())[name]
    for format in ("PNG", "JPEG", "WEBP"):  # the decoders' own memory
        pictures.decode(bombs.encoded(format), "image", 2**24)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins here
    before, refused, seconds = psutil.Process().memory_info().rss, False, []
    for _ in range(3):
        begin = time.perf_counter()
        try:
            pictures.reference(data, "image", 2**24, 128 * 128, 16)
        except ServeError:
            refused = True
        seconds.append(time.perf_counter() - begin)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer.send({"refused": refused, "ms": ms(min(seconds)), "peak_mib": round((peak - before) / 2**20, 1)})
