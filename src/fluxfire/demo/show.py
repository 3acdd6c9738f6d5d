"""How a comparison is shown: progress bars while it runs, a table in the terminal, one PNG for each kind of picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from PIL import Image, ImageChops, ImageDraw, ImageFont

from fluxfire.demo.compare import KINDS, Comparison, Job, Pair, compare, denoising_steps, medians

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DIFFERENCE: Final = 4  # times the difference is brightened, for the eye

_CELL_PX, _GAP_PX, _CAPTION_PX, _HEADER_PX = 256, 12, 52, 40
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """The absolute difference, `DIFFERENCE` times as bright: black where the two are equal."""
    return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).point(lambda value: min(255, value * DIFFERENCE))


def contact_sheet(pairs: tuple[Pair, ...]) -> Image.Image:
    """A row for each pair: (reference,) baseline, optimized, difference; the prompt and the numbers above it."""
    columns = ["baseline", "fluxfire", f"difference, {DIFFERENCE} times as bright"]
    if any(pair.job.reference for pair in pairs):
        columns.insert(0, "reference")
    row_px = _CAPTION_PX + _CELL_PX + _GAP_PX
    sheet = Image.new(
        "RGB", (_GAP_PX + len(columns) * (_CELL_PX + _GAP_PX), _HEADER_PX + len(pairs) * row_px + _GAP_PX), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(17), ImageFont.load_default(14)
    left = [_GAP_PX + index * (_CELL_PX + _GAP_PX) for index in range(len(columns))]
    for x, name in zip(left, columns, strict=True):
        draw.text((x, _GAP_PX), name, _INK, large)
    for row, pair in enumerate(pairs):
        y = _HEADER_PX + row * row_px
        draw.text((_GAP_PX, y + 4), pair.job.prompt, _INK, large)
        draw.text((_GAP_PX, y + 27), _numbers(pair), _FAINT, small)
        pictures = [pair.baseline, pair.optimized, difference(pair.baseline, pair.optimized)]
        if len(columns) == 4:
            pictures.insert(0, pair.job.reference or Image.new("RGB", pair.baseline.size, _PAPER))
        for x, picture in zip(left, pictures, strict=True):
            cell = picture.convert("RGB").resize((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)
            sheet.paste(cell, (x, y + _CAPTION_PX))
    return sheet


def _numbers(pair: Pair) -> str:
    steps = pair.computed_steps + pair.cached_steps
    return (
        f"{pair.baseline_s:.2f} s, with fluxfire {pair.optimized_s:.2f} s; "
        f"{pair.cached_steps} of {steps} steps cached; PSNR {decibels(pair.psnr_db)} dB, SSIM {pair.ssim:.3f}"
    )


def decibels(psnr_db: float) -> str:
    """A PSNR as it is printed and drawn, with a font that has letters; "inf" is that of two equal pictures."""
    return f"{psnr_db:.1f}"


def table(comparison: Comparison, title: str) -> Table:
    """A row for each picture, and for each kind of picture one with the medians."""
    from rich import box
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("picture", max_width=40)
    for name in ("baseline s", "fluxfire s", "speedup", "computed", "cached", "PSNR dB", "SSIM"):
        result.add_column(name, justify="right")
    for kind in KINDS:
        pairs = comparison.of(kind)
        for pair in pairs:
            result.add_row(
                f"{kind}: {pair.job.prompt}",
                f"{pair.baseline_s:.2f}",
                f"{pair.optimized_s:.2f}",
                f"{pair.baseline_s / pair.optimized_s:.2f}",
                str(pair.computed_steps),
                str(pair.cached_steps),
                decibels(pair.psnr_db),
                f"{pair.ssim:.3f}",
            )
        seconds = [f"{value:.2f}" for value in medians(pairs).values()]
        result.add_row(f"{kind}: median", *seconds, style="bold", end_section=True)
    return result


def compare_with_bars(console: Console, jobs: Sequence[Job], baseline: Any, optimized: Any, steps: int) -> Comparison:
    """`compare` on the embedded model, with a bar that counts denoising steps for the warm-up and each pipeline."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fluxfire.demo import call_kwargs

    for pipe in (baseline, optimized):
        pipe.set_progress_bar_config(disable=True)  # one bar a picture: ours count all pictures
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    # Drawing takes time from the model: twice a second is enough.
    with Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=2) as progress:
        bars = {name: progress.add_task(name, total=total) for name, total in denoising_steps(jobs, steps).items()}

        def advance(name: str) -> None:
            progress.advance(bars[name])

        return compare(jobs, baseline, optimized, call_kwargs(), steps=steps, advance=advance)


def save_sheets(comparison: Comparison, folder: Path) -> list[str]:
    """Writes text.png and edit.png; returns their paths."""
    files = []
    for kind in KINDS:
        file = folder / f"{kind}.png"
        contact_sheet(comparison.of(kind)).save(file)
        files.append(str(file))
    return files


def print_all(console: Console, comparison: Comparison, about: dict[str, Any], files: list[str]) -> None:
    """The table, the seconds of compilation, the report of the optimized pipeline, and where the pictures are."""
    machine = f"{about['cpu_cores']} CPU cores" if about["device"] == "cpu" else about["device"]
    versions = f"torch {about['torch']}, diffusers {about['diffusers']}"
    console.print(table(comparison, f"{machine}, {about['dtype']}, {about['steps']} steps, {versions}"))
    if comparison.report.compile:
        console.print(f"Compiled once, before the timed calls: {comparison.compile_s:.1f} s.\n")
    console.print("print(fluxfire.report(pipe))", style="bold")
    console.print(str(comparison.report), markup=False, soft_wrap=True)
    console.print(f"\nPictures: {', '.join(files)}", soft_wrap=True)
