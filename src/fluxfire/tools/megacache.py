"""`fluxfire megacache`: look at the store of compiled code, keep it small, carry and sign it; and keys.

What is asked for goes to stdout, as a table or with `--format json` as one line of JSON; progress and errors go to
stderr. The exit code is 1 where an entry was refused or is damaged.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, ParamSpec

import typer

from fluxfire.megacache import megacache_at
from fluxfire.store import Manifest, Store, StoreError
from fluxfire.store.remote import Moved, Pack, give, is_url, keys_on, packing, shelf_at, sign, take
from fluxfire.store.store import MAX_BYTES
from fluxfire.store.trust import Keys

app = typer.Typer(no_args_is_help=True, help="Look at compiled code that is kept, carry it, sign it.")
key_app = typer.Typer(no_args_is_help=True, help="Whose compiled code may run here; and your own key to sign with.")
app.add_typer(key_app, name="key")

Where = Annotated[str, typer.Option("--store", help='The store: "auto" or the path of its folder.')]
As = Annotated[Literal["text", "json"], typer.Option("--format", help="A table, or one line of JSON.")]
Elsewhere = Annotated[
    str, typer.Argument(help="A file, or a URL: s3://bucket/prefix, hf://owner/name, file:///folder.")
]
P = ParamSpec("P")


def _command(group: typer.Typer, name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Adds a command whose `StoreError`s are one line on stderr."""

    def add(function: Callable[P, None]) -> Callable[P, None]:
        @group.command(name)
        @functools.wraps(function)
        def command(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except (StoreError, OSError) as error:
                sys.exit(f"fluxfire: {error}")

        return command

    return add


@contextlib.contextmanager
def _open(where: str) -> Iterator[Store]:
    store = Store(megacache_at(where).path)
    try:
        yield store
    finally:
        store.close()


def _print(rows: list[dict[str, Any]], format: str, columns: tuple[str, ...]) -> None:
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


@_command(app, "ls")
def ls(store: Where = "auto", format: As = "text") -> None:
    """List what is kept, the last used first."""
    with _open(store) as opened:
        rows = [_row(opened, manifest) for manifest in opened.manifests()]
        _print(rows, format, ("key", "what", "on", "torch", "bytes", "used", "from"))
        if format == "text":
            print(f"{len(rows)} entries, {opened.size() / 2**20:.1f} MiB in {opened.path}")


@_command(app, "info")
def info(
    key: Annotated[str, typer.Argument(help="The beginning of its key.")], store: Where = "auto", format: As = "text"
) -> None:
    """Show one entry: what it is for, and all that must be equal for it to be used."""
    with _open(store) as opened:
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
            print(f"{name:<16}  {_text('', value)}")


@_command(app, "verify")
def verify(store: Where = "auto", format: As = "text") -> None:
    """Check every byte of every entry. Exit code 1 if one is damaged; damaged ones are never used."""
    with _open(store) as opened:
        wrong, count = opened.verify(), len(opened.keys())
        rows = [{"key": key, "wrong": reason} for key, reason in wrong.items()]
        if format == "json" or rows:
            _print(rows, format, ("key", "wrong"))
        if format == "text":
            print(f"{count - len(rows)} of {count} entries are sound")
    raise typer.Exit(int(bool(rows)))


@_command(app, "prune")
def prune(
    to: Annotated[str, typer.Option("--to", help="What may stay: 500M, 1G.")] = f"{MAX_BYTES // 2**30}G",
    store: Where = "auto",
    format: As = "text",
) -> None:
    """Remove the least recently used entries until the rest is small enough."""
    if not (found := re.fullmatch(r"(\d+)([KMGT]?)", to)):
        raise typer.BadParameter(f"found {to!r}, needed a size such as 500M", param_hint="--to")
    with _open(store) as opened:
        _gone(opened.prune(int(found[1]) * 2 ** (10 * " KMGT".index(found[2] or " "))), format)


@_command(app, "clear")
def clear(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False, store: Where = "auto", format: As = "text"
) -> None:
    """Remove everything that is kept."""
    with _open(store) as opened:
        keys = opened.keys()
        if not yes:
            typer.confirm(f"Remove {len(keys)} entries of {opened.path}?", abort=True, err=True)
        opened.remove(*keys)
        _gone(keys, format)


def _gone(keys: list[str], format: str) -> None:
    print(json.dumps({"removed": keys}) if format == "json" else f"{len(keys)} entries removed")


@_command(app, "pack")
def pack(
    file: Annotated[str, typer.Argument(help="The file to write.")], store: Where = "auto", format: As = "text"
) -> None:
    """Write everything into one file, signed with your key."""
    with _open(store) as opened, packing(file) as shelf:
        moved = _follow(give(shelf, opened, Keys()), len(opened.keys()))
        _refuse_half(moved)
    _tell(moved, format)


@_command(app, "push")
def push(place: Elsewhere, store: Where = "auto", format: As = "text") -> None:
    """Put everything at a URL, signed with your key."""
    if not is_url(place):
        raise typer.BadParameter(f"found {place!r}, needed a URL; fluxfire megacache pack writes files")
    with _open(store) as opened:
        _tell(_follow(give(shelf_at(place), opened, Keys()), len(opened.keys())), format)


@_command(app, "pull")
def pull(place: Elsewhere, store: Where = "auto", format: As = "text") -> None:
    """Take what a trusted key has signed from a file or a URL. Loading it means running its maker's code."""
    shelf = shelf_at(place)
    with _open(store) as opened:
        _tell(_follow(take(shelf, opened, Keys()), len(keys_on(shelf))), format)


@_command(app, "sign")
def sign_there(place: Elsewhere, format: As = "text") -> None:
    """Sign everything in a file or at a URL with your key, whoever signed it before: you vouch for it."""
    shelf, keys = shelf_at(place), Keys()
    count = len(keys_on(shelf))
    if isinstance(shelf, Pack):
        with packing(place) as to:
            moved = _follow(sign(shelf, to, keys), count)
            _refuse_half(moved)
    else:
        moved = _follow(sign(shelf, shelf, keys), count)
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


@_command(key_app, "new")
def key_new(name: Annotated[str, typer.Argument(help="What you and others call it.")], format: As = "text") -> None:
    """Make your own key, and trust it. What you pack, push and share is signed with it."""
    keys = Keys()
    public = keys.make(name)
    if format == "json":
        print(json.dumps({"key": public, "name": name, "folder": keys.path}))
    else:
        print(f"{public}\nOthers trust it with: fluxfire megacache key trust {public} '{name}'")


@_command(key_app, "ls")
def key_ls(format: As = "text") -> None:
    """List the keys that are trusted; yours is marked."""
    keys = Keys()
    own = keys.own()
    rows = [{"public": key, "name": name, "yours": key == own} for key, name in keys.trusted().items()]
    _print(rows, format, ("public", "name", "yours"))


@_command(key_app, "trust")
def key_trust(
    key: Annotated[str, typer.Argument(help="The public key: 64 hexadecimal digits.")],
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    format: As = "text",
) -> None:
    """Run from now on the compiled code that this key has signed. Who holds it can run any code as you."""
    Keys().trust(key, name)
    print(json.dumps({"key": key, "name": name}) if format == "json" else f"{name} is trusted")


@_command(key_app, "untrust")
def key_untrust(
    key: Annotated[str, typer.Argument(help="The public key, or its name.")], store: Where = "auto", format: As = "text"
) -> None:
    """Trust a key no more, and remove what the store has from it."""
    public = Keys().untrust(key)
    with _open(store) as opened:
        gone = [found.key for found in opened.manifests() if found.facts.get("signed_by") == public]
        opened.remove(*gone)
    _gone(gone, format)
