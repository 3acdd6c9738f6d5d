"""`fluxfire warm`: compile for the sizes and batches that will be asked for, and keep it, before a server starts."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import typer


def warm(
    model: Annotated[
        str, typer.Argument(help="embedded; a folder or Hub repository; or module:function.")
    ] = "embedded",
    sizes: Annotated[str, typer.Option(help="Width x height, with commas between: 1024x1024,832x1216.")] = "",
    batch: Annotated[str, typer.Option(help="Pictures at once, with commas between: 1,4.")] = "1",
    device: Annotated[str | None, typer.Option(help="As torch names it; a GPU if there is one.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="float32 on a CPU, else bfloat16.")
    ] = None,
    mode: Annotated[str, typer.Option(help="torch's mode of compilation.")] = "default",
    megacache: Annotated[str, typer.Option(help="auto, the path of a folder, or a URL.")] = "auto",
    share: Annotated[bool, typer.Option("--share", help="Put what is compiled at the URL too, signed.")] = False,
    format: Annotated[
        Literal["text", "json"], typer.Option("--format", help="The report, or one line of JSON.")
    ] = "text",
) -> None:
    """Make a small picture of each size and batch, so that what it compiles is kept for later processes."""
    import torch
    from rich.console import Console
    from rich.progress import track

    import fluxfire
    from fluxfire.serve.model import load
    from fluxfire.warm import size_of

    if not re.fullmatch(r"\d+(,\d+)*", batch):
        raise typer.BadParameter(f"found {batch!r}, needed numbers such as 1,4", param_hint="--batch")
    try:
        wanted = [size_of(size) for size in sizes.split(",")] if sizes else []
    except fluxfire.ArgumentError as error:
        raise typer.BadParameter(str(error), param_hint="--sizes") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(stderr=True)
    with console.status("Loading"):
        fluxfire.prefetch(megacache)
        served = load(model, device, dtype or ("float32" if device.startswith("cpu") else "bfloat16"))
        fluxfire.optimize_pipeline(served.pipe, compile=mode, megacache=megacache, share=share, strict=True)
    jobs = [(size, int(count)) for size in wanted or [(served.side, served.side)] for count in batch.split(",")]
    call = {"max_sequence_length": served.text_tokens} | served.call
    rows: list[dict[str, Any]] = []
    for size, count in track(jobs, "Compiling", console=console, transient=True, disable=not console.is_terminal):
        for (width, height, _), seconds in fluxfire.warm(served.pipe, [size], batch=[count], call=call).items():
            rows.append({"width": width, "height": height, "batch": count, "seconds": round(seconds, 2)})
    report = fluxfire.report(served.pipe)
    if format == "json":
        print(json.dumps({"warmed": rows, "report": report.as_dict()}))
        return
    for row in rows:
        print(f"{row['width']}x{row['height']}, batch {row['batch']}: {row['seconds']:.1f} s")
    print(report)
