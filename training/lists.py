"""The committed lists: which names are held out, and the prompts and seeds of the evaluation.

Writes ``src/fluxfire/demo/prompts.json``:

- ``held_out``: every name of 200 groups (`data.groups`) of at most three names, drawn at random; no picture of them
  is trained on, in any style, by the autoencoder or by the transformer.
- ``t2i``: 500 training names, one a group, as ``candidates``; 200 of them as ``cases`` with a style in turn and a
  seed.
- ``edit``: 200 held-out names, one a group, in two hundreds of ``candidates``; one case each, its source and target
  style in turn over the six directions. A case's candidates are its own hundred.

Run: ``python -m training.lists`` (seconds). The result is committed: all later steps read it, none makes it again.
"""

import json
import random
from itertools import permutations
from pathlib import Path
from typing import Any

from training import data

LISTS = Path(__file__).parents[1] / "src" / "fluxfire" / "demo" / "prompts.json"


def words(name: str) -> str:
    """The words of a name, as a prompt says them: ``red-apple`` -> ``red apple``."""
    return name.replace("-", " ")


def t2i_prompt(name: str, style: str) -> str:
    return f"{words(name)}, {style} style"


def edit_prompt(style: str) -> str:
    return f"in {style} style"


def read() -> dict[str, Any]:
    lists: dict[str, Any] = json.loads(LISTS.read_text())
    return lists


def make() -> dict[str, Any]:
    rng = random.Random(0)
    by_group: dict[str, list[str]] = {}
    for name, group in data.groups(data.load()).items():
        by_group.setdefault(group, []).append(name)
    keys = sorted(by_group)
    rng.shuffle(keys)
    held_groups = [key for key in keys if len(by_group[key]) <= 3][:200]
    held_out = [rng.choice(by_group[key]) for key in held_groups]
    train_groups = [key for key in keys if key not in held_groups]
    candidates = [rng.choice(by_group[key]) for key in train_groups[:500]]
    t2i = [
        {"prompt": t2i_prompt(name, style), "name": name, "style": style, "seed": seed}
        for seed, name in enumerate(candidates[:200])
        for style in [data.STYLES[seed % 3]]
    ]
    directions = list(permutations(data.STYLES, 2))
    edit = [
        {"prompt": edit_prompt(style), "name": name, "source": source, "style": style, "seed": seed}
        for seed, name in enumerate(held_out)
        for source, style in [directions[seed % 6]]
    ]
    return {
        "styles": list(data.STYLES),
        "held_out": sorted(name for key in held_groups for name in by_group[key]),
        "t2i": {"candidates": candidates, "cases": t2i},
        "edit": {"candidates": [held_out[:100], held_out[100:]], "cases": edit},
    }


if __name__ == "__main__":
    lists = make()
    LISTS.write_text(json.dumps(lists, indent=1) + "\n")
    print({key: len(lists[key]) for key in ("held_out",)}, LISTS)
