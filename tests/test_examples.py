"""The example scripts, run as one would run them, on the embedded model."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluxfire import demo

ROOT = Path(__file__).parent.parent
SECRET = "hf_not_a_token"


def run(script: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON of its last line, and all that it printed."""
    paths = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_the_kontext_benchmark_makes_the_size_asked_for(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"HF_TOKEN={SECRET}\n")
    model = ("--model", str(demo.model_path()))  # the way of real weights, which a folder goes too
    size = ("--width", "160", "--height", "96", "--steps", "4", "--runs", "2")
    result, printed = run("flux_kontext_benchmark.py", tmp_path, *model, *size, "--no-compile")
    rows = result["rows"]
    names = ["diffusers", "optimize_pipeline", "channels_last", "+ fused QKV", "+ cache 0.12"]
    assert [row["configuration"] for row in rows] == names
    assert all(len(row["seconds"]) == 2 for row in rows)
    assert [len(row["pattern"]) for row in rows] == [0, 4, 0, 0, 4]
    assert rows[0]["psnr_db"] is None and all(row["psnr_db"] is None or row["psnr_db"] > 20 for row in rows)
    assert (result["run"]["width"], result["run"]["height"]) == (160, 96)
    for name in names[:2]:
        with Image.open(tmp_path / "kontext-benchmark" / f"{name}.png") as picture:
            assert picture.size == (160, 96)
    assert SECRET not in printed and "160x96, 4 steps" in printed


SHORT = ("text_to_image", "edit_a_photo", "step_by_step", "batch_and_progress")
SERVICES = {"modal_deploy", "ray_serve"}  # what they are made of runs in tests/test_modal.py and tests/test_ray.py


@pytest.mark.parametrize("name", SHORT)
def test_a_short_example_runs_tiny(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny"])
    with warnings.catch_warnings(action="ignore"):  # of the libraries, about themselves
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    wanted = {
        "text_to_image": "pictures  approximate, because of cache",
        "edit_a_photo": "threshold 0: ############ (# computed, . cached)",
        "step_by_step": "restored, to the bit: True",
        "batch_and_progress": "step  0: computed  computed  computed",
    }
    assert wanted[name] in printed
    pictures = {"text_to_image": 1, "edit_a_photo": 2, "step_by_step": 0, "batch_and_progress": 3}
    assert len(list(tmp_path.glob("*.png"))) == pictures[name]


def test_every_example_is_short_and_run() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in (ROOT / "examples").glob("*.py")}
    del lengths["flux_kontext_benchmark"]  # a benchmark, with a test of its own
    assert set(lengths) - SERVICES == set(SHORT)
    assert max(lengths.values()) <= 40


def test_the_notebook_runs_and_is_committed_with_its_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    kept = json.dumps(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells[1:])
    for word in ("/root", "/home", "/tmp", "/work", "site-packages", "Traceback"):
        assert word not in kept
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more only wait for each other on a busy machine
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [output.get("text", "") for cell in cells for output in cell.outputs]
    assert "True\n" in said[-1]  # restored, to the bit
