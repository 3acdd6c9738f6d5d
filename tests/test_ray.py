"""Ray Serve: what a deployment asks of Ray and, slowly, a real Ray on this machine with the embedded model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from serving import PROMPT, TESTS, Served, ask, make_settings, open_picture, wait_until, with_tests_on_path

from fluxfire import ArgumentError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using extra keyword arguments on `Field`:DeprecationWarning"
)  # Ray's own

KEY = "a-key-of-the-tests"
CPU = {"gpus": 0, "cpus": 0, "model": "ray_pipes:make", "device": "cpu", "min_replicas": 2, "max_replicas": 2}


def build(**given: Any) -> Any:
    from fluxfire.deploy.ray_app import Options, build

    return build(Options(**given))


def test_a_replica_has_a_gpu_and_their_number_follows_the_queue_down_to_none():
    deployment = build(max_replicas="8", max_queued_requests=3, retry_after_s=7)._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 1
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 8)
    assert deployment.max_queued_requests == 3
    full = deployment._deployment_config.backpressure_config
    assert (full.status_code, full.retry_after_s) == (429, 7)


def test_the_shared_megacache_is_a_setting_that_reaches_the_worker():
    (given,) = build(megacache="s3://bucket/prefix", megacache_share="true")._bound_deployment.init_args
    options = make_settings(**given).worker_options()
    assert (options["megacache"], options["share"]) == ("s3://bucket/prefix", True)


@pytest.mark.parametrize("name", ["api_keys", "hf_token", "s3_access_key_id", "s3_secret_access_key"])
def test_a_secret_is_refused_as_an_argument_without_its_value(name: str):
    with pytest.raises(ArgumentError, match=f"^{name} is a secret: set it in the environment") as refused:
        build(**{name: "hunter2-hunter2"})
    assert "hunter2" not in str(refused.value)


def test_a_misspelt_argument_is_refused_with_the_known_ones():
    with pytest.raises(ArgumentError, match=r"found max_step, needed one of .*max_replicas.*max_steps"):
        build(max_step=3)


class Cluster:
    """A Ray of its own, seen from outside."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.pids = folder / "pids"
        self._gate = folder / "held"  # where it is, a worker stays in its step when the prompt says "held"
        self.pids.mkdir()
        environment = os.environ | with_tests_on_path()
        environment |= {
            "FLUXTEST_PIDS": str(self.pids),
            "FLUXTEST_GATES": str(folder),
            "RAY_AUTH_MODE": "disabled",
            "FLUXFIRE_MAX_STEPS": "50",
        }
        environment |= {"FLUXFIRE_API_KEYS": json.dumps([{"name": "tests", "key": KEY}])}
        command = [sys.executable, str(TESTS / "ray_cluster.py"), json.dumps(CPU | options)]
        self._log = open(folder.with_suffix(".log"), "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.url = self._line()["url"]
        self.http = self.client()

    def client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx2.Client(base_url=self.url, timeout=300, headers=headers, limits=httpx2.Limits())

    def ask(self, **fields: Any) -> httpx2.Response:
        return self.http.post("/inference", json={"prompt": PROMPT, "steps": 2} | fields)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the workers in the step of a prompt that says "held"."""
        self._gate.touch()
        try:
            yield
        finally:
            self._gate.unlink()

    def running(self) -> int:
        """How many replicas run, by Ray."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._line().get("RUNNING", 0))

    def seen(self) -> set[int]:
        """The process ids of the replicas that have computed something."""
        return {int(path.name.split("-")[0]) for path in self.pids.iterdir()}

    def stop(self) -> None:
        self.http.close()
        self._process.communicate(timeout=120)
        self._log.close()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        self._log.seek(0)
        assert line, self._log.read()[-6000:]
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Cluster]:
    cluster = Cluster(folder, **options)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("two"), max_ongoing_requests=2, max_queued_requests=8) as cluster:
        yield cluster


@pytest.mark.slow
def test_pictures_on_ray_are_the_single_servers(cluster: Cluster, served: Served):
    for seed in range(4):
        fields = {"seed": seed, "steps": 4, "cache_threshold": 0.3}
        ours, theirs = cluster.ask(**fields).json(), ask(served, **fields).json()
        pictures = [np.asarray(open_picture(a["pictures"][0].pop("base64"))).astype(int) for a in (ours, theirs)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # two processes may sum in another order
        for answer in (ours, theirs):
            del answer["id"], answer["pictures"][0]["timings_s"]
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [{"steps": 51}, {"steps": 0}, {"width": 10**6}, {"image": "no picture"}, {"unknown": 1}, {"num_images": 11}],
    ids=str,
)
def test_what_is_refused_on_ray_is_refused_as_by_the_single_server(cluster: Cluster, served: Served, wrong: Any):
    ours = cluster.ask(**wrong)
    with served.beside(max_steps=50) as beside:
        theirs = beside.post("/inference", json={"prompt": PROMPT, "steps": 2} | wrong)
    assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json())
    assert ours.headers["x-should-retry"] == theirs.headers["x-should-retry"]


