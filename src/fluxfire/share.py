"""Compiled code carried to another machine: in one file, or to and from a place that several share.

Both tiers of the mega-cache are in it, all models and options. To load it is to run code that somebody else has made:
only entries that a key has signed which you trust are taken, and that is checked before anything of them is interpreted
(`store/trust.py`, docs/megacache.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fluxfire.errors import ArtifactError
from fluxfire.megacache import megacache_at
from fluxfire.store import Store, StoreError
from fluxfire.store.remote import Moved, give, take
from fluxfire.store.shelves import is_url, packing, shelf_at
from fluxfire.store.trust import Keys


def save_megacache(path: str | os.PathLike[str], *, megacache: str | os.PathLike[str] = "auto") -> tuple[str, ...]:
    """Writes all compiled code of a store into one file, or to a URL, signed with your key.

    Who signs, vouches: also for what this store has from elsewhere.

    Args:
        path: the file; or a URL such as s3://bucket/prefix or hf://owner/name.
        megacache: the store: "auto" or the path of its folder.

    Returns:
        The keys of the entries.

    Raises:
        ArtifactError: you have no key, the store cannot be read, or the place cannot be written.

    Examples:
        >>> fluxfire.save_megacache("compiled.pack")
        Traceback (most recent call last):
        fluxfire.errors.ArtifactError: found nothing in ..., needed compiled code: make a picture first
    """
    with _store(megacache) as store:
        if not store.keys():
            raise ArtifactError(f"found nothing in {store.path}, needed compiled code: make a picture first")
        if is_url(path):
            return _whole(give(shelf_at(path), store, Keys()))
        with packing(path) as shelf:
            return _whole(give(shelf, store, Keys()))


def load_megacache(path: str | os.PathLike[str], *, megacache: str | os.PathLike[str] = "auto") -> tuple[str, ...]:
    """Puts compiled code from a file or a URL into a store, so that `optimize_pipeline` finds it there.

    What the store has already stays as it is.

    Args:
        path: a file of `save_megacache`; or a URL such as s3://bucket/prefix or hf://owner/name.
        megacache: the store: "auto" or the path of its folder.

    Returns:
        The keys of the entries there.

    Raises:
        ArtifactError: an entry is not signed by a key that you trust, or is damaged (the others are taken); or there
            is none.

    Examples:
        >>> fluxfire.load_megacache("compiled.pack")
        Traceback (most recent call last):
        fluxfire.errors.ArtifactError: ...
    """
    with _store(megacache) as store:
        if found := _whole(take(shelf_at(path), store, Keys())):
            return found
    raise ArtifactError(f"found nothing at {path}, needed what save_megacache wrote")


@contextmanager
def _store(place: str | os.PathLike[str]) -> Iterator[Store]:
    try:
        store = Store(megacache_at(place).path)
        try:
            yield store
        finally:
            store.close()
    except (StoreError, OSError) as error:
        raise ArtifactError(str(error)) from None


def _whole(moved: Iterator[Moved]) -> tuple[str, ...]:
    entries = list(moved)
    if refused := [entry for entry in entries if entry.what == "refused"]:
        raise ArtifactError(f"{len(refused)} of {len(entries)} entries: {refused[0].reason}")
    return tuple(entry.key for entry in entries)
