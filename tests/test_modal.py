"""Modal without Modal: what a deployment asks of its control plane (a stand-in), and the hooks run here on a CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import modal
import modal_stand_in
import numpy as np
import pytest
from modal_stand_in import StandIn
from serving import TESTS, open_picture, with_tests_on_path

from fluxfire import ArgumentError
from fluxfire.deploy import host
from fluxfire.deploy.modal_app import HeldServer, WarmServer, fetch, make_app

ROOT = TESTS.parent
KEY = "a-key-of-the-tests"
SECRETS = {
    "HF_TOKEN": "hf_hunter2_hunter2",
    "FLUXFIRE_API_KEYS": json.dumps([{"name": "tests", "key": "hunter2-hunter2-hunter2"}]),
    "FLUXFIRE_S3_ACCESS_KEY_ID": "hunter2-id",
    "FLUXFIRE_S3_SECRET_ACCESS_KEY": "hunter2-key",
}


def deploy(file: Path, folder: Path) -> tuple[StandIn, str]:
    """What `modal deploy` asks, and all that it prints; every secret stands in the environment and in .env."""
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
    with modal_stand_in.running() as stand_in:
        environment = os.environ | SECRETS | {
            "MODAL_SERVER_URL": stand_in.url,
            "MODAL_TOKEN_ID": "ak-x",
            "MODAL_TOKEN_SECRET": "as-x",
            "MODAL_CONFIG_PATH": str(folder / "modal.toml"),
            "PYTHONPATH": str(ROOT / "src"),
        }  # fmt: skip
        command = [sys.executable, "-W", "error::DeprecationWarning:modal", "-m", "modal", "deploy", str(file)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return stand_in, done.stdout + done.stderr


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[StandIn, str]:
    return deploy(ROOT / "examples" / "modal_deploy.py", tmp_path_factory.mktemp("deploy"))


def functions(stand_in: StandIn) -> dict[str, Any]:
    return {request.function.function_name: request.function for request in stand_in.asked["FunctionCreate"]}


def test_the_example_deploys_an_h100_that_scales_to_zero(example: tuple[StandIn, str]):
    server = functions(example[0])["server"]
    assert (server.resources.gpu_config.gpu_type, server.resources.gpu_config.count) == ("H100", 1)
    scaling = server.autoscaler_settings
    assert (scaling.min_containers, scaling.max_containers, scaling.scaledown_window) == (0, 10, 300)
    assert (scaling.target_concurrency_float, server.max_concurrent_inputs) == (4, 64)
    assert server.is_server
    assert (server.http_config.port, server.http_config.startup_timeout) == (8000, 1200)
    assert [request.name for request in example[0].asked["AppPublish"]] == ["fluxfire"]


def test_the_example_wakes_from_a_cpu_snapshot(example: tuple[StandIn, str]):
    server = functions(example[0])["server"]
    assert server.checkpointing_enabled
    assert not server.experimental_options
    assert (server.module_name, server.implementation_name) == ("fluxfire.deploy.modal_app", "HeldServer.*")


def test_weights_and_megacache_are_shared_and_fetching_takes_no_gpu(example: tuple[StandIn, str]):
    found = functions(example[0])
    mounts = {mount.mount_path: mount.volume_id for mount in found["server"].volume_mounts}
    assert mounts == {"/weights": "vo-fluxfire-weights", "/megacache": "vo-fluxfire-megacache"}
    assert mounts == {mount.mount_path: mount.volume_id for mount in found["fetch"].volume_mounts}
    assert not found["fetch"].resources.gpu_config.count
    asked = {request.deployment_name for request in example[0].asked["VolumeGetOrCreate"]}
    assert asked == {"fluxfire-weights", "fluxfire-megacache"}


def test_settings_travel_and_secrets_are_only_named(example: tuple[StandIn, str]):
    stand_in, printed = example
    secrets = stand_in.asked["SecretGetOrCreate"]
    named = [request for request in secrets if request.deployment_name]
    assert {request.deployment_name for request in named} == {"fluxfire"}
    assert set(named[0].required_keys) == set(SECRETS)
    settings = next(dict(request.env_dict) for request in secrets if request.env_dict)
    assert settings["FLUXFIRE_STORAGE"] == "s3"
    assert settings["FLUXFIRE_S3_ENDPOINT"].endswith(".r2.cloudflarestorage.com")
    assert settings["FLUXFIRE_WARM_SIZES"] == "[[1024, 1024], [768, 1360]]"
    assert settings["FLUXFIRE_DEVICE"] == "cuda"
    assert not settings.keys() & SECRETS.keys()
    for value in SECRETS.values():
        assert value.encode() not in stand_in.bytes and value not in printed
    assert b"hunter2" not in stand_in.bytes and "hunter2" not in printed


def test_the_image_has_fluxfire_and_the_versions_that_are_installed_here(example: tuple[StandIn, str]):
    commands = " ".join(
        command for request in example[0].asked["ImageGetOrCreate"] for command in request.image.dockerfile_commands
    )
    from importlib.metadata import version

    for name in ("diffusers", "torch", "fastapi", "obstore", "uvicorn"):
        assert f"{name}=={version(name).split('+')[0]}" in commands
    files = {file.filename for request in example[0].asked["MountGetOrCreate"] for file in request.files}
    assert {"/root/fluxfire/serve/worker.py", "/root/fluxfire/deploy/modal_app.py"} <= files


@pytest.mark.parametrize(
    ("snapshot", "options", "implementation"),
    [
        ("gpu", {"enable_gpu_snapshot": "True"}, "WarmServer.*"),
        pytest.param(None, {}, "Server.*", marks=pytest.mark.slow),
    ],
)
def test_a_gpu_snapshot_is_asked_for_by_name_and_none_is_none(
    tmp_path: Path, snapshot: str | None, options: dict[str, str], implementation: str
):
    file = tmp_path / "mine.py"
    file.write_text(f"from fluxfire.deploy.modal_app import make_app\napp = make_app('mine', snapshot={snapshot!r})")
    server = functions(deploy(file, tmp_path)[0])["server"]
    assert server.checkpointing_enabled is (snapshot is not None)
    assert dict(server.experimental_options) == options
    assert server.implementation_name == implementation


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("api_keys", "FLUXFIRE_API_KEYS"),
        ("hf_token", "HF_TOKEN"),
        ("s3_secret_access_key", "FLUXFIRE_S3_SECRET_ACCESS_KEY"),
    ],
)
def test_a_secret_among_the_settings_is_refused_without_its_value(name: str, variable: str):
    with pytest.raises(ArgumentError, match=f"{name} is a secret: put {variable} into") as refused:
        make_app(settings={name: "hunter2"})
    assert "hunter2" not in str(refused.value)


def test_a_misspelt_setting_and_an_unknown_snapshot_are_refused():
    with pytest.raises(ArgumentError, match="found max_step, needed one of"):
        make_app(settings={"max_step": 3})
    with pytest.raises(ArgumentError, match="found 'both', needed 'cpu', 'gpu' or None"):
        make_app(snapshot="both")


def test_fetch_run_locally_finds_the_weights_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("FLUXFIRE_MODEL", "someone/model")
    function = modal.App("local").function()(fetch)
    assert function.local() == str(repository / "snapshots" / commit)
    monkeypatch.setenv("FLUXFIRE_MODEL", "embedded")
    with pytest.raises(ArgumentError, match="nothing to fetch"):
        function.local()


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a container; the file that makes a worker sick."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"model": "host_pipes:make", "device": "cpu", "port": port, "max_batch": 1, "warm_sizes": [[64, 64]]}
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv(f"FLUXFIRE_{name.upper()}", text)
    monkeypatch.setenv("FLUXFIRE_API_KEYS", json.dumps([{"name": "tests", "key": KEY}]))
    for name, value in with_tests_on_path().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLUXTEST_SICK", str(tmp_path / "sick"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "log_to_stderr", lambda secrets: None)  # the log is pytest's here
    return tmp_path / "sick"


def picture() -> np.ndarray:
    ask = {"prompt": "teapot, noto style", "steps": 2, "seed": 1, "width": 64, "height": 64, "output": "bytes"}
    url = f"http://127.0.0.1:{os.environ['FLUXFIRE_PORT']}/inference"
    answer = httpx2.post(url, json=ask, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
    assert answer.status_code == 200, answer.text
    return np.asarray(open_picture(answer.content)).astype(int)


def test_a_held_container_has_loaded_nothing_and_one_that_wakes_with_other_weights_is_given_a_new_worker(
    container: Path,
):
    server = HeldServer()
    server.hold()
    host = server._host
    worker = host._engine.supervisor.worker
    assert worker and host._engine.facts is None and not host._engine.ready
    server.let_go()
    assert host._engine.supervisor.worker is worker  # the same process went on
    host.remember()  # from here on as WarmServer does
    well = picture()
    assert well.shape == (64, 64, 3)
    assert host.check()
    container.write_text(f"{worker.pid} numb")
    assert np.abs(picture() - well).max() > 50  # it is really sick
    assert not host.check()
    assert host._engine.supervisor.worker is not worker
    assert np.abs(picture() - well).max() <= 1
    assert host.check()
    server.stop()
    assert not host._thread.is_alive()


@pytest.mark.slow
def test_a_container_whose_worker_is_stuck_after_waking_is_given_a_new_one(
    container: Path, monkeypatch: pytest.MonkeyPatch
):
    server = WarmServer()
    server.start()
    worker = server._host._engine.supervisor.worker
    container.write_text(f"{worker.pid} stuck")
    monkeypatch.setattr(host, "TEST_S", 3.0)
    assert not server._host.check()
    assert server._host._engine.supervisor.worker is not worker
    assert picture().shape == (64, 64, 3)
    server.stop()


def test_a_container_without_api_keys_does_not_start(container: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLUXFIRE_API_KEYS", "[]")
    with pytest.raises(ArgumentError, match="FLUXFIRE_API_KEYS is not set"):
        WarmServer().start()


@pytest.mark.slow
def test_a_container_whose_model_cannot_be_loaded_says_why(container: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLUXFIRE_MODEL", "host_pipes:nothing")
    with pytest.raises(RuntimeError, match="could not be loaded: AttributeError"):
        WarmServer().start()
