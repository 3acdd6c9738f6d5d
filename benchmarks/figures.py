"""The figures of docs/how-it-works.md and docs/steps/cache.md, from real runs of the embedded model.

    python benchmarks/figures.py docs/assets     # needs the extras bench and demo; a minute on 2 CPU cores

One text picture and one edit, 28 steps, float32. The same seeds give the same figures, up to rounding.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import fluxfire
from fluxfire import demo
from fluxfire.bench.quality import psnr
from fluxfire.blocks import denoiser_of, family_of
from fluxfire.demo import compare

STEPS = 28
THRESHOLDS = (0.0, 0.05, 0.12, 0.25, 0.5)
COMPUTED, HIT, LINE = "#264653", "#2a9d8f", "#e76f51"


def make(pipe: Any, job: compare.Job) -> Image.Image:
    """One picture."""
    import torch

    image = {} if job.reference is None else {"image": job.reference}
    generator = torch.Generator().manual_seed(job.seed)
    return pipe(  # type: ignore[no-any-return]
        prompt=job.prompt, num_inference_steps=STEPS, generator=generator, **demo.call_kwargs(), **image
    ).images[0]


def distances(axes: Any, pipe: Any, job: compare.Job, threshold: float) -> None:
    """The distance of each call to the last computed one, and what was decided."""
    fluxfire.set_cache_threshold(pipe, threshold)
    make(pipe, job)
    calls = fluxfire.cache_stats(pipe).last_run
    for call in calls:
        height, hit = call.distances[0], call.hits[0]
        first = not np.isfinite(height)
        axes.bar(
            call.step, 2 * threshold if first else height, color=HIT if hit else COMPUTED, alpha=0.25 if first else 1
        )
    axes.axhline(threshold, color=LINE, linewidth=1)
    axes.text(STEPS - 0.4, threshold, f" {threshold:g}", color=LINE, va="center")
    hits = sum(call.hits[0] for call in calls)
    kind = "edit" if job.reference is not None else "text to image"
    axes.set_title(f"{kind}: {job.prompt!r}, {hits} of {STEPS} steps cached", loc="left", fontsize=10)
    axes.set(ylabel="relative L1 distance", xlim=(-0.8, STEPS + 1))


def which_ran(axes: Any, pipe: Any, job: compare.Job, threshold: float) -> None:
    """Which blocks computed anything in which step: their attention modules are watched."""
    blocks = family_of(pipe).blocks(denoiser_of(pipe))
    ran = np.zeros((len(blocks), STEPS))
    step = 0

    def next_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal step
        step = index + 1
        return values

    hooks = [
        block.attn.register_forward_pre_hook(lambda *_, row=row: ran.__setitem__((row, step), 1))
        for row, block in enumerate(blocks)
    ]
    import torch

    fluxfire.set_cache_threshold(pipe, threshold)
    generator = torch.Generator().manual_seed(job.seed)
    call = demo.call_kwargs() | {"callback_on_step_end": next_step}
    pipe(prompt=job.prompt, num_inference_steps=STEPS, generator=generator, **call)
    for hook in hooks:
        hook.remove()
    axes.imshow(ran, cmap=matplotlib.colors.ListedColormap(["#d9e7e4", COMPUTED]), aspect="auto", vmin=0, vmax=1)
    axes.set_xticks(np.arange(-0.5, STEPS), minor=True)
    axes.set_yticks(np.arange(-0.5, len(blocks)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.set_yticks([0, len(blocks) - 1], ["first block", "last block"])
    axes.set_xlabel(
        "denoising step (dark: the block computed; light: it handed its input on, and the last added what was kept)"
    )
    axes.set_title(
        f"{job.prompt!r} at {threshold:g}: {ran.mean():.0%} of all block calls computed", loc="left", fontsize=10
    )


def strip(pipe: Any, jobs: list[compare.Job], file: Path) -> None:
    """The same seeds over thresholds, with hits and distance to the first column."""
    side, gap, text = 2 * demo.SIZE, 8, 44
    sheet = Image.new("RGB", ((side + gap) * len(THRESHOLDS) - gap, (side + text) * len(jobs)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, job in enumerate(jobs):
        for column, threshold in enumerate(THRESHOLDS):
            fluxfire.set_cache_threshold(pipe, threshold)
            picture = make(pipe, job)
            if not threshold:
                uncached = np.asarray(picture)
            x, y = column * (side + gap), row * (side + text)
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
            hits = fluxfire.cache_stats(pipe).marks().count(".")
            label = f"threshold {threshold:g}: {hits} of {STEPS} cached"
            if threshold:
                label += f"\n{psnr(np.asarray(picture), uncached):.1f} dB to the uncached one"
            draw.text((x + 2, y + side + 2), label, fill="black", font=font)
    sheet.save(file, optimize=True)


def main(folder: Path) -> None:
    """Writes the three figures."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fluxfire"
    from matplotlib import pyplot

    pipe = fluxfire.apply_cache(demo.load_pipeline())
    pipe.set_progress_bar_config(disable=True)
    jobs = compare.example_jobs(2)
    text, edit = (next(job for job in jobs if (job.reference is None) == (kind == "text")) for kind in ("text", "edit"))

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 5), sharex=True)
    distances(top, pipe, text, 0.12)
    distances(bottom, pipe, edit, 0.12)
    bottom.set_xlabel("denoising step (dark: computed; green: cached; pale: nothing to compare with yet)")
    figure.tight_layout()
    figure.savefig(folder / "cache-distance.svg", metadata={"Date": None})

    figure, axes = pyplot.subplots(figsize=(9, 3))
    which_ran(axes, pipe, text, 0.12)
    figure.tight_layout()
    figure.savefig(folder / "cache-blocks.svg", metadata={"Date": None})

    strip(pipe, [text, edit], folder / "cache-thresholds.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
