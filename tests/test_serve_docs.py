"""docs/serving.md: its table of settings is made from the settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fluxfire.serve import settings
from fluxfire.serve.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"


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
