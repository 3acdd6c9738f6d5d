"""What `fluxfire serve` holds out, and what it costs: floods, kills, signals, fuzzing, bombs, a soak, latency.

    python benchmarks/serving.py                          every part that a CPU can do and that is not done
    python benchmarks/serving.py --parts bombs,flood      these, anew
    python benchmarks/serving.py --small --out /tmp/try   a few of everything, to see that it works
    python benchmarks/serving.py --table                  writes the results into docs/serving.md
    python benchmarks/serving.py --parts throughput       needs a GPU, which it fills: 12 B parameters; 6 minutes

Each part starts servers of its own on 127.0.0.1, counts what it does and stops by itself; its results are written when
it ends. Servers are forked from a process that has imported everything: a hundred starts are not a hundred imports.
Parts that only concern the server have a worker without a model (`tests/stub_worker.py`), as their results say; all
others have the embedded model. Needs the extra `dev`, and `schemathesis` for the part of that name.

Counts and memory hold on a busy machine; times do not. So each part notes the load, and times are told beside those of
the same run's other half (idle and generating, or the model's own share).
"""

from __future__ import annotations

import argparse
import base64
import datetime
import io
import json
import multiprocessing
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import psutil
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks")]

PROMPT = "teapot, noto style"
KEY = "benchmark-0123456789"
WAIT_S = 600
MODEL_STAGES = ("prepare", "denoise", "previews", "decode")
FORKS = multiprocessing.get_context("forkserver")


def _serve(settings: dict[str, Any], environment: dict[str, str], stub: bool, folder: str) -> None:
    """In the server's process."""
    os.environ.update(environment)
    sys.stdout, sys.stderr = open(f"{folder}/out", "w"), open(f"{folder}/log", "w")  # noqa: SIM115
    from fluxfire.serve import process, server
    from fluxfire.serve.settings import Settings

    if stub:
        process.COMMAND = (sys.executable, "-S", str(ROOT / "tests" / "stub_worker.py"))
    reason = server.serve(Settings(_env_file=None, **settings))  # type: ignore[call-arg]
    sys.exit(reason)


