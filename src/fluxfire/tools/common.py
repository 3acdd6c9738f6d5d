"""What the commands around the mega-cache have in common: options, errors as one line, tables."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, ParamSpec

import typer

from fluxfire.megacache import megacache_at
from fluxfire.store import Store, StoreError

Where = Annotated[str, typer.Option("--store", help='The store: "auto" or the path of its folder.')]
As = Annotated[Literal["text", "json"], typer.Option("--format", help="A table, or one line of JSON.")]
P = ParamSpec("P")


def command(group: typer.Typer, name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Adds a command whose `StoreError`s are one line on stderr."""

    def add(function: Callable[P, None]) -> Callable[P, None]:
        @group.command(name)
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except (StoreError, OSError) as error:
                sys.exit(f"fluxfire: {error}")

        return run

    return add


@contextlib.contextmanager
def opened_store(where: str) -> Iterator[Store]:
    """The store, for a while."""
    store = Store(megacache_at(where).path)
    try:
        yield store
    finally:
        store.close()


def print_rows(rows: list[dict[str, Any]], format: str, columns: tuple[str, ...]) -> None:
    """Rows as one line of JSON, or some of their columns as a table."""
    if format == "json":
        print(json.dumps(rows))
        return
    table = [[_text(name, row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *table, strict=True)]
    for line in (list(columns), *table):
        print("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())


def _text(name: str, value: Any) -> str:
    if name == "key":
        return str(value)[:12]
    if name == "bytes":
        return f"{value / 2**20:.2f} MiB"
    if name in ("made", "used"):
        return str(value)[:16].replace("T", " ")
    return str(value)


def gone(keys: list[str], format: str) -> None:
    """Tells what was removed."""
    print(json.dumps({"removed": keys}) if format == "json" else f"{len(keys)} entries removed")