@pytest.mark.slow
def test_keys_and_limits_come_from_the_nodes_environment(cluster: Cluster):
    with httpx2.Client(base_url=cluster.url) as stranger:
        refused = stranger.post("/inference", json={"prompt": PROMPT})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert stranger.get("/readyz").json() == {"status": "ready"}


@pytest.mark.slow
def test_openai_client_streams_through_ray(cluster: Cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEY, max_retries=0) as client:
        stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"steps": 6})
        kinds = [event.type for event in stream]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


@pytest.mark.slow
def test_load_spreads_over_the_replicas(cluster: Cluster):
    for path in cluster.pids.iterdir():
        path.unlink()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda seed: cluster.ask(seed=seed, steps=4), range(12)))
    assert [answer.status_code for answer in answers] == [200] * 12
    assert len(cluster.seen()) == 2


@pytest.mark.slow
def test_more_than_fits_is_refused_with_429_and_when_to_come_again(cluster: Cluster):
    answers: list[httpx2.Response] = []
    with ThreadPoolExecutor(80) as pool, cluster.held():  # 2 x 2 are taken, 8 wait
        for seed in range(80):
            pool.submit(lambda seed=seed: answers.append(cluster.ask(prompt="held", seed=seed)))
        wait_until(lambda: len(answers) >= 10)
        early = answers[:10]
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in early} == {(429, "5")}
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 12


@pytest.mark.slow
def test_a_client_that_goes_is_worked_for_no_longer(cluster: Cluster):
    with cluster.held():
        with pytest.raises(httpx2.ReadTimeout):
            cluster.http.post("/inference", json={"prompt": "held"}, timeout=2)

        def gone() -> bool:
            found = re.findall(r'rejections_total{code="client_gone"} (\S+)', cluster.http.get("/metrics").text)
            return bool(found) and float(found[0]) > 0

        wait_until(gone)


@pytest.mark.slow
def test_a_killed_replica_is_replaced_while_requests_go_on(cluster: Cluster):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: cluster.ask(seed=seed, steps=4), range(12)))
    before, stop = cluster.seen(), threading.Event()
    statuses: list[int] = []

    def keep_asking() -> None:
        with cluster.client() as http:
            while not stop.is_set():
                answer = http.post("/inference", json={"prompt": PROMPT, "steps": 2})
                statuses.append(answer.status_code)

    asking = [threading.Thread(target=keep_asking) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        wait_until(lambda: len(statuses) >= 4)
        os.kill(min(before), signal.SIGKILL)
        at = len(statuses)
        wait_until(lambda: len(cluster.seen() - before) == 1 and cluster.running() == 2, 180)
    finally:
        stop.set()
        for thread in asking:
            thread.join(120)
    assert statuses.count(200) > at  # they went on
    assert set(statuses) <= {200, 500}
    assert statuses.count(500) <= 4  # what the killed one was at: at most 2 of each thread's
    workers = {path.name for path in cluster.pids.iterdir() if path.name.startswith(f"{min(before)}-")}
    for name in workers:  # its worker has gone with it
        assert not Path(f"/proc/{name.split('-')[1]}").exists()


@pytest.mark.slow
def test_none_run_without_requests_and_one_starts_with_the_first(tmp_path: Path):
    with running(tmp_path, min_replicas=0, max_replicas=1, downscale_delay_s=1, model="embedded") as cluster:
        assert cluster.running() == 0
        assert cluster.ask().status_code == 200
        wait_until(lambda: cluster.running() == 0, 180)


@pytest.mark.slow
def test_the_example_serves_tiny_until_ctrl_c(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    example = TESTS.parent / "examples" / "ray_serve.py"
    environment = os.environ | with_tests_on_path() | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(example), "--tiny", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:

                def ready() -> bool:
                    assert process.poll() is None
                    try:
                        return http.get("/readyz").status_code == 200
                    except httpx2.HTTPError:  # nobody listens yet
                        return False

                wait_until(ready, 600)
                answer = http.post("/inference", json={"prompt": PROMPT, "steps": 2, "output": "bytes"})
                assert open_picture(answer.content).size == (128, 128)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
