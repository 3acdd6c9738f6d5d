"""The contact sheet of `tune`, its command line, and the files of prompts that it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cli import run

from fluxfire import ArgumentError, Fingerprint, Setting, Trial, demo
from fluxfire.bench import prompts
from fluxfire.bench.sheet import ContactSheet


def setting(threshold: float) -> Setting:
    model = Fingerprint("FluxTransformer2DModel", "a", "b", "c")
    return Setting(threshold, 8, model, (), 0.02, None, 0.9, 0.01, 0.01, 16, 8, 2, 5)


def trial(prompt: int, threshold: float, colour: str, error: float) -> Trial:
    return Trial(prompt, threshold, (Image.new("RGB", (32, 16), colour),), error, 8, 8 if threshold == 0 else 4)


@pytest.fixture
def sheet(tmp_path: Path) -> ContactSheet:
    sheet = ContactSheet(tmp_path / "new" / "sheet", ["<b>red</b>", "blue"])
    for one in (
        trial(0, 0.0, "red", 0),
        trial(1, 0.0, "blue", 0),
        trial(1, 0.3, "white", 0.5),  # given up here
        trial(0, 0.1, "red", 0.005),
        trial(1, 0.1, "#0000f0", 0.01),
    ):
        sheet(one)
    return sheet


def test_the_png_has_the_worst_prompt_first_and_differences_below(sheet: ContactSheet) -> None:
    png, _ = sheet.save(setting(0.1))
    with Image.open(png) as image:
        pixels = np.asarray(image)
    first, second, top = 100, 302, 64 + 20 + 40
    assert pixels[top, first].tolist() == [0, 0, 255] and pixels[top, second].tolist() == [0, 0, 240]
    assert pixels[top + 212, second].tolist() == [0, 0, 60]  # 15 x 4
    assert pixels[top, second + 202].tolist() == [255, 255, 255]
    below = top + 2 * 192 + 3 * 20 + 10
    assert pixels[below, first].tolist() == [255, 0, 0]
    assert pixels[below, second + 202].tolist() == [255, 255, 255]  # the paper: this prompt was not drawn at 0.3


def test_the_page_shows_every_picture_once_and_escapes_prompts(sheet: ContactSheet) -> None:
    _, page = sheet.save(setting(0.1))
    text = page.read_text()
    assert "<b>" not in text and "&lt;b&gt;red" in text
    assert text.count('class="pair"') == 5 and text.count('class="difference"') == 3
    for part in text.split('src="')[1:]:
        assert (page.parent / part.split('"')[0]).is_file()


def test_the_command_tunes_the_embedded_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chosen = ("--steps", 4, "--count", 2, "--no-compile", "--device", "cpu", "--out", tmp_path)
    assert run("tune", "--speedup", 1.3, *chosen) == 0
    stdout, stderr = capfd.readouterr()
    result: dict[str, Any] = json.loads(stdout)
    assert stdout.count("\n") == 1 and "threshold" in stderr
    assert [Path(file).name for file in result["files"]] == ["setting.json", "sheet.png", "sheet.html"]
    found = Setting.load(result["files"][0])
    assert (found.steps, found.prompts, result["threshold"]) == (4, 2, found.threshold)
    assert found.computed * 1.3 <= found.calls == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--size", "big"), "--size"), (("--model", "somewhere"), "--prompts"), (("--steps", 0), "--steps")],
)
def test_a_bad_option_is_refused_by_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    assert run("tune", "--max-error", 0.1, "--out", tmp_path, *arguments) == 2
    assert message in capfd.readouterr().err


def test_prompts_come_from_lines_or_from_calls_with_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n")
    assert prompts.read(tmp_path / "a.txt") == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    demo.reference(demo.references()[0]).save(tmp_path / "in.png")
    (tmp_path / "a.json").write_text(json.dumps(["a cat", {"prompt": "in noto style", "image": "in.png"}]))
    text, edit = prompts.read(tmp_path / "a.json")
    assert text == {"prompt": "a cat"} and edit["image"].size == (128, 128)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "found no list"),
        ("a.json", "[", "prompts: "),
        ("a.json", "[3]", "found no list"),
        ("a.txt", "\n", "found no list"),
        ("a.json", '[{"image": "absent.png"}]', "no picture that can be read"),
    ],
)
def test_other_files_of_prompts_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ArgumentError, match=message):
        prompts.read(tmp_path / name)


def test_examples_are_half_edits() -> None:
    assert ["image" in job for job in prompts.examples(5)] == [False] * 3 + [True] * 2
