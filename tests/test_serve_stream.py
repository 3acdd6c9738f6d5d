"""`/inference` as server-sent events: what a client that looks on is told, and when."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI
from serving import PROMPT, Served, ask, metric, open_picture, wait_until

from fluxfire.serve import stream as streaming

COMMENT = ": still waiting"


def stream(served: Served, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """Every event of a request, by name."""
    given = {"prompt": PROMPT, "steps": 6, "stream": True} | fields
    with served.http.stream("POST", "/inference", json=given) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        parts = "".join(answer.iter_text()).split("\n\n")
    assert parts.pop() == ""
    parts = [part for part in parts if part != COMMENT]
    events = []
    for part in parts:
        event, data = part.split("\n")
        events.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "), parse_constant=fail)))
    return events


def fail(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def of(events: list[tuple[str, dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    return [values for event, values in events if event == name]


def test_stream_tells_the_order_each_step_previews_and_the_picture(served: Served):
    plain = ask(served, steps=6, seed=9, cache_threshold=0.3).json()["pictures"][0]
    events = stream(served, seed=9, cache_threshold=0.3, previews=2)
    names = [name for name, _ in events]
    assert [name for name in names if name != "preview"] == ["order", "waiting", "begun", *["step"] * 6, "picture"]
    # A preview is encoded beside the steps that follow, and told before the picture.
    assert [number["number"] for number in of(events, "preview")] == [0, 1]
    assert names.index("preview") > names.index("step")
    order = events[0][1]
    assert (order["seeds"], order["width"], order["height"], order["steps"]) == ([9], 128, 128, 6)
    steps = of(events, "step")
    assert [step["step"] for step in steps] == list(range(6))
    assert [step["hit"] for step in steps].count(True) == plain["cached_steps"] > 0
    assert steps[0]["distance"] is None
    assert all(step["hit"] == (step["distance"] < 0.3) for step in steps[1:])
    picture = of(events, "picture")[0]
    assert (picture["seed"], picture["cached_steps"]) == (9, plain["cached_steps"])
    assert picture["base64"] == plain["base64"]
    assert picture["timings_s"]["previews"] > 0 == plain["timings_s"]["previews"]
    assert all(open_picture(preview["base64"]).size == (128, 128) for preview in of(events, "preview"))


def test_stream_of_several_pictures_tells_them_apart(served: Served):
    events = stream(served, num_images=2, seed=3, steps=2, width=16, height=16)
    assert {step["index"] for step in of(events, "step")} == {0, 1}
    assert sorted((picture["index"], picture["seed"]) for picture in of(events, "picture")) == [(0, 3), (1, 4)]


def test_stream_tells_the_place_in_the_queue(served: Served):
    with ThreadPoolExecutor(2) as pool:
        with served.held():
            second = pool.submit(ask, served, width=32, height=32)
            wait_until(lambda: metric(served, "fluxfire_queue_pictures") == 1)
            third = pool.submit(stream, served, width=48, height=48, steps=2)
            wait_until(lambda: metric(served, "fluxfire_queue_pictures") == 2)
        assert second.result().status_code == 200
        assert [waiting["ahead"] for waiting in of(third.result(), "waiting")] == [2, 1]


def test_quiet_stream_sends_comments_so_that_nobody_closes_it(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streaming, "QUIET_S", 0.02)
    fields = {"prompt": PROMPT, "steps": 2, "stream": True, "width": 16, "height": 16}
    with served.http.stream("POST", "/inference", json=fields) as answer:
        lines = answer.iter_lines()
        with served.held():  # either of the two may come first: the other one waits, and is quiet
            assert next(line for line in lines if line.startswith(":")) == COMMENT
        assert "event: picture" in lines
    with OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client, served.held():
        events = client.images.generate(prompt="a", stream=True, extra_body={"steps": 2})
        time.sleep(0.2)  # so that there are comments, which the client must not stumble over
        served.gate("held").unlink()
        assert [event.type for event in events] == ["image_generation.completed"]
        served.gate("held").touch()


def test_failure_in_a_stream_is_an_event(served: Served):
    events = stream(served, prompt="bug", steps=1, width=16, height=16)
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["code"] == "generation_failed"
    assert "hunter2" not in json.dumps(events)


def test_stream_refuses_before_it_begins(served: Served):
    for fields, param in (
        ({"stream": True, "output": "bytes"}, "output"),
        ({"previews": 1}, "previews"),
        ({"stream": True, "previews": 11}, "previews"),
    ):
        refused = ask(served, **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)
