"""docs/serving.md: its table of settings is made from the settings, its examples run; and the GPU's model is whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Served, open_picture

from fluxfire.serve import generate, settings
from fluxfire.serve.jobs import Shape
from fluxfire.serve.settings import Settings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serving.md"


def settings_table() -> str:
    """Every setting with its comment, under the headings that stand between them."""
    source = Path(settings.__file__).read_text().split("class Settings")[1].split("@model_validator")[0]
    lines = ["| variable | default | what |", "|---|---|---|"]
    for line in source.splitlines():
        if heading := re.fullmatch(r"    # (.*)", line):
            lines.append(f"| **{heading[1]}** | | |")
        elif field := re.fullmatch(r"    (\w+): .* = (.*?)  # (.*)", line):
            name, default, what = field.groups()
            alias = re.search(r'validation_alias="(\w+)"', default)
            told = "" if alias or default in ("None", "()") else f"`{default}`"
            lines.append(f"| `{alias[1] if alias else 'FLUXFIRE_' + name.upper()}` | {told} | {what} |")
    return "\n".join(lines)


def test_every_setting_is_in_the_table(request: pytest.FixtureRequest):
    table = settings_table()
    assert table.count("\n| `") == len(Settings.model_fields)  # each has a comment, all on one line
    text = PAGE.read_text()
    whole = re.sub(
        r"(?s)(?<=<!-- settings -->\n).*(?=<!-- /settings -->)", f"\n{table}\n\n".replace("\\", "\\\\"), text
    )
    if request.config.getoption("--write-docs"):
        PAGE.write_text(whole)
    assert PAGE.read_text() == whole, "run: pytest tests/test_serve_docs.py --write-docs, and read the difference"


def examples(language: str) -> list[str]:
    found = re.findall(rf"(?s)```{language}\n(.*?)```", PAGE.read_text())
    return [text for text in found if "http://127.0.0.1:8000" in text and "pip install" not in text]


def test_examples_run(served: Served, tmp_path: Path):
    curl, python = examples("bash"), examples("python")
    assert (len(curl), len(python)) == (1, 1)
    for command, text in ((["bash", "-ec"], curl[0]), ([sys.executable, "-c"], python[0])):
        text = text.replace("http://127.0.0.1:8000", served.url)
        done = subprocess.run([*command, text], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert open_picture((tmp_path / "apple.png").read_bytes()).size == (128, 128)
    assert len(json.loads((tmp_path / "edits.json").read_text())["pictures"]) == 2
    events = re.findall("event: (.*)", (tmp_path / "events.txt").read_text())
    assert {"order", "preview", "picture"} <= set(events)
    assert open_picture((tmp_path / "sailboat.png").read_bytes()).size == (128, 128)
    assert re.findall(r"(\w+) \d+\n", done.stdout) == ["partial_image", "completed"]  # of 4 steps one can be shown


def test_model_for_throughput_is_whole_and_every_other_step_of_it_hits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import serving_model

    model = serving_model.tiny()
    for threshold, hits in ((0, 0), (serving_model.HIT_ANYWAY, 3)):
        shape = Shape(32, 32, 6, model.guidance, threshold, None)
        samples = [generate.Sample(str(index), "an apple", index) for index in range(2)]
        outputs, seconds = generate.generate(model, shape, samples, generate.Watch())
        assert [(output.hits, output.computed) for output in outputs] == [(hits, 6 - hits)] * 2
        assert min(seconds[stage] for stage in ("prepare", "denoise", "decode")) > 0
