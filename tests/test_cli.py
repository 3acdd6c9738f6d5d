"""`fluxfire demo` on the embedded model, with few steps and uncompiled; and what is refused."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxfire import cli
from fluxfire.demo import show


def run(*arguments: object) -> int | str | None:
    """The exit code, or the line that `sys.exit` prints."""
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    return exit.value.code


def demo(out: Path, capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], str]:
    assert run("demo", "--out", out, "--device", "cpu", "--no-compile", "--prompts", 1, *arguments) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout.count("\n") == 1
    return json.loads(stdout), stderr


def test_demo_prints_one_json_line_last(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    result, shown = demo(tmp_path, capfd, "--steps", 4, "--threshold", 0.3)
    assert [picture["kind"] for picture in result["pictures"]] == ["text", "edit"]
    for picture in result["pictures"]:
        assert picture["computed_steps"] + picture["cached_steps"] == 4
        assert picture["computed_steps"] >= 1
        assert picture["baseline_s"] > 0 < picture["optimized_s"]
    for kind in ("text", "edit"):
        medians = result[kind]
        assert medians["speedup"] == pytest.approx(medians["baseline_s"] / medians["optimized_s"], rel=0.02)
    assert (result["steps"], result["threshold"], result["device"], result["dtype"]) == (4, 0.3, "cpu", "float32")
    assert (result["graphs"], result["compile_s"]) == (0, 0)
    # What people read is on stderr: the table and the report.
    assert "text: median" in shown
    assert "print(fluxfire.report(pipe))" in shown


def test_demo_saves_a_sheet_for_text_and_one_with_references_for_edits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    result, _ = demo(tmp_path / "new" / "folder", capfd, "--steps", 2)
    sizes = {}
    for file in result["files"]:
        with Image.open(file) as sheet:
            sizes[Path(file).name] = sheet.size
    assert sizes["text.png"][1] == sizes["edit.png"][1]
    assert sizes["text.png"][0] < sizes["edit.png"][0]


def test_demo_at_threshold_zero_makes_the_same_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    result, shown = demo(tmp_path, capfd, "--steps", 3, "--threshold", 0)
    for picture in result["pictures"]:
        assert (picture["psnr_db"], picture["ssim"], picture["cached_steps"]) == (None, 1.0, 0)
    assert "inf" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "abacus"), "--device"),
        (("--device", "meta"), "--device"),
        (("--dtype", "int8"), "--dtype"),
        (("--steps", 0), "--steps"),
        (("--prompts", 0), "--prompts"),
        (("--out", "/dev/null/folder"), "--out"),
    ],
    ids=["no-device", "device-without-data", "dtype", "steps", "prompts", "out"],
)
def test_demo_refuses_an_option_by_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
):
    assert run("demo", "--out", tmp_path, *arguments) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert message in stderr


@pytest.mark.parametrize("threshold", ["-1", "nan"])
def test_demo_refuses_a_threshold_in_the_words_of_the_library(tmp_path: Path, threshold: str):
    exit = run("demo", "--out", tmp_path, "--device", "cpu", "--no-compile", "--threshold", threshold)
    assert str(exit).startswith("fluxfire: threshold: found")


def test_demo_without_its_extra_says_what_to_type(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "skimage" else object())
    assert run("demo") == "fluxfire: this command needs skimage: pip install 'fluxfire[demo]'"


def test_command_line_without_typer_says_what_to_type(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "fluxfire.cli")
    with pytest.raises(SystemExit, match=r"pip install 'fluxfire\[cli\]'"):
        importlib.import_module("fluxfire.cli")


def test_difference_is_black_where_pictures_are_equal_and_brightened_elsewhere():
    a = np.full((4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[0, 0] = (103, 90, 255)
    difference = np.asarray(show.difference(Image.fromarray(a), Image.fromarray(b)))
    assert difference[0, 0].tolist() == [3 * show.DIFFERENCE, 10 * show.DIFFERENCE, 255]
    assert not difference[1:].any()


def test_contact_sheet_shows_each_picture_in_its_column():
    red, green, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
    job = SimpleNamespace(kind="edit", prompt="in blue", reference=red)
    numbers = {"baseline_s": 1.0, "optimized_s": 0.5, "computed_steps": 1, "cached_steps": 1}
    pair = SimpleNamespace(job=job, baseline=green, optimized=blue, psnr_db=3.0, ssim=0.1, **numbers)
    sheet = np.asarray(show.contact_sheet((pair,)))
    middle = [tuple(sheet[-140, x].tolist()) for x in range(140, sheet.shape[1], 268)]
    assert middle == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255)]


@pytest.mark.parametrize("command", [["warm", "/nowhere"], ["tune", "--max-error", "0.1", "--model", "/nowhere"]])
def test_a_model_that_cannot_be_loaded_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    more = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path)] if command[0] == "tune" else []
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, *more])
    assert str(exit.value.code).startswith("fluxfire: model: found '/nowhere', needed a folder")