class Server:
    """A running server, warm."""

    def __init__(self, *, stub: bool = False, **settings: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fluxfire-serving-"))
        small = {"device": "cpu", "compile": False, "warm_sizes": [[48, 32]], "port": 0}
        settings = small | {"storage_dir": str(self.folder / "pictures")} | settings
        paths = [*(str(ROOT / name) for name in ("src", "tests", "benchmarks")), os.environ.get("PYTHONPATH", "")]
        environment = {"FLUXTEST_GATES": str(self.folder), "PYTHONPATH": os.pathsep.join(paths)}
        begin = time.monotonic()
        self._process = FORKS.Process(target=_serve, args=(settings, environment, stub, str(self.folder)))
        self._process.start()
        wait_until(lambda: (self.folder / "out").exists() and (self.folder / "out").read_text().endswith("\n"))
        self.url = json.loads((self.folder / "out").read_text())["url"]
        self.http = httpx2.Client(base_url=self.url, timeout=WAIT_S, headers={"Authorization": f"Bearer {KEY}"})
        wait_until(lambda: self.http.get("/readyz").status_code == 200 or self._process.exitcode is not None)
        assert self._process.exitcode is None, (self.folder / "log").read_text()
        self.started_s = time.monotonic() - begin
        self.process = psutil.Process(self._process.pid)

    @property
    def worker(self) -> psutil.Process:
        """Its worker's process."""
        return self.process.children()[0]

    def ask(self, **fields: Any) -> httpx2.Response:
        """`POST /inference`."""
        return self.http.post("/inference", json={"prompt": PROMPT} | fields)

    def metrics(self) -> dict[str, float]:
        """Every number of /metrics by its name with labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}

    def metric(self, name: str) -> float:
        """One of them."""
        return self.metrics().get(f"fluxfire_{name}", 0.0)

    def held(self, shut: bool) -> None:
        """Whether the stub's requests that say "held" stay where they are."""
        gate = self.folder / "held"
        gate.touch() if shut else gate.unlink()

    def terminate(self) -> int | None:
        """SIGTERM; the exit status."""
        os.kill(self.process.pid, signal.SIGTERM)
        self._process.join(WAIT_S)
        self.http.close()
        return self._process.exitcode


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """A server until the end of this."""
    server = Server(**settings)
    try:
        yield server
    finally:
        server.terminate()


def wait_until(true: Callable[[], Any]) -> None:
    """Waits for another process."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def mib(process: psutil.Process) -> float:
    """Resident memory."""
    return float(round(process.memory_info().rss / 2**20, 1))


def quantile(values: list[float], share: float) -> float:
    """The value below which this share of the values is."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def ms(seconds: float) -> float:
    """Milliseconds, rounded."""
    return round(seconds * 1000, 2)


def png(side: int, colour: str) -> str:
    """A picture in base64."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# --- the parts: each takes whether only a few of everything are wanted, and gives its results


def flood(small: bool) -> dict[str, Any]:
    """Requests that are refused, in every way there is; half of them while the queue is full."""
    import bombs

    count = 400 if small else 5000
    keys = [{"name": "bench", "key": KEY}]
    harm = [base64.b64encode(data).decode() for data in bombs.corpus().values() if len(data) < 2**19]
    posts: list[tuple[str, dict[str, Any]]] = [
        ("/inference", {"json": {"prompt": "a"}, "headers": {"Authorization": "Bearer wrong"}}),
        ("/inference", {"content": bytes(2**20 + 1)}),
        ("/inference", {"json": {"prompt": "a", "wdith": 16}}),
        ("/inference", {"json": {"prompt": "a", "image": "http://127.0.0.1:1/a.png"}}),
        ("/inference", {"json": {"prompt": "a", "width": 2**20}}),
        ("/v1/images/generations", {"json": {"prompt": "a", "size": "1x1"}}),
        ("/v1/images/edits", {"data": {"prompt": "a"}, "files": {"image": ("a.png", b"GIF89a" + bytes(2**18))}}),
        ("/nothing", {"json": {}}),
        *(("/inference", {"json": {"prompt": "a", "image": data}}) for data in harm),
    ]
    statuses: Counter[int] = Counter()
    with (
        serving(stub=True, api_keys=keys, queue_cost=256, max_body_bytes=2**20) as server,
        ThreadPoolExecutor(2) as held,
        ThreadPoolExecutor(16) as pool,
    ):

        def send(number: int) -> int:
            path, body = posts[number % len(posts)]
            return server.http.post(path, **body).status_code

        start = mib(server.process)
        statuses.update(tqdm(pool.map(send, range(count // 20)), total=count // 20, desc="flood: first"))
        first = highest = mib(server.process)
        for full in (False, True):
            if full:
                server.held(True)
                waiting = [held.submit(server.ask, prompt="held")]
                wait_until(lambda: server.metric("running_pictures") == 1)
                waiting.append(held.submit(server.ask, prompt="held"))
                wait_until(lambda: server.metric("queue_pictures") == 1)
            for block in tqdm(range(10), desc=f"flood: queue {'full' if full else 'empty'}"):
                statuses.update(pool.map(send, range(block, block + count // 20)))
                highest = max(highest, mib(server.process))
        end = mib(server.process)
        server.held(False)
        taken = [future.result().status_code for future in waiting]
    return {
        "worker": "stub",
        "requests": sum(statuses.values()),
        "refused": sum(number for status, number in statuses.items() if 400 <= status < 500),
        "statuses": {str(status): statuses[status] for status in sorted(statuses)},
        "rss_mib_start": start,
        "rss_mib_after_5_percent": first,
        "rss_mib_highest": highest,
        "rss_mib_end": end,
        "growth_mib": round(highest - start, 1),
        "taken_before_and_done_after": taken == [200, 200],
    }


def mixed(small: bool) -> dict[str, Any]:
    """Requests of many kinds one after the other, then all at once: the same pictures?"""
    count, chance = 8 if small else 64, random.Random(1)
    images = [None, None, png(64, "red"), png(96, "navy")]
    asks = [
        {
            "seed": number,
            "prompt": chance.choice([PROMPT, "red apple, twemoji style", "cat"]),
            "width": chance.choice([64, 96]),
            "height": chance.choice([64, 96]),
            "steps": chance.choice([3, 6]),
            "cache_threshold": chance.choice([0, 0.3]),
            "num_images": chance.choice([1, 1, 2]),
            "image": chance.choice(images),
        }
        for number in range(count)
    ]
    with serving() as server, ThreadPoolExecutor(count) as pool:
        alone = [server.ask(**fields).json()["pictures"] for fields in tqdm(asks, desc="mixed: one by one")]
        before = server.metrics()
        futures = [pool.submit(server.ask, **fields) for fields in asks]
        together = [future.result().json()["pictures"] for future in tqdm(futures, desc="mixed: at once")]
        after = server.metrics()
    pairs = [pair for one, other in zip(alone, together, strict=True) for pair in zip(one, other, strict=True)]
    return {
        "requests": count,
        "pictures": len(pairs),
        "batches": int(after["fluxfire_batch_pictures_count"] - before["fluxfire_batch_pictures_count"]),
        "equal_to_the_bit": sum(one["base64"] == other["base64"] for one, other in pairs),
        "most_difference_of_256_levels": max(_difference(one["base64"], other["base64"]) for one, other in pairs),
        "other_cache_decisions": sum(one["cached_steps"] != other["cached_steps"] for one, other in pairs),
    }


def _difference(one: str, other: str) -> int:
    import numpy as np

    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=int) for text in (one, other))
    return int(np.abs(a - b).max())


def kills(small: bool) -> dict[str, Any]:
    """The worker killed in the middle of a picture, again and again."""
    count = 2 if small else 50
    waits, again, lost = [], [], Counter[int]()
    with serving(max_batch=1) as server, ThreadPoolExecutor(1) as pool:
        files = server.process.num_fds()
        for _ in tqdm(range(count), desc="kills"):
            future = pool.submit(server.ask, steps=100)
            wait_until(lambda: server.metric("running_pictures") == 1)
            server.worker.kill()
            begin = time.monotonic()
            lost[future.result().status_code] += 1
            waits.append(time.monotonic() - begin)
            wait_until(lambda: server.http.get("/readyz").status_code == 200)
            again.append(time.monotonic() - begin)
            assert server.ask(steps=1, width=16, height=16).status_code == 200
        restarts, files_after = server.metric("worker_restarts_total"), server.process.num_fds()
    return {
        "kills": count,
        "answered_503": lost[503],
        "until_503_ms_median": ms(median(waits)),
        "until_503_ms_most": ms(max(waits)),
        "next_request_works": count,
        "restarts": int(restarts),
        "until_ready_again_s_median": round(median(again), 1),
        "descriptors_before_and_after": [files, files_after],
    }


def signals(small: bool) -> dict[str, Any]:
    """SIGTERM with a picture under way, one in the queue and a client that reads slowly: is every body whole?"""
    count, whole, not_ready, statuses = 3 if small else 100, 0, 0, Counter[str]()
    fields = {"width": 512, "height": 512, "prompt": "held noise"}
    for _ in tqdm(range(count), desc="signals"):
        server = Server(stub=True)
        worker = server.worker
        with ThreadPoolExecutor(3) as pool:
            server.held(True)
            answers = [pool.submit(_slowly, server.url, fields | {"output": "bytes"})]
            wait_until(lambda server=server: server.metric("running_pictures") == 1)
            answers.append(pool.submit(_slowly, server.url, fields | {"seed": 1}))
            answers.append(pool.submit(_slowly, server.url, fields | {"seed": 2, "stream": True, "steps": 2}))
            wait_until(lambda server=server: server.metric("queue_pictures") == 2)
            os.kill(server.process.pid, signal.SIGTERM)
            wait_until(lambda server=server: server.http.get("/readyz").status_code == 503)
            not_ready += 1
            server.held(False)
            bodies = [future.result() for future in answers]
        streamed = json.loads(bodies[2].split(b"data: ")[-1])["base64"]
        pictures = [
            bodies[0],
            base64.b64decode(json.loads(bodies[1])["pictures"][0]["base64"]),
            base64.b64decode(streamed),
        ]
        for picture in pictures:
            Image.open(io.BytesIO(picture)).load()  # raises when something is missing
            whole += 1
        server._process.join(WAIT_S)
        statuses[str(server._process.exitcode)] += 1
        assert not worker.is_running()
        server.http.close()
    result = {"worker": "stub", "cycles": count, "not_ready_at_once": not_ready, "whole_bodies": whole}
    return result | {"of_bodies": 3 * count, "exit_statuses": dict(statuses)}


def _post(url: str, fields: dict[str, Any]) -> socket.socket:
    """A request whose answer is not read."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(fields).encode()
    head = f"POST /inference HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection((host, int(port)), timeout=WAIT_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.sendall(f"{head}\r\n\r\n".encode() + body)
    return connection


def _slowly(url: str, fields: dict[str, Any]) -> bytes:
    """A client that takes its time for the answer, by hand: the body as the headers say it, or all of its chunks."""
    with _post(url, fields) as connection:
        file = connection.makefile("rb")
        assert b" 200 " in file.readline()
        headers = dict(line.strip().lower().split(b": ", 1) for line in iter(file.readline, b"\r\n"))
        left, data = int(headers.get(b"content-length", -1)), b""
        while left < 0:  # in chunks
            size = int(file.readline(), 16)
            data += file.read(size)
            file.readline()
            if not size:
                return data
        while len(data) < left:
            got = file.read(min(65536, left - len(data)))
            assert got, f"cut after {len(data)} of {left} bytes"
            data += got
            time.sleep(0.005)
        return data


def fuzzing(small: bool) -> dict[str, Any]:
    """Schemathesis makes requests from the OpenAPI description, right ones and wrong ones."""
    wanted, seed, failed = 200 if small else 5000, 0, 0
    routes = ("/inference", "/v1/images/generations", "/v1/images/edits")
    with serving(max_pixels=32 * 32, max_steps=2, max_pictures=2) as server, tqdm(total=wanted, desc="fuzzing") as bar:
        statuses: Counter[str] = Counter()
        while (cases := sum(statuses.values())) < wanted and seed < 12:
            bar.update(cases - bar.n)
            seed += 1
            command = [str(Path(sys.executable).parent / "st"), "run", f"{server.url}/openapi.json", "--no-color"]
            options = {"checks": "not_a_server_error", "max-examples": wanted // 4, "seed": seed, "workers": 2}
            options |= {"phases": "examples,coverage,fuzzing", "generation-database": "none", "max-time": 600}
            options |= {"request-timeout": 120, "include-path-regex": "inference|images"}
            run = subprocess.run(
                [*command, *(f"--{name}={value}" for name, value in options.items())],
                cwd=server.folder,
                capture_output=True,
                text=True,
            )
            if run.returncode:
                failed += 1
                print(run.stdout[-6000:], run.stderr[-2000:], file=sys.stderr)
            statuses = Counter()
            for name, value in server.metrics().items():
                if name.startswith("fluxfire_requests_total") and any(f'route="{route}"' in name for route in routes):
                    statuses[name.split('status="')[1][:3]] += int(value)
        alive = server.ask(steps=1, width=16, height=16).status_code
    return {
        "cases": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "server_errors": sum(number for status, number in statuses.items() if status >= "500"),
        "runs_with_failures": failed,
        "next_request_works": alive == 200,
    }


def bombing(small: bool) -> dict[str, Any]:
    """Every bomb, each in a new process: what refusing it takes."""
    import bombs

    FORKS.set_forkserver_preload(["fluxfire.serve.server", "fluxfire.serve.pictures", "bombs"])
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


def soak(small: bool) -> dict[str, Any]:
    """Thousands of small pictures, with wrong requests, clients that go and repeated keys among them."""
    count, samples, chance = 100 if small else 2000, [], random.Random(2)
    with serving(idempotency_s=10, url_s=10) as server, ThreadPoolExecutor(6) as pool:

        def one(number: int) -> str:
            side = chance.choice([16, 32, 48, 64])
            fields: dict[str, Any] = {"width": side, "height": side, "steps": chance.choice([1, 2, 3]), "seed": number}
            fields |= {"cache_threshold": chance.choice([0, 0.2]), "output": chance.choice(["base64", "url", "bytes"])}
            if number % 5 == 0:
                fields["image"] = png(side, "teal")
            if number % 10 == 1:
                server.ask(wdith=side)
            if number % 10 == 2:
                with _post(server.url, fields | {"prompt": "leaves", "steps": 50, "output": "base64"}):
                    time.sleep(0.05)
            headers = {"Idempotency-Key": str(number)} if number % 10 == 3 else {}
            answer = server.http.post("/inference", json={"prompt": PROMPT} | fields, headers=headers)
            return str(answer.status_code)

        statuses: Counter[str] = Counter()
        blocks = range(0, count, max(10, count // 20))
        for block in tqdm(blocks, desc="soak"):
            statuses.update(pool.map(one, range(block, block + blocks.step)))
            row = {"pictures": sum(statuses.values())}
            for name, process in (("server", server.process), ("worker", server.worker)):
                row |= {f"{name}_rss_mib": mib(process), f"{name}_descriptors": process.num_fds()}
                row |= {f"{name}_threads": process.num_threads()}
            samples.append(row)
        gone = server.metric('rejections_total{code="client_gone"}')
    third = samples[len(samples) // 3 :]
    growth = {
        f"{who}_growth_mib_in_last_two_thirds": round(third[-1][f"{who}_rss_mib"] - third[0][f"{who}_rss_mib"], 1)
        for who in ("server", "worker")
    }
    flat = {
        f"{name}_least_and_most": [min(row[name] for row in third), max(row[name] for row in third)]
        for name in ("server_descriptors", "server_threads", "worker_descriptors", "worker_threads")
    }
    result = {"pictures": sum(statuses.values()), "statuses": dict(statuses), "clients_that_left": int(gone)}
    return result | growth | flat | {"samples": samples}


def overhead(small: bool) -> dict[str, Any]:
    """What a request takes beyond the model's own stages, by the client's clock and by the server's CPU time."""
    count = 20 if small else 300
    with serving(max_batch=1, warm_sizes=[[128, 128]]) as server:
        for _ in range(5):
            server.ask(steps=2)
        over, encode = [], []
        cpu = server.process.cpu_times()
        for number in tqdm(range(count), desc="overhead"):
            begin = time.perf_counter()
            answer = server.ask(steps=2, seed=number)
            whole, times = time.perf_counter() - begin, answer.json()["pictures"][0]["timings_s"]
            over.append(whole - sum(times[stage] for stage in MODEL_STAGES))
            encode.append(times["encode"])
        used = server.process.cpu_times()
    cpu_s = (used.user + used.system - cpu.user - cpu.system) / count
    return {
        "requests": count,
        "over_the_model_ms_median": ms(median(over)),
        "over_the_model_ms_p90": ms(quantile(over, 0.9)),
        "over_the_model_ms_least": ms(min(over)),
        "of_it_encoding_ms_median": ms(median(encode)),
        "cpu_of_the_server_ms_a_request": ms(cpu_s),
    }


def health(small: bool) -> dict[str, Any]:
    """How fast /livez answers, idle and while pictures are made, in turns."""
    rounds, each = (2, 100) if small else (10, 200)
    times: dict[str, list[float]] = {"idle": [], "generating": []}
    with serving() as server, ThreadPoolExecutor(2) as pool:
        for _ in tqdm(range(rounds), desc="health"):
            for name in times:
                made = []
                if name == "generating":
                    made = [pool.submit(server.ask, steps=100, seed=seed) for seed in range(2)]
                    wait_until(lambda: server.metric("running_pictures") > 0)
                for _ in range(each):
                    begin = time.perf_counter()
                    assert server.http.get("/livez").status_code == 200
                    times[name].append(time.perf_counter() - begin)
                    time.sleep(0.005)
                    if made and all(future.done() for future in made):
                        made = [pool.submit(server.ask, steps=100, seed=seed) for seed in range(2)]
                for future in made:
                    future.result()
    result: dict[str, Any] = {"requests_each": rounds * each}
    for name, values in times.items():
        result |= {f"{name}_ms_{label}": ms(quantile(values, q)) for label, q in (("p50", 0.5), ("p99", 0.99))}
        result[f"{name}_ms_most"] = ms(max(values))
    return result


def throughput(small: bool) -> dict[str, Any]:
    """Pictures a minute from text at full size, one at a time and four, split by stage. A GPU's part."""
    import torch

    on_gpu = torch.cuda.is_available()
    assert on_gpu or small, "throughput needs a GPU; --small tries it out on a CPU"
    names = ("full", "full_half", "full_float8_half") if on_gpu and not small else ("tiny", "tiny_half")
    side, device = 32 if names[0] == "tiny" else 1024, "cuda" if on_gpu else "cpu"
    rows = []
    for name in names:
        options = {"model": f"serving_model:{name}", "device": device, "warm_sizes": [[side, side]], "max_batch": 4}
        with serving(**options) as server, ThreadPoolExecutor(2) as pool:
            for batch, requests in ((1, 8), (4, 3)):

                def ask(seed: int, batch: int = batch, server: Server = server) -> list[dict[str, Any]]:
                    answer = server.ask(num_images=batch, steps=28, seed=seed)
                    return list(answer.raise_for_status().json()["pictures"])

                ask(0)
                begin = time.monotonic()  # two clients, so that the worker always has something to do
                made = [picture for answer in pool.map(ask, range(requests)) for picture in answer]
                seconds = time.monotonic() - begin
                stages = {
                    stage: round(median(p["timings_s"][stage] for p in made), 4) for stage in made[0]["timings_s"]
                }
                row = {"model": name, "batch": batch, "pictures": len(made), "ready_s": round(server.started_s, 1)}
                row |= {"pictures_a_minute": round(60 * len(made) / seconds, 1), "stages_s_a_batch": stages}
                rows.append(
                    row | {"cached_steps": made[0]["cached_steps"], "computed_steps": made[0]["computed_steps"]}
                )
                tqdm.write(json.dumps(rows[-1]), file=sys.stderr)
    return {"side_px": side, "steps": 28, "gpu": torch.cuda.get_device_name() if on_gpu else None, "rows": rows}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    part.__name__: part for part in (bombing, flood, mixed, overhead, health, signals, fuzzing, soak, kills, throughput)
}


def main() -> None:
    """Runs parts, keeps results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="", help=f"of {', '.join(PARTS)}; comma-separated")
    parser.add_argument("--small", action="store_true", help="a few of everything")
    parser.add_argument("--table", action="store_true", help="write the newest results into docs/serving.md")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.table:
        return write_table(options.out)
    file = newest(options.out)
    results = json.loads(file.read_text()) if file else {}
    named = [name for name in options.parts.split(",") if name]
    if unknown := set(named) - set(PARTS):
        parser.error(f"found {', '.join(sorted(unknown))}, needed some of {', '.join(PARTS)}")
    FORKS.set_forkserver_preload(["fluxfire.serve.server", "fluxfire.serve.pictures", "bombs"])
    for name in named or [name for name in PARTS if name != "throughput" and name not in results.get("parts", {})]:
        begin, load = time.monotonic(), os.getloadavg()[0]
        result = PARTS[name](options.small)
        about = {"date": datetime.date.today().isoformat(), "seconds": round(time.monotonic() - begin, 1)}
        about |= {"load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)], "small": options.small}
        file = newest(options.out) or options.out / f"serving_cpu_{datetime.date.today()}.json"
        results = json.loads(file.read_text()) if file.exists() else {"machine": machine(), "parts": {}}
        results["parts"][name] = result | about
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: {key: value for key, value in result.items() if key not in ("each", "samples")}}))


def newest(folder: Path) -> Path | None:
    """The last results there are."""
    return max(folder.glob("serving_cpu_*.json"), default=None)


def machine() -> dict[str, Any]:
    """Where this ran."""
    import torch

    about = {"system": platform.platform(terse=True), "cores": os.cpu_count(), "python": platform.python_version()}
    return about | {"torch": torch.__version__}


def write_table(folder: Path) -> None:
    """The results as a table in docs/serving.md."""
    file, page = newest(folder), ROOT / "docs" / "serving.md"
    assert file, f"no results in {folder}"
    results = json.loads(file.read_text())
    lines = [f"From `benchmarks/results/{file.name}`, made by `python benchmarks/serving.py`; do not edit.", ""]
    lines += ["| part | what | found | load of the machine |", "|---|---|---|---|"]
    for name, part in PARTS.items():
        if found := results["parts"].get(name):
            about = {"date", "seconds", "load_before_and_after", "small", "each", "samples", "rows"}
            facts = "; ".join(
                f"{key.replace('_', ' ')} {_cell(value)}" for key, value in found.items() if key not in about
            )
            load = " to ".join(map(str, found["load_before_and_after"]))
            lines.append(f"| {name} | {part.__doc__} | {facts} | {load} |")
    text = page.read_text()
    begin, end = (text.index(f"<!-- {mark} -->") for mark in ("measured", "/measured"))
    page.write_text(text[:begin] + "<!-- measured -->\n\n" + "\n".join(lines) + "\n\n" + text[end:])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {number}" for key, number in value.items())
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
