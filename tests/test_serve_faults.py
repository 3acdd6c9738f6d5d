"""The server when something goes wrong: memory, bugs, deaths, deadlines, signals; and what it keeps to itself."""

from __future__ import annotations

import asyncio
import gc
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import httpx2
import pytest
from conftest import make_pipe
from diffusers import FluxFillPipeline
from serving import TESTS, WAIT_S, Served, ask, lines, make_settings, metric, wait_until, with_tests_on_path

import fluxfire
from fluxfire import ArgumentError, cli, demo
from fluxfire.serve import model, process, wire, worker
from fluxfire.serve.asks import Inference, order_of_inference
from fluxfire.serve.connection import Connection
from fluxfire.serve.errors import ServeError
from fluxfire.serve.jobs import Order, Shape
from fluxfire.serve.model import Model
from fluxfire.serve.queue import PictureQueue
from fluxfire.serve.redact import Redacting

SMALL = {"width": 16, "height": 16}


def test_out_of_memory_is_503_and_the_next_request_works(served: Served, serve_log: Path):
    given_up = ask(served, prompt="exhausted", **SMALL)
    assert (given_up.status_code, given_up.json()["error"]["code"]) == (503, "out_of_memory")
    assert ask(served, **SMALL).status_code == 200
    assert len(lines(serve_log, "step exhausted")) == 2  # once more with the decoder in tiles, then no more


def test_batch_that_is_too_large_for_memory_is_made_one_by_one(served: Served):
    made = ask(served, prompt="crowd", num_images=3, **SMALL)
    assert made.status_code == 200
    assert len(made.json()["pictures"]) == 3


def test_decoder_that_is_out_of_memory_goes_on_in_tiles_for_this_picture_alone(served: Served, serve_log: Path):
    assert ask(served, prompt="tiles", **SMALL).status_code == 200
    assert ask(served, prompt="tiles", **SMALL).status_code == 200
    assert len(lines(serve_log, "decode tiles")) == 4  # in vain first, each time: tiling did not stay on


def test_bug_is_500_without_a_word_of_it_and_the_next_request_works(served: Served):
    failed = ask(served, prompt="bug", **SMALL)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "generation_failed")
    assert "passwd" not in failed.text
    assert "Traceback" not in failed.text
    assert failed.headers["x-should-retry"] == "false"
    assert ask(served, **SMALL).status_code == 200


