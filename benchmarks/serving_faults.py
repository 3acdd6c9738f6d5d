"""For `serving.py`: what goes wrong. Workers die, servers are told to stop, clients leave."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from PIL import Image
from serving_server import PROMPT, Server, ms, post, serving, wait_until
from tqdm import tqdm


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
        server = Server(stub=True).wait_ready()
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
        statuses[str(server.join())] += 1
        assert not worker.is_running()
    result = {"worker": "stub", "cycles": count, "not_ready_at_once": not_ready, "whole_bodies": whole}
    return result | {"of_bodies": 3 * count, "exit_statuses": dict(statuses)}


def _slowly(url: str, fields: dict[str, Any]) -> bytes:
    """A client that takes its time for the answer, by hand: the body as the headers say it, or all of its chunks."""
    with post(url, fields) as connection:
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


def leaving(small: bool) -> dict[str, Any]:
    """Clients that disconnect in the middle of a picture of 100 steps: what does the worker still do for them?"""
    count, steps_after = 3 if small else 100, Counter[int]()
    fields = {"prompt": PROMPT, "steps": 100, "width": 512, "height": 512, "stream": True}  # slow steps
    with serving(warm_sizes=[[512, 512]]) as server:
        for number in tqdm(range(count), desc="leaving"):
            before = server.metric("denoising_steps_total")
            seen, wanted = 0, 1 + number % 10
            with post(server.url, fields) as connection:
                for line in connection.makefile("rb"):
                    seen += line == b"event: step\n"
                    if seen == wanted:
                        break
            assert seen == wanted
            wait_until(lambda: server.metric("running_pictures") == 0)
            steps_after[int(server.metric("denoising_steps_total") - before) - seen] += 1
        gone, made = server.metric('rejections_total{code="client_gone"}'), server.metric("pictures_total")
        alive = server.ask(steps=1, width=16, height=16).status_code
    return {
        "clients": count,
        "steps_done_after_the_last_seen": {str(steps): steps_after[steps] for steps in sorted(steps_after)},
        "given_up": int(gone),
        "pictures_decoded": int(made),
        "next_request_works": alive == 200,
    }
