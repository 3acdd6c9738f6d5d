"""For `serving.py`: what the server adds to the model's own time, and whether it answers meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from serving_server import ms, quantile, serving, wait_until
from tqdm import tqdm

MODEL_STAGES = ("prepare", "denoise", "previews", "decode")


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
