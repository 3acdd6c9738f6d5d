"""The mega-cache: which artifact fits, and where artifacts are kept so that the next process compiles nothing.

An artifact is one kind of block compiled ahead of time (`aot.py`). It is found by its *fields*: the versions of Python,
torch (with a hash of its sources), Triton, CUDA, diffusers and what changes its blocks; the GPU, or the CPU's model and
flags; torch's settings and inductor's options; the block's description and the kind of its inputs. All must be equal.
What traced functions read besides, the sources of their modules, is checked before an artifact is deserialized. A miss
names what differs from the nearest entry, and is compiled; it is never an error.

Loading an artifact means running its code, so the store is a private folder and every byte is checked first
(`store/`). Where a URL is given, what the store does not have is looked for there, and put into the store if a key
that the user trusts has signed it. Artifacts are shared by all pipelines of a process, and compiled once however many
ask at the same time; another process that begins to compile the same waits until the first has kept them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from fluxfire.environment import environment, nearest
from fluxfire.store import Manifest, Store, StoreError
from fluxfire.store.manifest import digest
from fluxfire.store.remote import fetch, give, keep, take
from fluxfire.store.shelves import Shelf, is_url, shelf_at
from fluxfire.store.trust import Keys
from fluxfire.structure import Unknown, source_of

PREFETCHED: Final = 16  # artifacts: a model's blocks at batch 1 and more are 4
CLAIM_WAIT_S: Final = 120.0  # for another process that compiles the same
_LOG: Final = logging.getLogger(__name__)
_OPEN: dict[tuple[str, str, bool], MegaCache] = {}
_LOCK: Final = threading.RLock()
_BACKGROUND: Final = threading.Lock()
SWITCH_S: Final = 2e-5


@dataclass(slots=True)
class Artifact:
    """One kind of block compiled ahead of time: `run(block, *values)`."""

    fields: dict[str, Any]
    run: Any  # torch's AOTCompiledFunction
    modules: tuple[str, ...]  # whose functions were traced, torch's own apart
    payload: bytes  # as it is kept; b"" for one that came from the store
    kept_bytes: int
    load_s: float = 0.0
    trusted: bool = False  # has once given what the block itself gives


def default_folder() -> Path:
    """Where `megacache="auto"` keeps artifacts: fluxfire's folder among this user's caches."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # the standard: a relative one is invalid
        caches = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return Path(os.path.realpath(caches)) / "fluxfire" / "megacache"


def megacache_at(place: str | os.PathLike[str], share: bool = False) -> MegaCache:
    """The mega-cache of this process at "auto", at a path, or at a URL with "auto" before it."""
    url = str(place) if is_url(place) else ""
    path = os.path.abspath(default_folder() if url or place == "auto" else place)
    with _LOCK:
        if (path, url, share) not in _OPEN:
            _OPEN[path, url, share] = MegaCache(path, url, share)
        return _OPEN[path, url, share]


