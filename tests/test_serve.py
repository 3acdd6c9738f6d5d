"""The server over real sockets, with the embedded model: what it gives, and that no request disturbs another."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from serving import (
    PROMPT,
    WAIT_S,
    Served,
    ask,
    batch_counts,
    lines,
    metric,
    open_picture,
    png,
    post_by_hand,
    wait_until,
)

from fluxfire import demo
from fluxfire.serve.jobs import STAGES

GONE = 'fluxfire_rejections_total{code="client_gone"}'


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_alive_and_not_ready_until_the_worker_is_warm(served: Served):
    assert served.cold == {"/livez": 200, "/readyz": 503, "/inference": 503}
    assert served.http.get("/readyz").json() == {"status": "ready"}


def test_sizes_that_are_given_are_warmed_with_a_reference_and_without(served: Served, serve_log: Path):
    assert served.engine._settings.warm_sizes == ((48, 32),)
    assert {line.split()[-1] for line in lines(serve_log, "step a|a|a|a ")} == {"6", "12"}  # tokens of 16 x 16 pixels


def test_inference_gives_pictures_seeds_times_and_cache_counts(served: Served):
    answer = ask(served, num_images=2, seed=7, steps=6, cache_threshold=0.3).json()
    assert [picture["seed"] for picture in answer["pictures"]] == [7, 8]
    for picture in answer["pictures"]:
        assert open_picture(picture["base64"]).size == (128, 128)
        assert picture["cached_steps"] + picture["computed_steps"] == 6
        assert picture["cached_steps"] > 0
        assert set(picture["timings_s"]) == {"queue", "prepare", "denoise", "previews", "decode", "encode"}
        assert all(seconds >= 0 for seconds in picture["timings_s"].values())
    assert (answer["model"], answer["steps"], answer["cache_threshold"]) == ("tested", 6, 0.3)


def test_served_picture_is_the_pipelines_own(served: Served):
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    import torch

    call = demo.call_kwargs() | {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(5)}
    own = np.asarray(pipe(prompt=PROMPT, **call).images[0])
    given = open_picture(ask(served, steps=3, seed=5, cache_threshold=0).json()["pictures"][0]["base64"])
    # Two processes may sum in another order, and a number between two of the 256 levels may fall to either.
    assert np.abs(own.astype(int) - np.asarray(given)).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(160, 96), (64, 64)])
def test_size_asked_is_size_given(served: Served, width: int, height: int):
    for image in (None, base64.b64encode(png((200, 100))).decode()):
        answer = ask(served, width=width, height=height, image=image).json()
        assert open_picture(answer["pictures"][0]["base64"]).size == (answer["width"], answer["height"])
        assert (answer["width"], answer["height"]) == (width, height)


def test_edit_without_a_size_keeps_the_references_aspect(served: Served):
    answer = ask(served, image=base64.b64encode(png((400, 200))).decode()).json()
    assert (answer["width"], answer["height"]) == (176, 96)  # 128 x 128 pixels in all, in multiples of 16


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_answer_in_bytes_is_the_picture_in_its_format(served: Served, format: str):
    answer = ask(served, output="bytes", format=format, seed=3)
    assert answer.headers["content-type"] == f"image/{format}"
    assert open_picture(answer.content).format == format.upper()
    assert answer.headers["x-seed"] == "3"
    assert "denoise;dur=" in answer.headers["server-timing"]


def test_url_gives_the_picture_under_a_random_name_until_it_expires(served: Served):
    first, second = (ask(served, output="url", seed=1).json()["pictures"][0]["url"] for _ in range(2))
    assert first != second
    with httpx2.Client() as anybody:
        got = anybody.get(first)
    assert (got.status_code, got.headers["content-type"]) == (200, "image/png")
    assert open_picture(got.content).size == (128, 128)
    name = first.rsplit("/", 1)[1]
    file = served.server._settings.storage_dir / name
    os.utime(file, (0, 0))
    assert served.http.get(f"/pictures/{name}").status_code == 404
    assert served.http.get("/pictures/..%2f..%2fetc%2fpasswd").status_code == 404


def test_openai_client_generates(client: openai.OpenAI):
    result = client.images.generate(
        prompt=PROMPT, n=2, size="96x64", output_format="webp", extra_body={"steps": 2, "seed": 4}
    )
    assert len(result.data) == 2
    for picture in result.data:
        shown = open_picture(picture.b64_json)
        assert (shown.size, shown.format) == ((96, 64), "WEBP")
    assert result.usage.total_tokens == result.usage.input_tokens + result.usage.output_tokens
    assert result.usage.output_tokens == 2 * 6 * 4
    assert [model.id for model in client.models.list()] == ["tested"]
    assert client.models.retrieve("tested").id == "tested"


def test_openai_client_edits(client: openai.OpenAI):
    result = client.images.edit(
        image=("photo.png", png()), prompt="in noto style", size="128x128", extra_body={"steps": 2}
    )
    assert open_picture(result.data[0].b64_json).size == (128, 128)


def test_openai_client_gets_a_url(client: openai.OpenAI):
    result = client.images.generate(prompt=PROMPT, response_format="url", extra_body={"steps": 2})
    assert httpx2.get(result.data[0].url).status_code == 200


def test_openai_client_streams_partial_pictures_then_the_whole(client: openai.OpenAI):
    whole = client.images.generate(prompt=PROMPT, extra_body={"steps": 6, "seed": 9})
    extra = {"steps": 6, "seed": 9}
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=extra))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]
    assert events[-1].b64_json == whole.data[0].b64_json
    distances = [distance(event.b64_json, events[-1].b64_json) for event in events[:-1]]
    assert distances[0] > distances[1] > 0  # each preview is nearer to the end


def distance(a: str, b: str) -> float:
    one, other = (np.asarray(open_picture(text), dtype=float) for text in (a, b))
    return float(np.abs(one - other).mean())


def test_openai_client_streams_an_edit(client: openai.OpenAI):
    given: dict[str, Any] = {"image": ("photo.png", png()), "prompt": "in noto style", "size": "64x64"}
    events = list(client.images.edit(**given, stream=True, partial_images=1, extra_body={"steps": 4}))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_openai_client_is_told_of_a_wrong_field_and_does_not_retry(served: Served):
    asked = []
    http = openai.DefaultHttpxClient(event_hooks={"request": [asked.append]})
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=2, http_client=http) as client:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            client.images.generate(prompt=PROMPT, size="100x64")
        assert (caught.value.param, caught.value.code) == ("width", "invalid_value")
        assert "96 or 112" in caught.value.message
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt=PROMPT, model="gpt-image-1")
    assert len(asked) == 2


def test_mixed_requests_at_once_equal_the_same_ones_alone(served: Served):
    asks: list[dict[str, Any]] = [
        {"seed": seed, "width": width, "steps": steps, "cache_threshold": threshold, "image": image}
        for seed, (width, steps, threshold, image) in enumerate(
            [
                *[(64, 3, 0.3, None)] * 4,  # these make one batch
                (96, 3, 0.3, None),
                (64, 4, 0, None),
                *[(64, 3, 0.3, base64.b64encode(png(colour=colour)).decode()) for colour in ("red", "blue")],
            ]
        )
    ]
    alone = [ask(served, height=64, **fields).json()["pictures"][0] for fields in asks]
    batches = batch_counts(served)
    with ThreadPoolExecutor(len(asks)) as pool:
        with served.held():
            futures = [pool.submit(ask, served, height=64, **fields) for fields in asks]
            wait_until(lambda: metric(served, "fluxfire_queue_pictures") == len(asks))
        together = [future.result().json()["pictures"][0] for future in futures]
    assert batch_counts(served) - batches == 1 + 4  # one of four, one of two, and two of one
    for one, other in zip(alone, together, strict=True):
        assert one["cached_steps"] == other["cached_steps"]
        a, b = (np.asarray(open_picture(p["base64"]), dtype=int) for p in (one, other))
        assert np.abs(a - b).max() <= 1  # rounding of other matrix sizes


def test_client_that_disconnects_frees_the_worker_within_a_step_and_nothing_is_decoded(served: Served, serve_log: Path):
    body = json.dumps({"prompt": "held and left alone", "steps": 100, "width": 16, "height": 16}).encode()
    with served.shut(), post_by_hand(served, "/inference", body) as connection:
        wait_until(lambda: lines(serve_log, "step", "left alone"))
        gone = metric(served, GONE)
        connection.close()
        wait_until(lambda: metric(served, GONE) == gone + 1)
    assert ask(served, prompt="afterwards").status_code == 200
    assert len(lines(serve_log, "step", "left alone")) <= 2  # the one under way, one more if the news came in its end
    assert not lines(serve_log, "decode", "left alone")


def test_client_that_leaves_a_stream_frees_the_worker_too(served: Served, serve_log: Path):
    fields = {"prompt": "held stream cut", "steps": 100, "size": "16x16", "stream": True, "partial_images": 3}
    gone = metric(served, GONE)
    with served.shut():
        with served.http.stream("POST", "/v1/images/generations", json=fields):
            wait_until(lambda: lines(serve_log, "step", "stream cut"))
        wait_until(lambda: metric(served, GONE) == gone + 1)
    assert ask(served, prompt="afterwards").status_code == 200
    assert len(lines(serve_log, "step", "stream cut")) <= 2
    assert not lines(serve_log, "decode", "stream cut")


def test_one_of_a_batch_leaves_and_the_others_are_not_disturbed(served: Served, serve_log: Path):
    fields = {"steps": 3, "width": 32, "height": 32, "seed": 1}
    gone = metric(served, GONE)
    with ThreadPoolExecutor(1) as pool:
        with served.shut("kept"):
            with served.held():
                connection = post_by_hand(served, "/inference", json.dumps({"prompt": "kept leaves"} | fields).encode())
                wait_until(lambda: metric(served, "fluxfire_queue_pictures") == 1)
                stays = pool.submit(ask, served, prompt="kept stays", **fields)
                wait_until(lambda: metric(served, "fluxfire_queue_pictures") == 2)
            wait_until(lambda: lines(serve_log, "step", "kept leaves|kept stays"))
            connection.close()
            wait_until(lambda: metric(served, GONE) == gone + 1)
        beside = stays.result().json()["pictures"][0]
    alone = ask(served, prompt="kept stays", **fields).json()["pictures"][0]
    a, b = (np.asarray(open_picture(picture["base64"]), dtype=int) for picture in (beside, alone))
    assert np.abs(a - b).max() <= 1


def test_queued_request_of_a_client_that_left_never_starts(served: Served, serve_log: Path):
    with served.held() as running:
        body = json.dumps({"prompt": "never begun", "width": 32, "height": 32}).encode()
        with post_by_hand(served, "/inference", body):
            wait_until(lambda: metric(served, "fluxfire_queue_pictures") == 1)
        wait_until(lambda: metric(served, "fluxfire_queue_pictures") == 0)
    assert running.result().status_code == 200
    assert ask(served).status_code == 200
    assert not lines(serve_log, "step", "never begun")


def test_full_queue_answers_429_with_the_time_until_there_is_room(served: Served, monkeypatch: pytest.MonkeyPatch):
    one = 128 * 128 * 2
    monkeypatch.setattr(served.engine.queue, "limit", 2 * one)
    with ThreadPoolExecutor(1) as pool:
        with served.held() as running:
            waiting = pool.submit(ask, served, num_images=2)
            wait_until(lambda: metric(served, "fluxfire_queue_pictures") == 2)
            refused = ask(served)
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            pace = served.engine.queue.pace.seconds_per_cost
            running_cost = 16 * 128 * 2
            assert 1 <= int(refused.headers["retry-after"]) <= max(1, pace * (one + running_cost) + 1)
            never = ask(served, num_images=3)
            full = (429, "queue_full")  # before its body is looked at
            assert (never.status_code, never.json()["error"]["code"]) == full
        assert (running.result().status_code, waiting.result().status_code) == (200, 200)
    too_much = ask(served, num_images=3)
    assert (too_much.status_code, too_much.json()["error"]["code"]) == (422, "too_expensive")


def test_openai_client_gets_its_picture_by_retrying_after_429(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served.engine.queue, "limit", 16 * 128 * 2)
    statuses: list[int] = []
    refused = threading.Event()

    def see(response: httpx2.Response) -> None:
        statuses.append(response.status_code)
        refused.set()

    http = openai.DefaultHttpxClient(event_hooks={"response": [see]})
    with (
        ThreadPoolExecutor(2) as pool,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=9, http_client=http) as client,
    ):
        with served.held() as running:
            waiting = pool.submit(ask, served, width=16)
            wait_until(lambda: metric(served, "fluxfire_queue_pictures") == 1)
            result = pool.submit(client.images.generate, prompt=PROMPT, size="16x16", extra_body={"steps": 2})
            assert refused.wait(WAIT_S)
        assert (running.result().status_code, waiting.result().status_code) == (200, 200)
        assert open_picture(result.result().data[0].b64_json).size == (16, 16)
    assert statuses[0] == 429
    assert statuses[-1] == 200


def test_same_idempotency_key_makes_one_generation(served: Served, serve_log: Path):
    fields = {"prompt": "twin", "width": 32, "height": 32}
    headers = {"Idempotency-Key": "twins"}
    with ThreadPoolExecutor(2) as pool:
        posts = [pool.submit(served.http.post, "/inference", json=fields, headers=headers) for _ in range(2)]
        first, second = (post.result().json() for post in posts)
    again = served.http.post("/inference", json=fields, headers=headers).json()
    assert first == second == again  # the random seed too
    assert len([line for line in lines(serve_log, "decode") if "twin" in line]) == 1


def test_idempotency_key_with_another_body_is_409(served: Served):
    headers = {"Idempotency-Key": "once"}
    assert served.http.post("/inference", json={"prompt": "a", "steps": 1}, headers=headers).status_code == 200
    other = served.http.post("/inference", json={"prompt": "b", "steps": 1}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    path = served.http.post("/v1/images/generations", json={"prompt": "a"}, headers=headers)
    assert path.status_code == 409


def test_keyed_request_survives_its_clients_disconnection(served: Served, serve_log: Path):
    """An openai client gives up waiting for its first try, and gets what that began from its second."""
    tries = 0

    def before(request: httpx2.Request) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            request.extensions["timeout"] |= {"read": 0.3}
        else:
            served.gate("held").unlink(missing_ok=True)

    served.gate("held").touch()
    http = openai.DefaultHttpxClient(event_hooks={"request": [before]})
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=2, http_client=http) as client:
        done = client.images.generate(prompt="held keyed", size="16x16", extra_headers={"Idempotency-Key": "back"})
    assert tries == 2
    assert open_picture(done.data[0].b64_json).size == (16, 16)
    assert len(lines(serve_log, "decode", "held keyed")) == 1


def test_alive_and_counting_during_generation(served: Served):
    threads = threading.active_count()
    with served.held() as running:
        assert served.http.get("/livez").status_code == 200
        assert not running.done()
    assert running.result().status_code == 200
    text = served.http.get("/metrics").text
    for name in (
        *("ready", "queue_pictures", "queue_cost", "running_pictures", "requests_total", "rejections_total"),
        *("pictures_total", "denoising_steps_total", "cache_hits_total", "cache_computed_total", "cache_hit_rate"),
        *("recompilations", "gpu_used_bytes", "gpu_total_bytes", "worker_restarts_total", "storage_failures_total"),
    ):
        assert f"\nfluxfire_{name}" in text
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    for stage in STAGES:
        assert values[f'fluxfire_stage_seconds_count{{stage="{stage}"}}'] == values["fluxfire_pictures_total"]
    hits, computed = (values[f"fluxfire_cache_{name}_total"] for name in ("hits", "computed"))
    assert values["fluxfire_cache_hit_rate"] == pytest.approx(hits / (hits + computed))
    assert "teapot" not in text
    assert threading.active_count() < threads + 40  # the pools have filled up
