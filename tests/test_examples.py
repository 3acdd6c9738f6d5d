"""The example scripts, run as one would run them, on the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
