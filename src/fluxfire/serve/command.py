"""`fluxfire serve`: the options that one changes by hand; all others are set by environment or `.env` (settings.py)."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer


def serve(
    model: Annotated[str | None, typer.Option(help="embedded; a folder or Hub repository; or module:function.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on; 127.0.0.1 unless told.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 unless told; 0 for a free one.")] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it; a GPU if there is one.")] = None,
    threshold: Annotated[float | None, typer.Option(help="The cache's, for requests that do not say one.")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the blocks; on a GPU unless told.")
    ] = None,
    warm: Annotated[
        list[str] | None, typer.Option(help="A size to warm up, such as 1024x768; may be repeated.")
    ] = None,
) -> None:
    """Serve a FLUX pipeline over HTTP: /inference, and OpenAI's images API."""
    try:
        from fluxfire.serve.server import serve as run
        from fluxfire.serve.settings import read_settings
    except ModuleNotFoundError as error:
        sys.exit(f"fluxfire: this command needs {error.name}: pip install 'fluxfire[serve]'")

    given: dict[str, Any] = {
        "model": model,
        "name": name,
        "host": host,
        "port": port,
        "device": device,
        "cache_threshold": threshold,
        "compile": compile,
        "warm_sizes": [_size(size) for size in warm] if warm else None,
    }
    settings = read_settings({name: value for name, value in given.items() if value is not None})
    if reason := run(settings):
        sys.exit(f"fluxfire: the model could not be loaded: {reason}")


def _size(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise typer.BadParameter(f"found {text!r}, needed a size such as 1024x768", param_hint="--warm")
    return int(found[1]), int(found[2])
