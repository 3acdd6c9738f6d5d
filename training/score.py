"""The scores: is a made picture nearest to the right one?

Definitions, each by both distances of `training.features`, in per cent of 200 cases (`training.lists`):

- ``t2i_thing``: of the 500 candidates' pictures in the prompt's style, the nearest to the output is the prompt's.
- ``edit_style``: of the three pictures of the thing itself, one a style, the nearest to the output is the one in the
  target style.
- ``edit_thing``: of the 100 candidates' pictures in the target style, the nearest to the output is the right thing's.

Baselines, which need no model: ``copy`` gives the reference back unchanged; ``lookup`` finds the nearest *training*
picture to the reference in its style (by the same distance) and gives that thing's picture in the target style: what
pure memory can reach.

Run: ``python -m training.score --baselines`` (a minute on 2 cores).
"""

import argparse
import json
from typing import Any

import numpy as np

from training import data, lists
from training.features import FEATURES, features

Pictures = np.ndarray  # uint8, (N, 128, 128, 3)


def _nearest(query: np.ndarray, pool: np.ndarray) -> int:
    return int(((pool - query) ** 2).sum(1).argmin())


class Bank:
    """Features of every picture, by style and name: `self[kind][style, name]`."""

    def __init__(self) -> None:
        self.pictures = data.load()
        self.style = {style: i for i, style in enumerate(data.STYLES)}
        self.name = {name: i for i, name in enumerate(data.names())}
        flat = self.pictures.reshape(-1, *self.pictures.shape[2:])
        self.features = {k: features(flat, k).reshape(*self.pictures.shape[:2], -1) for k in FEATURES}

    def picture(self, style: str, name: str) -> np.ndarray:
        found: np.ndarray = self.pictures[self.style[style], self.name[name]]
        return found

    def pool(self, kind: str, style: str, among: list[str]) -> np.ndarray:
        found: np.ndarray = self.features[kind][self.style[style], [self.name[n] for n in among]]
        return found


def score_t2i(bank: Bank, outputs: Pictures, cases: list[dict[str, Any]], candidates: list[str]) -> dict[str, float]:
    scores = {}
    for kind in FEATURES:
        found = features(outputs, kind)
        hits = [
            candidates[_nearest(f, bank.pool(kind, c["style"], candidates))] == c["name"]
            for f, c in zip(found, cases, strict=True)
        ]
        scores[f"t2i_thing_{kind}"] = 100 * float(np.mean(hits))
    return scores


def score_edit(
    bank: Bank, outputs: Pictures, cases: list[dict[str, Any]], hundreds: list[list[str]]
) -> dict[str, float]:
    scores = {}
    for kind in FEATURES:
        style_hits, thing_hits = [], []
        for f, case in zip(features(outputs, kind), cases, strict=True):
            three = bank.features[kind][:, bank.name[case["name"]]]
            style_hits.append(data.STYLES[_nearest(f, three)] == case["style"])
            among = next(h for h in hundreds if case["name"] in h)
            thing_hits.append(among[_nearest(f, bank.pool(kind, case["style"], among))] == case["name"])
        scores[f"edit_style_{kind}"] = 100 * float(np.mean(style_hits))
        scores[f"edit_thing_{kind}"] = 100 * float(np.mean(thing_hits))
    return scores


def baselines(bank: Bank) -> dict[str, dict[str, float]]:
    """The scores of `copy` and of `lookup` (once by each distance) on the edit cases."""
    edit = lists.read()["edit"]
    cases, hundreds = edit["cases"], edit["candidates"]
    copied = np.stack([bank.picture(c["source"], c["name"]) for c in cases])
    found = {"copy": score_edit(bank, copied, cases, hundreds)}
    held_out = set(lists.read()["held_out"])
    train = [name for name in data.names() if name not in held_out]
    for kind in FEATURES:
        looked_up = []
        for c in cases:
            query = bank.features[kind][bank.style[c["source"]], bank.name[c["name"]]]
            looked_up.append(bank.picture(c["style"], train[_nearest(query, bank.pool(kind, c["source"], train))]))
        found[f"lookup_{kind}"] = score_edit(bank, np.stack(looked_up), cases, hundreds)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baselines", action="store_true", required=True)
    parser.parse_args()
    print(json.dumps(baselines(Bank()), indent=1))
