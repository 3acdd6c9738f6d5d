"""The data: three open emoji sets, drawn at 128 x 128, aligned by name.

What it makes: ``training/work/pictures.npy``, uint8, (styles, names, 128, 128, 3), white background, styles and names
in the order of `STYLES` and `names()`.

How: `npm pack` fetches the three packages; ``icons.json`` in each has SVG bodies by English name; 1,563 names stand
in all three sets. A body becomes a picture by wrapping it in an ``<svg viewBox>`` of the icon's size and giving that
to resvg.

Near-duplicates are grouped, so that a held-out name has no twin among the training names: first by name (`stem`:
clock faces, the man and the woman of an activity, one shape in several colours, buttons with a Japanese sign), then
by picture (two names whose pictures differ by less than `TWIN_RMS` at 32 x 32 in any style fall into one group).

Run: ``python -m training.data`` (about a minute on 2 cores).
"""

import argparse
import functools
import io
import json
import re
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

WORK = Path(__file__).parent / "work"
NPM = WORK / "npm"
PICTURES = WORK / "pictures.npy"
SIZE = 128
TWIN_RMS = 0.07
PACKAGES = {
    "noto": "iconify-json-noto-1.2.9.tgz",
    "twemoji": "iconify-json-twemoji-1.2.5.tgz",
    "fluent": "iconify-json-fluent-emoji-flat-1.2.6.tgz",
}
STYLES = tuple(PACKAGES)

_COLOURS = (
    "red|orange|yellow|green|blue|light-blue|purple|brown|black|white|pink|grey|hollow-red|large-blue|large-orange"
)
_RULES = (  # (pattern over the whole name, group)
    (r".*-(oclock|thirty)", "clock-face"),
    (r"keycap-.*", "keycap"),
    (r"japanese-.*-button|.*-button-blood-type|(cool|free|new|ng|ok|sos|up|vs|cl|id)-button", "lettered-button"),
    (r"globe-showing-.*", "globe"),
    (rf"({_COLOURS})-(circle|heart|square|book|diamond)", "coloured-shape"),
    (r"(black|white)-.*-square.*|radio-button|.*-square-button|(small|large)-(blue|orange)-diamond", "coloured-shape"),
    (r".*moon(-face)?", "moon"),
    (r"(input|heavy)-.*", "input"),
    (r".*-arrow|.*arrows.*|right-arrow-.*|left-arrow-.*", "arrow"),
    (r"(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus)", "zodiac"),
    (r"(open|closed)-mailbox-.*", "mailbox"),
    (r"(red|white)-(question|exclamation)-mark", "mark"),
    (r"speaker-.*-volume|muted-speaker", "speaker"),
    (r".*hourglass.*", "hourglass"),
)


def stem(name: str) -> str:
    """The group of `name`, judged by the name alone."""
    for pattern, group in _RULES:
        if re.fullmatch(pattern, name):
            return group
    name = re.sub(r"-facing-right$", "", name)
    return re.sub(r"^(man|woman|person|mens|womans|womens|mans|old|older)-(?=.)", "person-", name)


@functools.cache
def icon_set(style: str) -> dict[str, Any]:
    """The parsed ``icons.json`` of a style, from its npm tarball."""
    with tarfile.open(NPM / PACKAGES[style]) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        icons: dict[str, Any] = json.load(member)
    return icons


@functools.cache
def names() -> tuple[str, ...]:
    """The names that stand in all three sets, sorted."""
    return tuple(sorted(set.intersection(*(set(icon_set(style)["icons"]) for style in STYLES))))


def render(style: str, name: str) -> np.ndarray:
    """Draw one icon: uint8, (128, 128, 3), on white, centred when its box is not square."""
    import resvg_py
    from PIL import Image

    icons = icon_set(style)
    icon = icons["icons"][name]
    w, h = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    side = max(w, h)
    box = f"{(w - side) / 2} {(h - side) / 2} {side} {side}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" viewBox="{box}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def _render_pair(pair: tuple[str, str]) -> np.ndarray:
    return render(*pair)


@functools.cache
def load() -> np.ndarray:
    """All pictures: uint8, (styles, names, 128, 128, 3); drawn once, then kept in ``pictures.npy``."""
    if not PICTURES.exists():
        with ProcessPoolExecutor() as pool:
            pairs = [(style, name) for style in STYLES for name in names()]
            drawn = list(pool.map(_render_pair, pairs, chunksize=50))
        np.save(PICTURES, np.stack(drawn).reshape(len(STYLES), len(names()), SIZE, SIZE, 3))
    pictures: np.ndarray = np.load(PICTURES, mmap_mode="r")
    return pictures


def small(pictures: np.ndarray) -> np.ndarray:
    """Pictures (..., 128, 128, 3) as float32 vectors of their 32 x 32 mean, in [0, 1]: (..., 3072)."""
    lead = pictures.shape[:-3]
    cells = pictures.reshape(*lead, 32, SIZE // 32, 32, SIZE // 32, 3).astype(np.float32) / 255
    return cells.mean(axis=(-4, -2)).reshape(*lead, -1)


def groups(pictures: np.ndarray) -> dict[str, str]:
    """Name -> group, by name and by picture (see the module docstring)."""
    parent = {name: stem(name) for name in names()}
    leader = {group: group for group in parent.values()}

    def find(group: str) -> str:
        while leader[group] != group:
            group = leader[group]
        return group

    for style in range(len(STYLES)):
        flat = small(pictures[style])
        square = (flat**2).sum(1)
        distance = square[:, None] + square[None] - 2 * flat @ flat.T
        for a, b in np.argwhere(np.triu(distance / flat.shape[1] < TWIN_RMS**2, k=1)):
            first, second = find(parent[names()[a]]), find(parent[names()[b]])
            leader[max(first, second)] = min(first, second)
    return {name: find(group) for name, group in parent.items()}


def fetch() -> None:
    """`npm pack` the packages that are missing under ``training/work/npm``."""
    NPM.mkdir(parents=True, exist_ok=True)
    for file in PACKAGES.values():
        if not (NPM / file).exists():
            package, version = file.removesuffix(".tgz").removeprefix("iconify-json-").rsplit("-", 1)
            subprocess.run(["npm", "pack", f"@iconify-json/{package}@{version}"], cwd=NPM, check=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    fetch()
    pictures = load()
    print("pictures", pictures.shape, "names", len(names()), "groups", len(set(groups(pictures).values())))


if __name__ == "__main__":
    main()
