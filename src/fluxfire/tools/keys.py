"""`fluxfire megacache key`: whose compiled code may run here, and this user's own key."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fluxfire.store.trust import Keys
from fluxfire.tools.common import As, Where, command, gone, opened_store, print_rows

app = typer.Typer(no_args_is_help=True, help="Whose compiled code may run here; and your own key to sign with.")


@command(app, "new")
def key_new(name: Annotated[str, typer.Argument(help="What you and others call it.")], format: As = "text") -> None:
    """Make your own key, and trust it. What you pack, push and share is signed with it."""
    keys = Keys()
    public = keys.make(name)
    if format == "json":
        print(json.dumps({"key": public, "name": name, "folder": keys.path}))
    else:
        print(f"{public}\nOthers trust it with: fluxfire megacache key trust {public} '{name}'")


@command(app, "ls")
def key_ls(format: As = "text") -> None:
    """List the keys that are trusted; yours is marked."""
    keys = Keys()
    own = keys.own()
    rows = [{"public": key, "name": name, "yours": key == own} for key, name in keys.trusted().items()]
    print_rows(rows, format, ("public", "name", "yours"))


@command(app, "trust")
def key_trust(
    key: Annotated[str, typer.Argument(help="The public key: 64 hexadecimal digits.")],
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    format: As = "text",
) -> None:
    """Run from now on the compiled code that this key has signed. Who holds it can run any code as you."""
    Keys().trust(key, name)
    print(json.dumps({"key": key, "name": name}) if format == "json" else f"{name} is trusted")


@command(app, "untrust")
def key_untrust(
    key: Annotated[str, typer.Argument(help="The public key, or its name.")], store: Where = "auto", format: As = "text"
) -> None:
    """Trust a key no more, and remove what the store has from it."""
    public = Keys().untrust(key)
    with opened_store(store) as opened:
        removed = [found.key for found in opened.manifests() if found.facts.get("signed_by") == public]
        opened.remove(*removed)
    gone(removed, format)
