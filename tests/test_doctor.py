"""`fluxfire doctor`: what it finds here, and what it says where something is missing."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxfire import cli, doctor
from fluxfire.store import Store

TOKEN = "hf_not_a_token"


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, dict[str, Any], str]:
    """Exit code, the line of JSON, what people read."""
    with pytest.raises(SystemExit) as exit:
        cli.main(["doctor", *arguments])
    stdout, stderr = capfd.readouterr()
    assert stdout.count("\n") == 1
    return exit.value.code, json.loads(stdout), stderr


def finding(what: str) -> doctor.Finding:
    return next(finding for finding in doctor.examine() if finding.what == what)


def test_it_names_what_is_here_in_text_and_in_json(capfd: pytest.CaptureFixture[str]) -> None:
    code, told, text = run(capfd)
    assert (code, told["ok"], told["missing"]) == (0, True, [])
    findings = {finding["what"]: finding for finding in told["findings"]}
    for name in ("torch", "diffusers", "transformers"):
        assert findings[name]["found"] == metadata.version(name) and f"{name} " in text
    assert {"[cli]", "[demo]", "[serve]", "compiler", "mega-cache", "HF_TOKEN"} <= set(findings)
    assert "[dev]" not in findings
    _, alone, nothing = run(capfd, "--format", "json")
    assert (alone, nothing) == (told, "")


def test_a_token_is_told_and_never_shown(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    _, told, text = run(capfd)
    assert "set (not shown)" in text
    assert TOKEN not in text and TOKEN not in json.dumps(told)


def test_without_a_token_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert finding("HF_TOKEN").state == "optional" and "hf auth login" in finding("HF_TOKEN").type


def test_an_old_library_and_an_extra_that_is_not_installed_come_with_what_to_type(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "fastapi":
            raise metadata.PackageNotFoundError(name)
        return "2.3.0" if name == "torch" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    code, told, text = run(capfd)
    assert (code, told["ok"], told["missing"]) == (1, False, ["torch"])
    assert "found 2.3.0, needed torch>=2.11\n" in text and '-> pip install "torch>=2.11"' in text
    serve = next(finding for finding in told["findings"] if finding["what"] == "[serve]")
    assert (serve["state"], serve["type"]) == ("optional", "pip install 'fluxfire[serve]'")
    assert "fastapi>=" in serve["found"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="torch uses the GPU here")
@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo '580.1, NVIDIA H100'", "NVIDIA 580.1, 1 GPU, but torch"),
        (
            "echo 'Failed to initialize NVML: driver/library version mismatch'; exit 18",
            "nvidia-smi fails: Failed to init",
        ),
    ],
    ids=["a driver that torch cannot use", "a broken driver"],
)
def test_a_gpu_that_torch_cannot_use_is_missing(
    script: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = finding("driver")
    assert found.state == "missing" and told in found.found and found.type


def test_a_missing_compiler_is_the_one_that_compile_would_name(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "found no C++ compiler, needed one to compile for a CPU: install g++ (apt-get install g++) or clang"
    monkeypatch.setattr("fluxfire.compile._missing_compiler", lambda device: reason)
    found = finding("compiler")
    assert (found.state, found.type) == ("missing", "install g++ (apt-get install g++) or clang")
    assert f"{found.found}: {found.type}" == reason


def test_the_store_is_looked_at_and_not_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "caches" / "fluxfire" / "megacache"  # conftest.empty_megacache
    assert "made when something is kept" in finding("mega-cache").found
    assert not folder.exists()
    store = Store(folder)
    store.put({"a": 1}, {}, b"12")
    store.close()
    assert f"{folder}, 1 artifacts, " in finding("mega-cache").found
    folder.chmod(0o777)
    assert finding("mega-cache").state == "missing"