class MegaCache:
    """The artifacts of one store that this process has loaded or made.

    Args:
        path: the store's folder.
        url: where to look for what the store does not have.
        share: put there, signed, what is compiled here.
    """

    def __init__(self, path: str, url: str = "", share: bool = False) -> None:
        self.path, self._url, self._share = path, url, share
        self._lock = threading.Lock()
        self._artifacts: dict[str, Future[Artifact]] = {}
        self._claims: dict[str, contextlib.ExitStack] = {}
        self._fault = ""

    @functools.cached_property
    def store(self) -> Store | None:
        """The store, opened when it is first needed; None, with a line in the log, where that fails."""
        try:
            return Store(self.path)
        except (StoreError, OSError) as error:
            self._fault = f"the store cannot be used: {error}"
            _LOG.warning("no artifact is kept or found, %s", self._fault)
            return None

    @functools.cached_property
    def _elsewhere(self) -> tuple[Shelf, Keys] | None:
        return (shelf_at(self._url), Keys()) if self._url else None

    def find(self, fields: dict[str, Any]) -> Manifest | str:
        """What was kept for these fields, fetched from elsewhere if need be; else why there is nothing.

        Raises:
            StoreError, OSError: there is something that cannot be used.
        """
        store, key, why = self.store, digest(fields), ""
        if store is None:
            return self._fault
        if manifest := store.manifest(key):
            return manifest
        if self._url:
            try:
                if self._elsewhere and (found := fetch(self._elsewhere[0], key, self._elsewhere[1].trusted())):
                    return keep(store, self._elsewhere[0], *found)
                why = f"not in {self._url}; "
            except (StoreError, OSError) as error:
                why = f"{error}; "
                _LOG.warning("nothing is fetched: %s", error)
        alike = [manifest for manifest in store.manifests() if ("block" in manifest.fields) == ("block" in fields)]
        return why + nearest(fields, alike)

    def claim(self, group: str) -> bool:
        """Claims to compile what belongs together, and waits, for a time, for another process that does.

        Returns:
            Whether another process had to be waited for, so that the store is worth another look.
        """
        if self.store is None or group in self._claims:
            return False
        held = self._claims[group] = contextlib.ExitStack()
        try:
            return held.enter_context(self.store.claimed(digest({"group": group})[:32], CLAIM_WAIT_S))
        except (StoreError, OSError) as error:
            _LOG.info("it is compiled here too: %s", error)
            return True

    def release(self, group: str) -> None:
        """Lets other processes look for what was kept."""
        if held := self._claims.pop(group, None):
            held.close()

    def get(self, fields: dict[str, Any], make: Callable[[str], Artifact], group: str = "") -> Artifact:
        """The artifact of these fields: loaded already, else from the store, else made by `make(why)`, once a process.

        A process that makes one of a `group` is waited for by others, until it lets go of the group.

        Raises:
            Unknown: it was not in the store, and could not be made.
        """
        key = digest(fields)
        while True:
            with self._lock:
                found = self._artifacts.get(key)
                future = found or self._artifacts.setdefault(key, Future())
            if not found:
                break
            try:
                return found.result()
            except _Absent:  # somebody looked who makes none
                continue
        try:
            artifact = self._load(fields)
            if isinstance(artifact, str) and group and self.claim(group):
                artifact = self._load(fields)
                if not isinstance(artifact, str):
                    self.release(group)
            future.set_result(make(artifact) if isinstance(artifact, str) else artifact)
        except BaseException as error:
            self.forget(fields)
            future.set_exception(error if isinstance(error, Unknown) else Unknown(f"{type(error).__name__}: {error}"))
            raise
        return future.result()

    def forget(self, fields: dict[str, Any], *, remove: bool = False) -> None:
        """Lets the next one who asks look in the store anew; with `remove`, the entry there goes too."""
        with self._lock:
            self._artifacts.pop(digest(fields), None)
        if remove and self.store:
            try:
                self.store.remove(digest(fields))
            except (StoreError, OSError) as error:
                _LOG.warning("a bad artifact stays: %s", error)

    def keep(self, artifact: Artifact) -> bool:
        """Puts an artifact that was made here into the store; False, with a line in the log, where that fails."""
        if self.store is None:
            return False
        facts = {"sources": {name: source_of(name) for name in artifact.modules}, "made_at_s": int(time.time())}
        try:
            manifest = self.store.put(artifact.fields, facts, artifact.payload)
        except (StoreError, OSError) as error:
            _LOG.warning("an artifact was not kept: %s", error)
            return False
        artifact.payload = b""
        self.give(manifest.key)
        return True

    def give(self, key: str) -> None:
        """Puts an entry of the store elsewhere too, if that is wanted; a failure is a line in the log."""
        if not self._share or not self.store:
            return
        try:
            assert self._elsewhere
            moved = list(give(self._elsewhere[0], self.store, self._elsewhere[1], wanted=[key]))
            reasons = [entry.reason for entry in moved if entry.what == "refused"]
        except (StoreError, OSError) as error:
            reasons = [str(error)]
        for reason in reasons:
            _LOG.warning("%s was not shared: %s", key[:12], reason)

    def prefetch(self) -> None:
        """Imports, then loads the artifacts of this environment that were used last. Never raises."""
        with _in_the_background():
            self._prefetch()

    def _prefetch(self) -> None:
        try:
            for name in ("torch._dynamo.aot_compile", "torch._inductor.compile_fx"):
                importlib.import_module(name)
            store = self.store
            if store is None:
                return
            device = torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
            here = environment(device)

            def fits(manifest: Manifest) -> bool:
                return "block" in manifest.fields and manifest.fields.get("environment") == here

            if self._elsewhere:
                for _ in take(self._elsewhere[0], store, self._elsewhere[1], fits=fits):
                    pass
            for manifest in list(filter(fits, store.manifests()))[:PREFETCHED]:
                with contextlib.suppress(_Absent):
                    self.get(manifest.fields, _not_made)
        except Exception as error:  # whatever it is, the first call will meet it again and say so
            _LOG.info("prefetch ended early: %s", error)

    def _load(self, fields: dict[str, Any]) -> Artifact | str:
        """From the store; else why not."""
        start = time.perf_counter()
        try:
            manifest = self.find(fields)
            if isinstance(manifest, str):
                return manifest
            assert self.store
            for module, source in manifest.facts["sources"].items():
                importlib.import_module(module)
                if source_of(module) != source:
                    return f"the source of {module} changed"
            payload = self.store.payload(manifest)
            from torch._dynamo.convert_frame import compile_lock

            with compile_lock:
                run = torch.compiler.load_compiled_function(io.BytesIO(payload))
        except Exception as error:  # torch's deserializer raises anything: whatever it is, we compile
            _LOG.warning("an artifact could not be loaded: %s", error)
            return f"{type(error).__name__}: {error}".splitlines()[0]
        run.disable_guard_check()  # type: ignore[attr-defined]
        modules = tuple(manifest.facts["sources"])
        return Artifact(fields, run, modules, b"", len(payload), time.perf_counter() - start)


@contextlib.contextmanager
def _in_the_background() -> Iterator[None]:
    """Lets other threads have the interpreter as soon as they ask, not after Python's 5 ms.

    Loading weights gives the interpreter up and asks for it again some thousand times: beside a thread that imports, it
    would wait until that is done.
    """
    with _BACKGROUND:
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            yield
        finally:
            sys.setswitchinterval(before)


class _Absent(Unknown):
    """It is not in the store, and was not to be made."""


def _not_made(why: str) -> Artifact:
    raise _Absent(why)
