"""The command line: `fluxfire demo`.

What a person reads goes to stderr, one line of JSON at the end to stdout, so that `fluxfire demo | jq .text` works.
Each command is a function here with its options; its work stands elsewhere and is imported when the command runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from fluxfire import FluxfireError, optimize_pipeline

try:
    import typer
except ModuleNotFoundError as error:  # the console script exists without the extra too: one line, not a traceback
    raise SystemExit(f"fluxfire: the command line needs {error.name}: pip install 'fluxfire[cli]'") from None

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


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
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)
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
