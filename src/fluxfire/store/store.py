"""The store: entries found by key, put as a whole, evicted when the folder grows over its size.

    <path>/lock                 held while something is put or removed; readers never wait
    <path>/claims/<name>        held by the process that compiles something, so that others wait for it
    <path>/payloads/<sha256>    content-addressed: written first, and once for equal content
    <path>/entries/<key>.json   the manifest, written last: an entry exists when its manifest does

A reader that meets an entry half removed gets a `StoreError`, as for any damage, and compiles. The time of an entry's
last use is its manifest's modification time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from fluxfire.store.files import Folder, StoreError, open_private
from fluxfire.store.manifest import KEY, MANIFEST_LIMIT, PAYLOAD_LIMIT, Manifest

MAX_BYTES: Final = 2 * 2**30
LOCK_WAIT_S: Final = 10.0
_SUFFIX: Final = ".json"


class Store:
    """Entries in one private folder.

    Args:
        path: the folder; it and what is missing on the way are made, for this user alone.
        max_bytes: what payloads and manifests may take together; the least recently used go first.
        lock_wait_s: how long `put` and removals wait for another process.
        folder: opens the folder; for tests.

    Raises:
        StoreError, OSError: the folder is not private, or cannot be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = MAX_BYTES,
        lock_wait_s: float = LOCK_WAIT_S,
        folder: Callable[[str | os.PathLike[str]], Folder] = open_private,
    ) -> None:
        self.max_bytes, self._lock_wait_s = max_bytes, lock_wait_s
        self._root = folder(path)
        self.path = self._root.path
        self._entries = self._root.child("entries", create=True)
        self._payloads = self._root.child("payloads", create=True)

    def close(self) -> None:
        """Closes the folders."""
        for folder in (self._entries, self._payloads, self._root):
            folder.close()

    def keys(self) -> list[str]:
        """The keys of all entries."""
        names = [name.removesuffix(_SUFFIX) for name in self._entries.names() if name.endswith(_SUFFIX)]
        return [name for name in names if KEY.fullmatch(name)]

    def manifest(self, key: str) -> Manifest | None:
        """What was kept under this key; None if nothing was.

        Raises:
            StoreError, OSError: there is an entry, and it cannot be used.
        """
        try:
            return Manifest.decode(self._entries.read(key + _SUFFIX, MANIFEST_LIMIT), key)
        except FileNotFoundError:
            return None

    def manifests(self) -> list[Manifest]:
        """All sound manifests, the most recently used first."""
        found: list[tuple[float, Manifest]] = []
        for key in self.keys():
            with contextlib.suppress(StoreError, OSError):
                if manifest := self.manifest(key):
                    found.append((self.last_used(key), manifest))
        return [manifest for _, manifest in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def last_used(self, key: str) -> float:
        """When the entry was last put or read, in seconds since the epoch."""
        return self._entries.stat(key + _SUFFIX).st_mtime

    def payload(self, manifest: Manifest) -> bytes:
        """The payload of an entry, checked, and the entry marked as used.

        Raises:
            StoreError, OSError: it is damaged or gone.
        """
        data = manifest.check(self._payloads.read(manifest.payload_sha256, min(manifest.payload_bytes, PAYLOAD_LIMIT)))
        with contextlib.suppress(OSError):  # a folder that can only be read
            self._entries.touch(manifest.key + _SUFFIX)
        return data

    def has(self, manifest: Manifest) -> bool:
        """Whether the payload is there already, and sound."""
        try:
            manifest.check(self._payloads.read(manifest.payload_sha256, manifest.payload_bytes))
        except (StoreError, OSError):
            return False
        return True

    def put(self, fields: dict[str, Any], facts: dict[str, Any], payload: bytes) -> Manifest:
        """Keeps a payload under the digest of its fields, in the place of an earlier one.

        Raises:
            StoreError, OSError: it could not be kept; the store is as sound as before.
        """
        with self._root.locked("lock", self._lock_wait_s):
            return self._put(Manifest.of(fields, facts, payload), payload)

    def update(self, key: str, change: Callable[[bytes | None], tuple[Manifest, bytes] | None]) -> Manifest | None:
        """Puts what `change` makes of an entry's payload, or of None; nothing if it makes None of it.

        Nobody else puts anything between the reading and the writing.

        Raises:
            StoreError, OSError: it could not be kept; the store is as sound as before.
        """
        with self._root.locked("lock", self._lock_wait_s):
            before = None
            with contextlib.suppress(StoreError, FileNotFoundError):
                if manifest := self.manifest(key):
                    before = self.payload(manifest)
            after = change(before)
            return self._put(*after) if after else None

    @contextlib.contextmanager
    def claimed(self, name: str, wait_s: float) -> Iterator[bool]:
        """Holds `name` between processes, such as for what is being compiled; whether another process had it first.

        Raises:
            StoreError: somebody else held it for longer than `wait_s`.
            OSError: the folder cannot be written.
        """
        claims = self._root.child("claims", create=True)
        try:
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(claims.locked(name, 0))
                    waited = False
                except StoreError:
                    held.enter_context(claims.locked(name, wait_s))
                    waited = True
                yield waited
        finally:
            claims.close()

    def _put(self, manifest: Manifest, payload: bytes) -> Manifest:
        data = manifest.encode()
        size = len(payload) + len(data)
        if len(data) > MANIFEST_LIMIT or len(payload) > PAYLOAD_LIMIT or size > self.max_bytes:
            raise StoreError(f"found {size} bytes to keep, needed at most {self.max_bytes}")
        for folder in (self._entries, self._payloads):
            folder.sweep()
        self._evict(self.max_bytes - size)
        if not self.has(manifest):
            self._payloads.write(manifest.payload_sha256, payload)
        self._entries.write(manifest.key + _SUFFIX, data)
        self._drop_orphans()
        return manifest

    def remove(self, *keys: str) -> None:
        """Forgets entries.

        Raises:
            StoreError, OSError: not all could be removed.
        """
        with self._root.locked("lock", self._lock_wait_s):
            self._remove(keys)
            self._drop_orphans()

    def prune(self, max_bytes: int) -> list[str]:
        """Removes the least recently used entries until at most `max_bytes` are left, and what belongs to no entry.

        Returns:
            The keys that went.
        """
        with self._root.locked("lock", self._lock_wait_s):
            before = set(self.keys())
            self._evict(max_bytes)
            self._drop_orphans()
            return sorted(before - set(self.keys()))

    def size(self) -> int:
        """Bytes of all payloads and manifests."""
        return sum(folder.stat(name).st_size for folder in (self._entries, self._payloads) for name in folder.names())

    def verify(self) -> dict[str, str]:
        """What is wrong with each entry that cannot be used, by key."""
        wrong: dict[str, str] = {}
        for key in self.keys():
            try:
                if manifest := self.manifest(key):
                    manifest.check(self._payloads.read(manifest.payload_sha256, PAYLOAD_LIMIT))
            except (StoreError, OSError) as error:
                wrong[key] = str(error)
        return wrong

    def _evict(self, max_bytes: int) -> None:
        self._drop_orphans()
        names = [name for name in self._entries.names() if name.endswith(_SUFFIX)]
        oldest = sorted(names, key=lambda name: self._entries.stat(name).st_mtime)
        while oldest and self.size() > max_bytes:
            self._remove([oldest.pop(0).removesuffix(_SUFFIX)])
            self._drop_orphans()

    def _remove(self, keys: Any) -> None:
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self._entries.remove(key + _SUFFIX)
        self._entries.sync()

    def _drop_orphans(self) -> None:
        """Removes payloads that no manifest names, and manifests that are damaged: nothing can ever use them."""
        named: set[str] = set()
        for name in self._entries.names():
            try:
                manifest = self.manifest(name.removesuffix(_SUFFIX))
                named |= {manifest.payload_sha256} if manifest else set()
            except (StoreError, OSError):
                self._entries.remove(name)
        for name in set(self._payloads.names()) - named:
            self._payloads.remove(name)
