"""FLUX.1-Kontext on this machine, without and with fluxfire: seconds, memory, energy, and what each step brings.

    python examples/flux_kontext_benchmark.py           # 512x512, 20 steps, seed 42, 3 runs each
    python examples/flux_kontext_benchmark.py --tiny    # tries the script out: embedded model, 4 steps, 1 run

Needs `pip install 'fluxfire[bench,demo]'`. Real weights are used where there is a CUDA GPU and a Hugging Face token, in
HF_TOKEN or in a file `.env` here (`HF_TOKEN=...`; accept the licence on the model's page first), or where `--model` is
a folder. Otherwise the embedded model is, at the 128x128 it was trained for unless a size is asked for.

First diffusers as it is, then `optimize_pipeline`, then, from the start again, one step more in each row. Every row is
the same picture from the same seed. The size asked for is the size made: by itself diffusers' Kontext pipeline turns
512x512 into 1024x1024.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from dotenv import dotenv_values
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fluxfire
from fluxfire import demo
from fluxfire.bench import timing
from fluxfire.bench.energy import Meter, open_nvml
from fluxfire.bench.quality import psnr
from fluxfire.demo.compare import environment

PROMPT = "A majestic mountain landscape at sunset with vibrant colors"
EMBEDDED_PROMPT = "mountain, noto style"  # it draws emoji
FROM_THE_START = "channels_last"
WARM_UP_STEPS = 3  # the first always computes; with the cache, the next may hit


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-Kontext-dev", help="of the Hub, or a folder")
    parser.add_argument("--prompt", help=f"default: {PROMPT!r}")
    parser.add_argument("--image", type=Path, help="a picture to edit; without one, text to image")
    parser.add_argument("--width", type=int, help="a multiple of 16; default 512")
    parser.add_argument("--height", type=int, help="a multiple of 16; default 512")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs", type=int, default=3, help="of each configuration, after one to warm up")
    parser.add_argument("--threshold", type=float, default=0.12, help="of the cache; higher is faster and less exact")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the embedded model, 4 steps, 1 run")
    parser.add_argument("--out", type=Path, default=Path("kontext-benchmark"), help="folder for pictures and figures")
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.runs = 4, 1
    for name in ("width", "height"):
        if (side := getattr(options, name)) is not None and (side < 16 or side % 16):
            parser.error(f"--{name}: found {side}, needed a multiple of 16")
    return options


def load(options: argparse.Namespace, device: str) -> tuple[Any, str]:
    """The pipeline, and in words which it is and why."""
    from diffusers import FluxKontextPipeline

    token = os.environ.get("HF_TOKEN") or dotenv_values(".env").get("HF_TOKEN")
    lacking = "no CUDA GPU" if device == "cpu" else "no HF_TOKEN" if not token else ""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if options.tiny:
        lacking = "--tiny"
    elif Path(options.model).is_dir():
        lacking, token = "", None
    if lacking:
        return demo.load_pipeline(dtype).to(device), f"the embedded model ({lacking})"
    pipe: Any = FluxKontextPipeline.from_pretrained(options.model, dtype=dtype, token=token)
    return pipe.to(device), options.model


def configurations(options: argparse.Namespace) -> list[tuple[str, Callable[[Any], Any]]]:
    """Names and what makes each of the one before: diffusers, all at once, back again, and step by step."""
    cache: Callable[[Any], Any] = lambda pipe: fluxfire.apply_cache(pipe, options.threshold)  # noqa: E731

    def all_at_once(pipe: Any) -> None:
        fluxfire.optimize_pipeline(pipe, cache_threshold=options.threshold, compile=not options.no_compile)

    def from_the_start(pipe: Any) -> None:
        fluxfire.apply_memory_format(fluxfire.restore_pipeline(pipe))

    chain: list[tuple[str, Callable[[Any], Any]]] = [
        ("diffusers", lambda pipe: pipe),
        ("optimize_pipeline", all_at_once),
        (FROM_THE_START, from_the_start),
        ("+ fused QKV", fluxfire.apply_fused_qkv),
    ]
    if not options.no_compile:
        chain.append(("+ compile", fluxfire.apply_compile))
    return [*chain, (f"+ cache {options.threshold:g}", cache)]


def measure(
    pipe: Any, options: argparse.Namespace, call: dict[str, Any], after_step: Callable[[], None]
) -> tuple[dict[str, Any], Image.Image]:
    """One configuration: a warm-up run, in which it compiles, then the runs that count; a row, and the picture."""
    device = pipe.device
    nvml, _ = open_nvml(device)

    def make(steps: int) -> Any:
        def on_step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            after_step()
            return values

        generator = torch.Generator("cpu").manual_seed(options.seed)
        picture = pipe(**call, num_inference_steps=steps, generator=generator, callback_on_step_end=on_step_end).images[
            0
        ]
        if picture.size != (call["width"], call["height"]):
            sys.exit(f"asked for {call['width']}x{call['height']}, and the pipeline made {picture.size}")
        return picture

    first_s, _ = timing.seconds(device, lambda: make(WARM_UP_STEPS))
    held = timing.memory(device)
    timing.reset_peak(device)
    seconds = []
    meter = Meter(nvml) if nvml else None
    with meter or nullcontext():
        for _ in range(options.runs):
            once, picture = timing.seconds(device, lambda: make(options.steps))
            seconds.append(round(once, 4))
    row: dict[str, Any] = {"seconds": seconds, "median_s": round(statistics.median(seconds), 4)}
    row |= {"warm_up_s": round(first_s, 2), "resident_gib": held and timing.gib(held[0])}
    peak = timing.memory(device)
    row["peak_gib"] = peak and timing.gib(peak[1])
    energy = meter.result if meter else None
    row["joules"] = round(energy.joules / options.runs, 1) if energy and energy.joules else None
    row["gpu_percent"] = energy and energy.gpu_percent
    return row, picture


def run_all(
    console: Console, pipe: Any, options: argparse.Namespace, call: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Image.Image]]:
    """All configurations in turn, with a bar for each; their rows, and the pictures of the first two."""
    import numpy as np

    rows: list[dict[str, Any]] = []
    pictures: dict[str, Image.Image] = {}
    total = WARM_UP_STEPS + options.runs * options.steps
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=2) as progress:
        for name, apply in configurations(options):
            bar = progress.add_task(name, total=total)
            apply(pipe)
            row, picture = measure(pipe, options, call, lambda bar=bar: progress.advance(bar))  # type: ignore[misc]
            pictures[name] = picture
            steps = {step.name for step in fluxfire.report(pipe).steps} if rows else set()
            row["pattern"] = fluxfire.cache_stats(pipe).marks() if "cache" in steps else ""
            before = rows[-1]["median_s"] if rows and name != FROM_THE_START else None
            first = rows[0]["median_s"] if rows else row["median_s"]
            row |= {"x_diffusers": round(first / row["median_s"], 3)}
            row |= {"x_before": round((before or first) / row["median_s"], 3)}
            distance = psnr(np.asarray(picture), np.asarray(pictures["diffusers"]))
            row["psnr_db"] = None if distance == float("inf") else round(distance, 1)
            rows.append({"configuration": name, **row})
    return rows, {name: pictures[name] for name in ("diffusers", "optimize_pipeline")}


def show(console: Console, rows: list[dict[str, Any]], title: str) -> None:
    """The table, without what this machine cannot tell."""
    heads = {
        **{
            "median_s": "s a picture",
            "x_diffusers": "x diffusers",
            "x_before": "x row before",
            "warm_up_s": "warm-up s",
        },
        **{"resident_gib": "resident GiB", "peak_gib": "peak GiB", "joules": "J a picture", "gpu_percent": "GPU %"},
    }
    known = {name: head for name, head in heads.items() if any(row[name] is not None for row in rows)}
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("configuration", no_wrap=True)
    for head in (*known.values(), "min-max", "PSNR dB", "steps (. cached)"):
        table.add_column(head, justify="right")
    for row in rows:
        cells = ["" if row[name] is None else f"{row[name]:.2f}" for name in known]
        spread = f"{min(row['seconds']):.2f}-{max(row['seconds']):.2f}"
        same = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        table.add_row(row["configuration"], *cells, spread, same, row["pattern"])
    console.print(table)


def main() -> None:
    """Runs the benchmark; a table on stderr, one line of JSON on stdout, pictures in the folder."""
    options = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 160)
    pipe, what = load(options, device)
    pipe.set_progress_bar_config(disable=True)
    embedded = what.startswith("the embedded")
    side = demo.SIZE if embedded else 512
    width, height = options.width or side, options.height or side
    prompt = options.prompt or (EMBEDDED_PROMPT if embedded else PROMPT)
    call = {"prompt": prompt, "width": width, "height": height, "guidance_scale": 2.5}
    call |= {"max_area": width * height, "_auto_resize": False}  # else Kontext makes it 1024x1024
    call["max_sequence_length"] = min(512, pipe.tokenizer_2.model_max_length)
    if options.image:
        call["image"] = Image.open(options.image).convert("RGB").resize((width, height))
    console.print(f"{what}, {width}x{height}, {options.steps} steps, {prompt!r}, seed {options.seed}", markup=False)
    rows, pictures = run_all(console, pipe, options, call)
    title = f"{width}x{height}, {options.steps} steps, {options.runs} runs each, {environment(pipe)['device']}"
    show(console, rows, title)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(options.out / f"{name}.png")
    about = environment(pipe) | {"model": what, "width": width, "height": height, "steps": options.steps}
    result = {"run": about | {"prompt": prompt, "seed": options.seed, "runs": options.runs}, "rows": rows}
    (options.out / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    console.print(f"pictures and figures: {options.out}")
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main()
