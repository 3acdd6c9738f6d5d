"""How the bench is shown: a bar while it runs, a table of all rows at the end, compilers' output in a log."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fluxfire.bench import results, runner
from fluxfire.bench.measure import Settings
from fluxfire.bench.variants import GROUPS, VARIANTS
from fluxfire.bench.workloads import WORKLOADS

_SHOWN = (
    *("ms_computed", "ms_cached", "s_picture", "decode_s", "first_call_s", "peak_gib", "rel_error", "psnr_db"),
    *("ratio_to_eager", "ratio_to_limit", "joules_picture"),
)


def print_names() -> None:
    """Workloads, variants and groups, one a line."""
    for workload in WORKLOADS.values():
        print(f"{workload.name:<28} {workload.what}")
    print()
    for variant in VARIANTS.values():
        print(f"{variant.name:<28} {variant.what}{' (in a process of its own)' * variant.isolated}")
    print()
    for name, members in GROUPS.items():
        print(f"{name:<28} {', '.join(members)}")


def bench_with_bars(
    all_settings: Sequence[Settings], out: Path, *, child_limit_s: float, time_limit_s: float | None, quiet: bool
) -> list[Path]:
    """Runs everything, unless quiet with a bar on stderr and the table after it; returns the files, .json and .md."""
    log = out / "bench.log"
    command = typed(sys.argv[1:])
    with runner.output_to(log) as stderr, os.fdopen(os.dup(stderr), "w") as terminal:
        console = Console(file=terminal, highlight=False, width=None if os.isatty(stderr) else 200, quiet=quiet)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, refresh_per_second=2) as progress:
            bar = progress.add_task("", total=sum(len(settings.variants) for settings in all_settings))

            def advance(row: results.Row) -> None:
                progress.advance(bar)
                if not os.isatty(stderr):
                    console.print(_line(row), markup=False, soft_wrap=True)

            files = runner.bench(
                all_settings,
                out,
                command,
                say=lambda text: progress.update(bar, description=text),
                advance=advance,
                child_limit_s=child_limit_s,
                time_limit_s=time_limit_s,
            )
        for file in files:
            _print_tables(console, file)
    written = []
    for file in files:
        text = file.path.with_suffix(".md")
        text.write_text(results.markdown({"run": file.run, "rows": file.rows}))
        written += [file.path, text]
    return [*written, log]


def typed(arguments: Sequence[str]) -> str:
    """The command as it goes into results: without `--out`, which is a path of this machine."""
    shown = list(arguments)
    if "--out" in shown:
        del shown[shown.index("--out") : shown.index("--out") + 2]
    return "fluxfire " + shlex.join(shown)


def _line(row: results.Row) -> str:
    values = [f"{name} {row[name]}" for name in _SHOWN if row.get(name) is not None]
    return f"{row['workload']} b{row['batch']} {row['variant']}: {row['error'] or ', '.join(values)}"


def _print_tables(console: Console, file: results.File) -> None:
    for workload, batch in dict.fromkeys((row["workload"], row["batch"]) for row in file.rows):
        rows = [row for row in file.rows if (row["workload"], row["batch"]) == (workload, batch)]
        columns = [column for column in results.used(rows) if column[1] in _SHOWN]
        title = f"{workload}, batch {batch}, {rows[0]['steps']} steps, {file.run['gpu']}, torch {file.run['torch']}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("variant")
        for head, _, _ in columns:
            table.add_column(head, justify="right")
        errors = []
        for row in rows:
            name = row["variant"] + (f" (beside {row['beside']})" if row["beside"] else "")
            values: list[Any] = results.cells(row, columns)
            if row["error"]:
                errors.append(f"{name}: {row['error']}")
            table.add_row(name, *values)
        console.print(table)
        for line in errors:
            console.print(line, markup=False, soft_wrap=True)
        if note := file.run["note"]:
            console.print(note, markup=False, soft_wrap=True)
