"""`fluxfire megacache`: look at the store of compiled code, keep it small, carry and sign it; and keys.

What is asked for goes to stdout, as a table or with `--format json` as one line of JSON; progress and errors go to
stderr. The exit code is 1 where an entry was refused or is damaged.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from fluxfire.store import Manifest, Store, StoreError
from fluxfire.store.remote import Moved, give, keys_on, sign, take
from fluxfire.store.shelves import Pack, is_url, packing, shelf_at
from fluxfire.store.store import MAX_BYTES
from fluxfire.store.trust import Keys
from fluxfire.tools import keys
from fluxfire.tools.common import As, Where, command, gone, opened_store, print_rows

app = typer.Typer(no_args_is_help=True, help="Look at compiled code that is kept, carry it, sign it.")
app.add_typer(keys.app, name="key")

Elsewhere = Annotated[
    str, typer.Argument(help="A file, or a URL: s3://bucket/prefix, hf://owner/name, file:///folder.")
]


def _row(store: Store, manifest: Manifest) -> dict[str, Any]:
    fields, facts, here = manifest.fields, manifest.facts, manifest.fields.get("environment", {})
    if "block" in fields:
        sizes = [found[2] for found in fields["inputs"] if isinstance(found, list) and len(found) == 3]
        many = any(size[0] > 1 for size in sizes if len(size) > 2)
        what = f"{fields['block']['class']['name'].rsplit('.', 1)[-1]}, batch {'2 or more' if many else 1}"
    else:
        traced = fields.get("torch", {})
        what = f"{traced.get('class', 'graphs')}, traced by {traced.get('scope', '')}"
    return {
        "key": manifest.key,
        "what": what,
        "on": here.get("gpu") or here.get("cpu", ""),
        "torch": here.get("torch", ""),
        "bytes": manifest.payload_bytes,
        "made": _time(facts.get("made_at_s")),
        "used": _time(store.last_used(manifest.key)),
        "from": facts.get("from", "here"),
        "signed_by": facts.get("signed_by", ""),
    }


def _time(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _key(store: Store, start: str) -> str:
    found = list(filter(lambda key: key.startswith(start), store.keys()))
    if len(found) != 1:
        raise StoreError(f"found {len(found)} entries that begin with {start!r}, needed one: fluxfire megacache ls")
    return found[0]


@command(app, "ls")
def ls(store: Where = "auto", format: As = "text") -> None:
    """List what is kept, the last used first."""
    with opened_store(store) as opened:
        rows = [_row(opened, manifest) for manifest in opened.manifests()]
        print_rows(rows, format, ("key", "what", "on", "torch", "bytes", "used", "from"))
        if format == "text":
            print(f"{len(rows)} entries, {opened.size() / 2**20:.1f} MiB in {opened.path}")


@command(app, "info")
def info(
    key: Annotated[str, typer.Argument(help="The beginning of its key.")], store: Where = "auto", format: As = "text"
) -> None:
    """Show one entry: what it is for, and all that must be equal for it to be used."""
    with opened_store(store) as opened:
        manifest = opened.manifest(_key(opened, key))
        assert manifest
        row = _row(opened, manifest)
        if format == "json":
            print(json.dumps(row | {"fields": manifest.fields, "facts": manifest.facts}))
            return
        told = row | manifest.fields.get("environment", {}) | {"dynamic": manifest.fields.get("dynamic")}
        for name, value in (
            told | {f"option {name}": v for name, v in manifest.fields.get("options", {}).items()}
        ).items():
            print(f"{name:<16}  {value}")


@command(app, "verify")
def verify(store: Where = "auto", format: As = "text") -> None:
    """Check every byte of every entry. Exit code 1 if one is damaged; damaged ones are never used."""
    with opened_store(store) as opened:
        wrong, count = opened.verify(), len(opened.keys())
        rows = [{"key": key, "wrong": reason} for key, reason in wrong.items()]
        if format == "json" or rows:
            print_rows(rows, format, ("key", "wrong"))
        if format == "text":
            print(f"{count - len(rows)} of {count} entries are sound")
    raise typer.Exit(int(bool(rows)))


@command(app, "prune")
def prune(
    to: Annotated[str, typer.Option("--to", help="What may stay: 500M, 1G.")] = f"{MAX_BYTES // 2**30}G",
    store: Where = "auto",
    format: As = "text",
) -> None:
    """Remove the least recently used entries until the rest is small enough."""
    if not (found := re.fullmatch(r"(\d+)([KMGT]?)", to)):
        raise typer.BadParameter(f"found {to!r}, needed a size such as 500M", param_hint="--to")
    with opened_store(store) as opened:
        gone(opened.prune(int(found[1]) * 2 ** (10 * " KMGT".index(found[2] or " "))), format)


@command(app, "clear")
def clear(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False, store: Where = "auto", format: As = "text"
) -> None:
    """Remove everything that is kept."""
    with opened_store(store) as opened:
        found = opened.keys()
        if not yes:
            typer.confirm(f"Remove {len(found)} entries of {opened.path}?", abort=True, err=True)
        opened.remove(*found)
        gone(found, format)


@command(app, "pack")
def pack(
    file: Annotated[str, typer.Argument(help="The file to write.")], store: Where = "auto", format: As = "text"
) -> None:
    """Write everything into one file, signed with your key."""
    with opened_store(store) as opened, packing(file) as shelf:
        moved = _follow(give(shelf, opened, Keys()), len(opened.keys()))
        _refuse_half(moved)
    _tell(moved, format)


@command(app, "push")
def push(place: Elsewhere, store: Where = "auto", format: As = "text") -> None:
    """Put everything at a URL, signed with your key."""
    if not is_url(place):
        raise typer.BadParameter(f"found {place!r}, needed a URL; fluxfire megacache pack writes files")
    with opened_store(store) as opened:
        _tell(_follow(give(shelf_at(place), opened, Keys()), len(opened.keys())), format)


@command(app, "pull")
def pull(place: Elsewhere, store: Where = "auto", format: As = "text") -> None:
    """Take what a trusted key has signed from a file or a URL. Loading it means running its maker's code."""
    shelf = shelf_at(place)
    with opened_store(store) as opened:
        _tell(_follow(take(shelf, opened, Keys()), len(keys_on(shelf))), format)


