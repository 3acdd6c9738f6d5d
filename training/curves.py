"""Draw the loss curves that the two training scripts logged.

Run: ``python -m training.curves docs/assets/embedded-model-loss.png``.
"""

import json
import sys
from pathlib import Path

from training import data

OUT = data.WORK / "out"


def main(file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    vae, rows = json.loads((OUT / "vae.json").read_text())["log"], json.loads((OUT / "train.json").read_text())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    left.semilogy([row["seconds"] for row in vae], [row["loss"] for row in vae])
    left.set(title="autoencoder", xlabel="seconds", ylabel="loss")
    for key, label in (("t2i", "text to image"), ("edit", "edits"), ("edit_held_out", "edits, held-out things")):
        right.semilogy([row["seconds"] for row in rows], [row[key] for row in rows], label=label)
    right.set(title="denoiser (at the end: distance to its teacher)", xlabel="seconds", ylabel="mean squared error")
    right.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
