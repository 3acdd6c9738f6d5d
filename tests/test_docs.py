"""The site builds, strictly, and says what the code says: names, defaults and their sources, messages, versions."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fluxfire

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 5
    for page in pages:
        text = page.read_text()
        for tag in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http', "fonts.googleapis"):
            assert tag not in text, page


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    missing = [
        name
        for name in fluxfire.__all__
        if name != "__version__" and not re.search(rf'id="fluxfire(\.warm)?\.{name}"', page)
    ]
    assert missing == []


def defaults() -> set[tuple[str, str, str]]:
    """(function, argument, default) of what people call with defaults; a `check_` has those of its `apply_`."""
    functions = [name for name in fluxfire.__all__ if inspect.isfunction(getattr(fluxfire, name))]
    found = set()
    for name in functions:
        for argument in inspect.signature(getattr(fluxfire, name)).parameters.values():
            if argument.default is not argument.empty and not name.startswith(("check_", "plan_")):
                found.add((name, argument.name, repr(argument.default)))
    return found


def test_every_default_has_its_source_and_no_other_is_named() -> None:
    rows = []
    for section in (ROOT / "docs" / "defaults.md").read_text().split("\n## `")[1:]:
        function, *lines = section.splitlines()
        cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| `")]
        rows += [[function.strip("`"), *(cell.strip() for cell in row)] for row in cells]
    told = {tuple(cell.strip("`") for cell in row[:3]) for row in rows}
    assert told == defaults(), "docs/defaults.md has a row for each default: why, and the page that shows it"
    for row in rows:  # mkdocs looks whether the links lead somewhere
        assert re.search(r"\]\([a-z/-]+\.md(#[a-z0-9-]+)?\)", row[4]) or row[4] in ("a choice", "not measured"), row


def test_plan_and_check_have_the_defaults_of_what_they_tell_about() -> None:
    pairs = [("plan_pipeline", "optimize_pipeline")]
    pairs += [(name, name.replace("check_", "apply_")) for name in fluxfire.__all__ if name.startswith("check_")]
    for one, other in pairs:
        parameters = [dict(inspect.signature(getattr(fluxfire, name)).parameters) for name in (one, other)]
        assert list(parameters[0].values()) == list(parameters[1].values()), (one, other)


def messages() -> str:
    """All strings of the source, with … in the place of what is filled in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_each_message_of_the_troubleshooting_page_is_one_that_the_source_has() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### `([^`]+)`$", text.split("## Outside of fluxfire")[0], re.M)
    assert len(headings) > 10
    known = messages()
    for heading in headings:
        for part in heading.split("…"):
            assert part.strip() in known, heading


def test_the_changelog_begins_with_this_version_and_the_citation_has_it() -> None:
    first = re.search(
        r"^## (\S+)(?: \((?:not released yet|\d{4}-\d{2}-\d{2})\))?$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert first and first[1] == fluxfire.__version__
    assert f"\nversion: {fluxfire.__version__}\n" in (ROOT / "CITATION.cff").read_text()
