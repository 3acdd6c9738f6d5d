"""Entries that are elsewhere: given, fetched, taken.

Every place (`shelves.py`) holds the same: `entries/<key>.json`, a signed manifest (`trust.py`), and
`payloads/<sha256>`. The payload is written first and the manifest in one piece with its signature last, so two writers
leave one whole entry or the other's. What comes back is believed only under a signature, which is checked before
anything is interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from fluxfire.store.files import StoreError
from fluxfire.store.manifest import PAYLOAD_LIMIT, Manifest
from fluxfire.store.shelves import Shelf, TooLarge
from fluxfire.store.store import Store
from fluxfire.store.trust import SIGNED_LIMIT, Keys, unseal

_ENTRY: Final = re.compile(r"entries/([0-9a-f]{64})\.json")


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of one entry."""

    key: str
    what: Literal["done", "there", "refused"]
    reason: str = ""


def fetch(
    shelf: Shelf, key: str, trusted: dict[str, str], fits: Callable[[Manifest], bool] = lambda _: True
) -> tuple[Manifest, bytes, str] | None:
    """An entry that a trusted key has signed: its manifest, its payload and that key; None: none that fits.

    Raises:
        StoreError: it is there and cannot be used, or the place gives no answer.
    """
    try:
        sealed = shelf.read(f"entries/{key}.json", SIGNED_LIMIT)
    except FileNotFoundError:
        return None
    manifest, signer = unseal(sealed, key, trusted)
    if not fits(manifest):
        return None
    try:
        payload = shelf.read(f"payloads/{manifest.payload_sha256}", min(manifest.payload_bytes, PAYLOAD_LIMIT))
    except FileNotFoundError:
        raise StoreError(f"found {key[:12]} without its payload") from None
    return manifest, manifest.check(payload), signer


def keys_on(shelf: Shelf) -> list[str]:
    """The keys of the entries there."""
    found = (_ENTRY.fullmatch(name) for name in shelf.names())
    return sorted({match[1] for match in found if match})


def take(
    shelf: Shelf, store: Store, keys: Keys, *, fits: Callable[[Manifest], bool] = lambda _: True
) -> Iterator[Moved]:
    """Puts what is there, signed by somebody trusted, into our store; what is here already stays as it is."""
    trusted = keys.trusted()
    for key in keys_on(shelf):
        try:
            if is_sound(store, key):
                yield Moved(key, "there")
            elif found := fetch(shelf, key, trusted, fits):
                keep(store, shelf, *found)
                yield Moved(key, "done")
        except (StoreError, OSError) as error:
            yield Moved(key, "refused", str(error))


def is_sound(store: Store, key: str) -> bool:
    """Whether our store has this entry, and can use it."""
    try:
        manifest = store.manifest(key)
        return manifest is not None and store.has(manifest)
    except (StoreError, OSError):
        return False


def keep(store: Store, shelf: Shelf, manifest: Manifest, payload: bytes, signer: str) -> Manifest:
    """Puts a fetched entry into our store, with where it came from."""
    facts = manifest.facts | {"from": shelf.place, "signed_by": signer}
    return store.put(manifest.fields, facts, payload)


def give(shelf: Shelf, store: Store, keys: Keys, *, wanted: list[str] | None = None) -> Iterator[Moved]:
    """Puts entries of our store there, signed with this user's key: who gives, vouches for them."""
    for key in store.keys() if wanted is None else wanted:
        try:
            manifest = store.manifest(key)
            if manifest is None:
                raise StoreError(f"found no entry {key[:12]}")
            place, sealed = f"entries/{key}.json", keys.seal(manifest)
            if _is_there(shelf, place, sealed):
                yield Moved(key, "there")
                continue
            shelf.write(f"payloads/{manifest.payload_sha256}", store.payload(manifest))
            shelf.write(place, sealed)
            yield Moved(key, "done")
        except (StoreError, OSError) as error:
            yield Moved(key, "refused", str(error))


def _is_there(shelf: Shelf, name: str, data: bytes) -> bool:
    try:
        return shelf.read(name, SIGNED_LIMIT) == data
    except (FileNotFoundError, TooLarge):
        return False


def sign(shelf: Shelf, to: Shelf, keys: Keys) -> Iterator[Moved]:
    """Signs what is there with this user's key, whoever signed it or nobody; nothing of it is loaded."""
    for key in keys_on(shelf):
        try:
            sealed = shelf.read(f"entries/{key}.json", SIGNED_LIMIT)
            manifest = Manifest.decode(sealed[: sealed.find(b"\n") + 1], key)
            name = f"payloads/{manifest.payload_sha256}"
            payload = manifest.check(shelf.read(name, min(manifest.payload_bytes, PAYLOAD_LIMIT)))
            if to is not shelf:
                to.write(name, payload)
            to.write(f"entries/{key}.json", keys.seal(manifest))
            yield Moved(key, "done")
        except (StoreError, OSError) as error:
            yield Moved(key, "refused", str(error))