def test_deadline_covers_queue_and_run_and_the_expired_never_start(
    served: Served, serve_log: Path, monkeypatch: pytest.MonkeyPatch
):
    short = served.engine._settings.model_copy(update={"deadline_s": 0.3})
    with served.held() as running:
        monkeypatch.setattr(served.engine, "_settings", short)
        expired = ask(served, prompt="expired", steps=99, **SMALL)
        assert (expired.status_code, expired.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert running.result().status_code == 200  # it has the deadline of the time when it came
    with served.shut():
        late = ask(served, prompt="held late", steps=100, **SMALL)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    monkeypatch.undo()
    assert ask(served, **SMALL).status_code == 200
    assert len(lines(serve_log, "step held late")) <= 2
    assert not lines(serve_log, "decode held late")
    assert not lines(serve_log, "step expired")


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-S", str(TESTS / "stub_worker.py")))
    served = Served(make_settings(storage_dir=tmp_path))
    wait_until(lambda: served.http.get("/readyz").status_code == 200, 900)
    yield served
    served.stop()


def test_killed_worker_is_replaced_and_only_its_batch_is_lost(stubbed: Served):
    with ThreadPoolExecutor(1) as pool:
        with stubbed.held() as lost:
            waiting = pool.submit(stubbed.http.post, "/inference", json={"prompt": "waits", "width": 32})
            wait_until(lambda: metric(stubbed, "fluxfire_queue_pictures") == 1)
            killed = stubbed.engine.supervisor.worker.pid
            os.kill(killed, signal.SIGKILL)
            answer = lost.result()  # although the gate is shut
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_died")
            assert answer.headers["retry-after"] == "1"
            assert stubbed.http.get("/livez").status_code == 200
        assert waiting.result().status_code == 200  # by the new worker
    assert stubbed.engine.supervisor.worker.pid != killed
    assert stubbed.http.get("/readyz").status_code == 200
    assert metric(stubbed, "fluxfire_worker_restarts_total") == 1
    assert metric(stubbed, 'fluxfire_rejections_total{code="worker_died"}') == 1


def test_worker_that_dies_hangs_or_talks_nonsense_is_replaced(stubbed: Served, monkeypatch: pytest.MonkeyPatch):
    open_before = len(os.listdir("/proc/self/fd"))
    for fault in ("die", "hang", "half", "nonsense") * 3:
        before = stubbed.engine.supervisor.worker.pid
        with monkeypatch.context() as patch:
            if fault == "hang":
                patch.setattr(stubbed.engine.supervisor, "_silence_s", 0.2)
            answer = stubbed.http.post("/inference", json={"prompt": fault})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_died"), fault
        wait_until(lambda: stubbed.http.get("/readyz").status_code == 200)
        assert stubbed.engine.supervisor.worker.pid != before
        assert stubbed.http.post("/inference", json={"prompt": "well"}).status_code == 200
    assert len(os.listdir("/proc/self/fd")) < open_before + 12  # of twelve workers each would leave its pipes


def test_not_ready_while_a_new_worker_warms_up(stubbed: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", "import time; time.sleep(3600)"))
    os.kill(stubbed.engine.supervisor.worker.pid, signal.SIGKILL)
    wait_until(lambda: stubbed.http.get("/readyz").status_code == 503)
    assert stubbed.http.get("/readyz").json()["error"]["code"] == "not_ready"


@pytest.fixture
def pass_read_s(stubbed: Served):
    """Lets `read_s` go by on the server's clock, with all that it ends, while the client stands still."""
    loop, passed = stubbed.server._loop, 0.0
    assert loop is not None
    loop.time = lambda: time.monotonic() + passed  # to the loop's end: no timer waits for a clock put back

    def leap() -> None:
        nonlocal passed
        passed += stubbed.server._settings.read_s
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(WAIT_S)

    return leap


@contextmanager
def long_answer(stubbed: Served) -> Iterator[tuple[socket.socket, Connection]]:
    """The client's end and the server's of a connection whose answer, more than sockets hold, waits to be read."""
    fields = {"prompt": "noise", "width": 1024, "height": 1024, "num_images": 8, "format": "jpeg", "quality": 100}
    with socket.create_connection(("127.0.0.1", int(stubbed.url.rsplit(":", 1)[1])), WAIT_S) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        body = json.dumps(fields)
        head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        client.sendall(f"POST /inference HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
        waiting: list[Connection] = []
        wait_until(
            lambda: waiting.extend(c for c in list(stubbed.server.server_state.connections) if c._reader) or waiting
        )
        yield client, waiting[0]


def test_client_that_does_not_read_its_answer_is_given_up(stubbed: Served, pass_read_s: Callable[[], None]):
    with long_answer(stubbed) as (_, connection):
        wait_until(lambda: pass_read_s() or not connection._reader)  # not the first time if sockets still fill up
    assert metric(stubbed, 'fluxfire_rejections_total{code="answer_not_read"}') == 1
    assert stubbed.http.post("/inference", json={"prompt": "a"}).status_code == 200


def test_client_that_reads_slowly_gets_all_of_its_answer(stubbed: Served, pass_read_s: Callable[[], None]):
    with long_answer(stubbed) as (client, connection):
        answer, body = http.client.HTTPResponse(client), b""
        answer.begin()
        for _ in range(4):
            left = connection.transport.get_write_buffer_size()
            while connection.transport.get_write_buffer_size() >= left:
                body += answer.read(2**16)
            pass_read_s()
            assert connection._reader  # not given up, nor at its end
        assert len(json.loads(body + answer.read())["pictures"]) == 8
    assert metric(stubbed, 'fluxfire_rejections_total{code="answer_not_read"}') == 0


def test_picture_to_a_model_of_text_alone_and_a_threshold_without_cache_are_refused(stubbed: Served):
    for fields, param in (({"image": "aaaa"}, "image"), ({"cache_threshold": 0.1}, "cache_threshold")):
        answer = stubbed.http.post("/inference", json={"prompt": "a"} | fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_batch_is_bounded_by_what_fits_into_the_gpus_memory():
    from fluxfire.serve.jobs import Job

    def job(width: int) -> Job:
        return Job("a", Order("a", Shape(width, 64, 2, 1.0, None, None), (1, 2), None, (), "png", 90, "base64"), 0.0)

    queue = PictureQueue(10**9)
    for each in (job(64), job(128), job(64)):
        queue.add(each)
    sizes = []
    while batch := queue.take(8, 3 * 64 * 64):
        assert len({picture.job.order.shape for picture in batch}) == 1
        sizes.append((batch[0].job.order.shape.width, len(batch)))
    assert sizes == [(64, 3), (128, 1), (128, 1), (64, 1)]  # in order; others of the shape go along
    assert (queue.cost, len(queue)) == (0, 0)


def test_retry_after_follows_the_measured_pace_and_counts_the_batch_under_way():
    queue = PictureQueue(1000)
    pace = queue.pace
    assert queue.refusal(10**9).retry_after_s == 1  # nothing measured yet
    for _ in range(30):
        pace.add(1000, 2.0)
    assert pace.seconds(5000) == pytest.approx(10)
    pace.add(1000, 12.0)
    assert pace.seconds(1000) == pytest.approx(4)
    queue.cost, pace.seconds_per_cost = 1000, 0.1
    assert queue.refusal(500).retry_after_s == 50
    queue.under_way = 300, time.monotonic()
    assert queue.refusal(500).retry_after_s == 80
    queue.under_way = 300, time.monotonic() - 20.5
    assert queue.refusal(500).retry_after_s == 60
    queue.under_way = 300, time.monotonic() - 1000  # slower than it should be: as good as done
    assert queue.refusal(500).retry_after_s == 50


TOKEN, KEY = "hf_canary-0123456789", "key-canary-0123456789"


def test_sigterm_makes_it_not_ready_at_once_and_all_that_was_taken_ends_whole(tmp_path: Path):
    """Also: `.env` is read, its secrets are told to the worker that needs them and to nobody else."""
    keys = json.dumps([{"name": "ada", "key": KEY}])
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\nFLUXFIRE_API_KEYS={keys}\nFLUXFIRE_S3_SECRET_ACCESS_KEY={KEY}\n")
    gate = tmp_path / "held"
    gate.touch()
    with start(tmp_path, "--name", "mine", "--port", "0") as server:
        try:
            url = json.loads(server.stdout.readline())["url"]
            with (
                httpx2.Client(base_url=url, timeout=WAIT_S, headers={"Authorization": f"Bearer {KEY}"}) as http,
                ThreadPoolExecutor(2) as pool,
            ):
                wait_until(lambda: http.get("/readyz").status_code == 200)
                seen = [http.get("/openapi.json").text, http.get("/v1/models").text]
                fields = {"prompt": "held", "output": "bytes"}
                taken = []
                for gauge in ("running", "queue"):
                    taken.append(pool.submit(http.post, "/inference", json=fields | {"seed": len(taken)}))
                    wait_until(lambda gauge=gauge: f"fluxfire_{gauge}_pictures 1.0" in http.get("/metrics").text)
                server.send_signal(signal.SIGTERM)
                wait_until(lambda: http.get("/readyz").status_code == 503)
                late = http.post("/inference", json=fields)
                assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
                seen += [late.text, http.get("/metrics").text]
                gate.unlink()
                for future in taken:
                    answer = future.result()
                    assert answer.status_code == 200
                    assert answer.content.endswith(b"IEND\xaeB`\x82")  # PNG's end
            stdout, stderr = server.communicate(timeout=WAIT_S)
        finally:
            server.kill()
    assert server.returncode == 0
    assert '"id":"mine"' in seen[1]
    assert "the worker has *** None" in stderr  # it was given the token, and its print is starred
    for text in (*seen, stdout, stderr):
        assert TOKEN not in text
        assert KEY not in text


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`fluxfire serve` as a process of its own, around a worker without a model."""
    worker = (sys.executable, "-S", str(TESTS / "stub_worker.py"))
    code = (
        f"from fluxfire.serve import process; process.COMMAND = {worker!r}\n"
        f"from fluxfire.cli import main; main({['serve', *arguments]!r})"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FLUXFIRE_", "HF_TOKEN"))}
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    env, pipe = own | {"PYTHONPATH": os.pathsep.join(paths), "FLUXTEST_GATES": str(folder)}, subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def test_model_that_cannot_be_loaded_ends_the_server_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-S", str(TESTS / "stub_worker.py")))
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve", "--port", "0", "--model", "nowhere"])
    assert exit.value.code == "fluxfire: the model could not be loaded: OSError: nowhere is no model"
    assert json.loads(capfd.readouterr().out)["url"].startswith("http://127.0.0.1:")  # nobody else hears it


def test_model_is_named_or_made_by_a_function_and_its_class_must_be_known():
    embedded = model.load("embedded", "cpu", "float32")
    assert (embedded.name, embedded.side, embedded.takes_picture) == ("fluxfire-embedded", 128, True)
    with pytest.raises(ArgumentError, match="found a FluxFillPipeline, needed one of FluxPipeline, "):
        model.load(f"{__name__}:unknown", "cpu", "float32")


def unknown() -> Any:
    return make_pipe(FluxFillPipeline)


def optimized() -> Any:
    return fluxfire.apply_cache(make_pipe(), 0.5, max_consecutive_hits=1)


def test_pipeline_that_its_function_has_optimized_is_served_as_it_is():
    options = {"model": f"{__name__}:optimized", "device": "cpu", "dtype": "float32"}
    loaded = worker.Worker(io.BytesIO(), io.BytesIO(), options)._load()
    assert [step.name for step in fluxfire.report(loaded.pipe).steps] == ["cache"]
    assert fluxfire.cache_stats(loaded.pipe).threshold == 0.5


def scheduled() -> Model:
    call = demo.call_kwargs()
    pipe = fluxfire.apply_cache(demo.load_pipeline(), schedule="##.#")
    return Model(pipe, "scheduled", demo.SIZE, 28, call["guidance_scale"], call["max_sequence_length"])


def test_schedules_own_number_of_steps_is_warmed_up_and_asked_for():
    options = {"model": f"{__name__}:scheduled", "device": "cpu", "dtype": "float32", "name": None}
    work = worker.Worker(io.BytesIO(), io.BytesIO(), options | {"warm_sizes": [[16, 16]], "max_batch": 1})
    work._model = work._load()
    facts = work._warm()
    assert fluxfire.cache_stats(work._model.pipe).marks() == "##.#"
    assert (facts.steps, facts.steps_only) == (4, 4)

    def steps(**fields: Any) -> int:
        return asyncio.run(order_of_inference(Inference(prompt="a", **fields), make_settings(), facts)).shape.steps

    assert (steps(), steps(steps=4), steps(steps=6, cache_threshold=0)) == (4, 4, 6)
    with pytest.raises(ServeError, match="steps: found 6, needed 4, for which"):
        steps(steps=6)


@pytest.mark.slow
def test_worker_finds_what_the_last_one_has_compiled(tmp_path: Path):
    options = {"model": "serve_pipes:make", "device": "cpu", "dtype": "float32", "cache_threshold": 0.12}
    options |= {"compile": True, "warm_sizes": [[48, 32]], "max_batch": 1, "name": None}
    environment = os.environ | with_tests_on_path() | {"XDG_CACHE_HOME": str(tmp_path), "FLUXTEST_GATES": str(tmp_path)}
    found, pipes = [], dict.fromkeys(("stdin", "stdout", "stderr"), PIPE)
    for _ in range(2):
        with subprocess.Popen([*process.COMMAND, json.dumps(options)], env=environment, **pipes) as running:
            ready = wire.read(running.stdout)
            running.stdin.close()
            report = running.stderr.read().decode()
        assert ready.kind == "ready", report
        found.append([int(number) for number in re.search(r"(\d+) found .* (\d+) compiled", report).groups()])
    (none, compiled), (all_of_them, nothing) = found
    assert (none, nothing) == (0, 0)
    assert all_of_them == compiled > 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FLUXFIRE_MAX_STEPS": "0"}, "max_steps: Input should be greater than 0"),
        ({"FLUXFIRE_API_KEYS": '[{"name": "ada", "key": "short-secret"}]'}, "api_keys.0.key: "),
        ({"FLUXFIRE_STORAGE": "s3", "FLUXFIRE_S3_BUCKET": "b"}, "storage is s3, which needs FLUXFIRE_S3_ACCESS_KEY_ID"),
        ({"FLUXFIRE_MAX_OPEN_BYTES": "1000"}, "max_open_bytes is less than max_body_bytes: "),
    ],
)
def test_wrong_setting_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], message: str
):
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve"])
    assert message in str(exit.value.code)
    assert "short-secret" not in str(exit.value.code)


def test_log_has_stars_for_secrets_in_messages_and_tracebacks():
    try:
        raise ValueError(f"refused {KEY}")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "token %s", (TOKEN,), sys.exc_info())
    line = Redacting((TOKEN, KEY)).format(record)
    assert "token ***" in line
    assert "refused ***" in line
    assert TOKEN not in line
    assert KEY not in line


def test_settings_never_print_a_secret():
    settings = make_settings(api_keys=[{"name": "ada", "key": KEY}], s3_secret_access_key=KEY)
    assert KEY not in repr(settings)
    assert KEY not in settings.model_dump_json()
    assert KEY in settings.secrets()


def test_a_worker_whose_end_is_cancelled_ends_all_the_same(monkeypatch: pytest.MonkeyPatch):
    async def cancel() -> int | None:
        worker = await process.WorkerProcess.start({}, dict(os.environ))
        ending = asyncio.create_task(worker.end())
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        return worker._process.returncode

    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
    assert asyncio.run(cancel()) == -signal.SIGKILL
    gc.collect()  # what is left open is told here, as an error