@command(app, "sign")
def sign_there(place: Elsewhere, format: As = "text") -> None:
    """Sign everything in a file or at a URL with your key, whoever signed it before: you vouch for it."""
    shelf, own = shelf_at(place), Keys()
    count = len(keys_on(shelf))
    if isinstance(shelf, Pack):
        with packing(place) as to:
            moved = _follow(sign(shelf, to, own), count)
            _refuse_half(moved)
    else:
        moved = _follow(sign(shelf, shelf, own), count)
    _tell(moved, format)


def _follow(moving: Iterator[Moved], count: int) -> list[Moved]:
    """Goes through, under a bar where somebody looks."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return list(track(moving, "Entries", count, console=console, transient=True, disable=not console.is_terminal))


def _refuse_half(moved: list[Moved]) -> None:
    """No file with a part of it."""
    if reasons := [entry.reason for entry in moved if entry.what == "refused"]:
        raise StoreError(reasons[0])


def _tell(moved: list[Moved], format: str) -> None:
    refused = [{"key": entry.key, "reason": entry.reason} for entry in moved if entry.what == "refused"]
    counts = {what: sum(entry.what == what for entry in moved) for what in ("done", "there", "refused")}
    if format == "json":
        print(json.dumps({"entries": [_plain(entry) for entry in moved], **counts}))
    else:
        for row in refused:
            print(f"refused: {row['reason']}", file=sys.stderr)
        print(f"{counts['done']} entries done, {counts['there']} were there already, {counts['refused']} refused")
    raise typer.Exit(int(bool(refused)))


def _plain(entry: Moved) -> dict[str, str]:
    """One entry for JSON."""
    return {"key": entry.key, "what": entry.what, "reason": entry.reason}
