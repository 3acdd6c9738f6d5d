"""The command line: `fluxfire demo`, `bench`, `tune`, `serve`, `doctor`, `warm`, `megacache`.

What a person reads goes to stderr, one line of JSON at the end to stdout, so that `fluxfire demo | jq .text` works.
`--format json` means the same for every command: that line, and nothing for people.
Each command is a function here with its options; its work stands elsewhere and is imported when the command runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from fluxfire import FluxfireError, optimize_pipeline

try:
    import typer
except ModuleNotFoundError as error:  # the console script exists without the extra too: one line, not a traceback
    raise SystemExit(f"fluxfire: the command line needs {error.name}: pip install 'fluxfire[cli]'") from None

from fluxfire.serve.command import serve
from fluxfire.tools import megacache
from fluxfire.tools.warm import warm

Format = Annotated[Literal["text", "json"], typer.Option("--format", help="json: the line of JSON alone.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(serve)
app.command()(warm)
app.add_typer(megacache.app, name="megacache")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: runs one command and exits. What fluxfire itself refuses is one line on stderr."""
    try:
        app(args=arguments, prog_name="fluxfire")
    except FluxfireError as error:
        sys.exit(f"fluxfire: {error}")
    raise AssertionError("typer exits")


@app.callback()
def root() -> None:
    """Make any diffusers FLUX pipeline fast."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("fluxfire-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")] = 28,
    threshold: Annotated[
        float, typer.Option(help="The cache's: 0 never hits, higher is faster and less exact.")
    ] = 0.12,
    device: Annotated[str | None, typer.Option(help="As torch names it; a GPU if there is one.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="float32 on a CPU, else bfloat16.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer blocks.")] = True,
    prompts: Annotated[int, typer.Option(min=1, help="Pictures from text, and as many edits.")] = 6,
    format: Format = "text",
) -> None:
    """Make the same pictures without and with fluxfire, and show what that gains and costs."""
    _need("demo", "rich", "skimage")
    import torch
    from rich.console import Console

    from fluxfire import demo as embedded
    from fluxfire.demo import compare, show

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check(out, device)
    number_type = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    width, quiet = None if sys.stderr.isatty() else 120, format == "json"
    console = Console(stderr=True, highlight=False, width=width, quiet=quiet)
    _quieten_loading()
    with console.status("Loading the embedded model twice"):
        jobs = compare.example_jobs(prompts)
        pipes: list[Any] = [embedded.load_pipeline(dtype=number_type) for _ in range(2)]
        baseline, optimized = (pipe.to(device) for pipe in pipes)
    optimize_pipeline(optimized, cache_threshold=threshold, compile=compile)
    comparison = show.compare_with_bars(console, jobs, baseline, optimized, steps)
    about = compare.environment(optimized) | {"steps": steps, "threshold": threshold}
    files = show.save_sheets(comparison, out)
    show.print_all(console, comparison, about, files)
    print(json.dumps(about | comparison.to_json() | {"files": files}, allow_nan=False))


@app.command()
def bench(
    workload: Annotated[str, typer.Option(help="Of --list, comma-separated.")] = "",
    variants: Annotated[str, typer.Option(help="Of --list, comma-separated; eager is always there.")] = "default",
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Each step and compiler flag alone and left out too.")
    ] = False,
    batch: Annotated[str, typer.Option(help="Pictures at once, comma-separated.")] = "1",
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps of a picture.")] = 28,
    repeats: Annotated[int, typer.Option(min=1, help="Pictures to take medians of.")] = 3,
    device: Annotated[str | None, typer.Option(help="As torch names it; a GPU if there is one.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="float32 on a CPU, else bfloat16.")
    ] = None,
    errors: Annotated[bool, typer.Option("--errors/--no-errors", help="Measure errors to float32.")] = True,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of the machine, for the cost a picture.")] = None,
    child_limit: Annotated[float, typer.Option(min=1, help="Seconds for a variant in its own process.")] = 480,
    time_limit: Annotated[float | None, typer.Option(min=1, help="No variant begins after so many seconds.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results and the log.")] = Path("benchmarks/results"),
    list_names: Annotated[bool, typer.Option("--list", help="Print workloads and variants, and stop.")] = False,
    format: Format = "text",
) -> None:
    """Measure speed, memory, energy and error beside the peers, at full size with random weights or embedded."""
    _need("bench", "rich", "skimage")
    import torch

    from fluxfire.bench import show, workloads
    from fluxfire.bench import variants as known
    from fluxfire.bench.measure import Settings

    if list_names:
        return show.print_names()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check(out, device)
    names = tuple(variant.name for variant in known.named(variants + ",ablation,ablation-stack" * ablate))
    all_settings = [
        Settings(
            workload=name,
            batch=count,
            variants=names,
            device=device,
            dtype=dtype or ("float32" if device == "cpu" else "bfloat16"),
            steps=steps,
            repeats=repeats,
            errors=errors,
            price_per_hour=price_per_hour,
        )
        for name in workloads.named(workload or ("t2i-1024" if device != "cpu" else "embedded-t2i"))
        for count in workloads.batches(batch)
    ]
    _quieten_loading()
    quiet = format == "json"
    files = show.bench_with_bars(all_settings, out, child_limit_s=child_limit, time_limit_s=time_limit, quiet=quiet)
    print(json.dumps({"files": [str(file) for file in files]}))


@app.command()
def doctor(format: Format = "text") -> None:
    """Tell what this machine has of what fluxfire needs, what is missing, and what to type for it."""
    from fluxfire.doctor import as_text, examine

    findings = examine()
    missing = [finding.what for finding in findings if finding.state == "missing"]
    if format == "text":
        print(as_text(findings), file=sys.stderr)
    print(json.dumps({"ok": not missing, "missing": missing, "findings": [asdict(finding) for finding in findings]}))
    raise typer.Exit(bool(missing))


@app.command()
def tune(
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt a line, or a .json: a list of texts and of calls.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Most difference of a picture, root mean square, 1 from black to white: 0.02.")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Denoiser calls by computed ones: 1.5.")] = None,
    quantile: Annotated[float, typer.Option(help="Share of the prompts that keep to --max-error.")] = 0.9,
    model: Annotated[str, typer.Option(help="embedded, or a folder or repository for from_pretrained.")] = "embedded",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")] = 28,
    size: Annotated[str, typer.Option(help="Width x height; the model's own if left out.")] = "",
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next one has the next.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Examples, where there is no --prompts.")] = 8,
    device: Annotated[str | None, typer.Option(help="As torch names it; a GPU if there is one.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="float32 on a CPU, else bfloat16.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer blocks.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the setting and the sheet.")] = Path("fluxfire-tune"),
    format: Format = "text",
) -> None:
    """Find the cache's threshold on your prompts, from an error or a speed, and show the pictures."""
    _need("demo", "rich", "PIL")
    import torch

    from fluxfire import demo as embedded
    from fluxfire import tune as find
    from fluxfire.bench import prompts as listed
    from fluxfire.bench.sheet import ContactSheet
    from fluxfire.serve.model import pretrained

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check(out, device)
    call: dict[str, Any] = {"num_inference_steps": steps}
    if size:
        width, by, height = size.partition("x")
        if not (by and width.isdecimal() and height.isdecimal()):
            raise typer.BadParameter(f"found {size!r}, needed such as 1024x1024", param_hint="--size")
        call |= {"width": int(width), "height": int(height)}
    if prompts is None and model != "embedded":
        raise typer.BadParameter("needed a file: the examples are the embedded model's", param_hint="--prompts")
    jobs = listed.read(prompts) if prompts else listed.examples(count)
    number_type = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    _quieten_loading()
    pipe: Any
    if model == "embedded":
        pipe, call = embedded.load_pipeline(dtype=number_type), embedded.call_kwargs() | call
    else:
        pipe = pretrained(model, number_type)
    optimize_pipeline(pipe.to(device), cache_threshold=0, compile=compile)
    sheet = ContactSheet(out, [str(job.get("prompt", "")) for job in jobs])
    quiet = False if format == "json" else None
    setting = find(
        pipe,
        jobs,
        max_error=max_error,
        speedup=speedup,
        quantile=quantile,
        call=call,
        seed=seed,
        on_trial=sheet,
        progress=quiet,
    )
    setting.save(out / "setting.json")
    files = [str(out / "setting.json"), *map(str, sheet.save(setting))]
    if format == "text":
        print(f"{setting}\n{setting.pictures} pictures were made; {', '.join(files)}", file=sys.stderr)
    print(json.dumps(setting.as_dict() | {"files": files}, allow_nan=False))


def _need(extra: str, *modules: str) -> None:
    """Exits with what to type if one of an extra's modules is not installed; before a command starts its work."""
    if missing := [module for module in modules if find_spec(module) is None]:
        sys.exit(f"fluxfire: this command needs {', '.join(missing)}: pip install 'fluxfire[{extra}]'")


def _check(out: Path, device: str) -> None:
    """Refuses a folder or a device that would fail only after the pictures are made."""
    import torch

    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"{device!r} cannot be used here: {reason}", param_hint="--device") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{out} cannot be a folder: {error.strerror}", param_hint="--out") from None


def _quieten_loading() -> None:
    """Loading's own progress bars and hints (torchvision is not installed) would stand between ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
