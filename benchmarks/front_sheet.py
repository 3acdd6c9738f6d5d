"""A contact sheet of what `front.py` made: some pictures of shard 0, uncached and by each method, with PSNR below.

python benchmarks/front_sheet.py --work ~/front
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import numpy as np
from front import KINDS, Work, decode
from front_methods import METHODS
from front_report import DOCS, TITLES, rows

SHOWN: Final = ("fluxfire", "cache-dit step mask + TaylorSeer", "diffusers TaylorSeer", "para-attn", "fewer steps")


def main() -> None:
    """At the higher target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=3)
    options = parser.parse_args()
    work = Work(options.work)
    assert set(SHOWN) <= set(METHODS)
    figure, axes = plt.subplots(2 * options.pictures, len(SHOWN) + 1, figsize=(13, 4.6 * options.pictures))
    for half, kind in enumerate(KINDS):
        found = {r["method"]: r["points"][0] for r in rows(work, kind, options.steps)}  # the last: the higher target
        baseline = work.baseline(kind, options.steps, 0)
        columns = [("uncached", baseline, None)]
        for name in SHOWN:
            point = found[name]
            made = decode(work.latents(point["key"]))
            columns.append((f"{name}\n{np.mean(point['saved']):.0%} saved", made, point["psnr"]))
        for row in range(options.pictures):
            for column, (title, pictures, psnr) in enumerate(columns):
                axis = axes[half * options.pictures + row, column]
                axis.imshow(pictures[row])
                axis.set_axis_off()
                below = "" if psnr is None else f"\n{psnr[row]:.1f} dB"
                axis.set_title((title if row == 0 else TITLES[kind] if column == 0 else "") + below, fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "assets" / "quality-sheet.png", dpi=80)


if __name__ == "__main__":
    main()
