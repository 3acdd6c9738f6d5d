"""For `serving.py`: many requests. Do they get what they should, and does the server stay as it was?"""

from __future__ import annotations

import base64
import io
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from serving_server import KEY, PROMPT, mib, png, post, serving, wait_until
from tqdm import tqdm


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
                with post(server.url, fields | {"prompt": "leaves", "steps": 50, "output": "base64"}):
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
