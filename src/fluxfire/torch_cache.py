"""torch's own mega-cache as the second tier: for graphs that are traced in each process.

What cannot be compiled ahead of time (the denoiser whole, the VAE's decoder, CUDA graphs, blocks that `aot.py` does not
serve) is traced by Dynamo in each process; what torch then compiles, it can find again: inductor's graphs with their
kernels, AOTAutograd's, and the best configuration of each kernel. One entry of the store holds these for one pipeline
and one set of options; torch's own keys decide which of them fits a graph. Found so, a graph costs its tracing, not its
compilation. Triton's kernels are in it; the C++ of a CPU is compiled again, unless inductor's folder still has it.

Why `torch.compiler.save_cache_artifacts` is not called: each call of a process appends a section, and of several of one
type loading keeps the last (torch 2.11 to 2.15), so our call would spoil what the user saves later. What torch has
recorded is read instead, and written with one section for each type. Loading is torch's own, after what it leaves out:
keys become file names unchecked there, so only keys of the known forms pass; and contents are unpickled, so they come
out of a store whose bytes are ours or signed (`store/`). Timings of matrix multiplications are no artifacts of torch:
they are carried too, so that max-autotune measures nothing twice where a graph is new.

An entry grows and never shrinks: what a run did not touch stays. Kept after the first complete run, and again when
something new was compiled.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from fluxfire.environment import environment
from fluxfire.megacache import MegaCache
from fluxfire.run import at_last_step
from fluxfire.stats import TorchCacheStats
from fluxfire.store import Manifest, StoreError
from fluxfire.store.manifest import canonical, digest

_LOG: Final = logging.getLogger(__name__)
_TIMINGS: Final = "timings"
# Of each type of artifact, what its key looks like; all else is neither kept nor loaded.
FORMS: Final = {
    "inductor": re.compile(r"f[a-z2-7]{51}"),
    "aot_autograd": re.compile(r"a[a-z2-7]{51}"),
    "autotune": re.compile(r"[a-z2-7]{2}/[0-9a-z]{32,128}\.best_config"),
    _TIMINGS: re.compile(r"[0-9a-z]{32,128}"),
}
ONE_EACH: Final = frozenset({"autotune", _TIMINGS})  # the others have one for each set of guards
VARIANTS: Final = 16  # the newest; two processes that compile the same at once give two
_HIT: Final = (("inductor", "fxgraph_cache_hit"),)
_MISS: Final = (
    ("inductor", "fxgraph_cache_miss"),
    ("inductor", "fxgraph_cache_bypass"),
    ("aot_autograd", "autograd_cache_bypass"),
)

Artifacts = dict[tuple[str, str, bytes], None]  # (type, key, content), in order


class TorchCache:
    """Finds and keeps what torch compiles for one pipeline, around the calls that it traces.

    Args:
        pipe: whose runs are followed; held weakly.
        cache: where the entry comes from.
        fields: what an entry must agree on.
    """

    def __init__(self, pipe: Any, cache: MegaCache, fields: Mapping[str, Any]) -> None:
        self._pipe, self._cache, self._given = weakref.ref(pipe), cache, dict(fields)
        self._fields: dict[str, Any] | None = None  # with the environment; None before the first traced call
        self._lock = threading.Lock()
        self._known = self._loaded = self._kept = self._bytes = 0
        self._load_s = 0.0
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def stats(self) -> TorchCacheStats:
        """A snapshot of the counts."""
        hits, misses, reasons = self._counts["hits"], self._counts["misses"], tuple(self._reasons.items())
        return TorchCacheStats(hits, misses, self._loaded, self._kept, self._bytes, self._load_s, reasons)

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled function, with the entry loaded before its first call, and torch's counters read."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._fields is None:
                values = (*args, *kwargs.values())
                self._prepare(next(value for value in values if isinstance(value, torch.Tensor)).device)
            hits, misses = _counted(_HIT), _counted(_MISS)
            try:
                return compiled(*args, **kwargs)
            finally:
                self._counts.update(hits=_counted(_HIT) - hits, misses=_counted(_MISS) - misses)

        return call

    def around_run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the denoiser and the decoder: keeps what a whole run compiled."""
        try:
            out = forward(*args, **kwargs)
        except BaseException:
            self._release()
            raise
        if self._fields is not None and at_last_step(getattr(self._pipe(), "scheduler", None)):
            with self._lock:
                self._keep(self._fields)
            self._release()
        return out

    def _prepare(self, device: torch.device) -> None:
        with self._lock:
            if self._fields is not None:
                return
            fields = {"environment": environment(device), **self._given}
            why = self._find(fields)
            if why and self._cache.claim(digest(fields)) and not (why := self._find(fields)):
                self._cache.release(digest(fields))
            if why:
                self._reasons[f"compiled: {why}"] += 1
            self._known, self._fields = len(_recorded()), fields

    def _release(self) -> None:
        if self._fields is not None:
            self._cache.release(digest(self._fields))

    def _find(self, fields: dict[str, Any]) -> str:
        """Loads the entry; else why not."""
        start = time.perf_counter()
        try:
            manifest = self._cache.find(fields)
            if isinstance(manifest, str):
                return manifest
            assert self._cache.store
            payload = self._cache.store.payload(manifest)
            artifacts = unpack(payload)
            load(artifacts)
        except Exception as error:  # torch raises anything here: whatever it is, we compile
            _LOG.warning("torch's artifacts could not be loaded: %s", error)
            return f"{type(error).__name__}: {error}".splitlines()[0]
        self._loaded, self._bytes, self._load_s = len(artifacts), len(payload), time.perf_counter() - start
        return ""

    def _keep(self, fields: dict[str, Any]) -> None:
        recorded, store = _recorded(), self._cache.store
        if len(recorded) <= self._known or store is None:
            return
        new, self._known = recorded[self._known :], len(recorded)

        def grown(before: bytes | None) -> tuple[Manifest, bytes] | None:
            old = unpack(before) if before else {}
            artifacts = merged(old, dict.fromkeys(artifact for artifact in (*new, *_timings()) if _is_known(artifact)))
            payload = pack(artifacts)
            self._kept = len(artifacts)
            counts = dict(Counter(kind for kind, _, _ in artifacts))
            facts = {"artifacts": counts, "made_at_s": int(time.time())}
            return (Manifest.of(fields, facts, payload), payload) if artifacts.keys() != old.keys() else None

        try:
            manifest = store.update(digest(fields), grown)
        except (StoreError, OSError) as error:
            _LOG.warning("torch's artifacts were not kept: %s", error)
            self._reasons[f"not kept: {error}"] += 1
            return
        if manifest:
            self._cache.give(manifest.key)


def pack(artifacts: Artifacts) -> bytes:
    """The payload of an entry: a line of JSON with types, keys and sizes; then the contents."""
    index = [[kind, key, len(content)] for kind, key, content in artifacts]
    return canonical({"artifacts": index, "format": 1}).encode() + b"\n" + b"".join(key[2] for key in artifacts)


def unpack(payload: bytes) -> Artifacts:
    """What `pack` packed.

    Raises:
        StoreError: another form, or a key that torch gives to nothing: a key becomes the name of a file.
    """
    line, _, rest = payload.partition(b"\n")
    try:
        index = json.loads(line)
        rows = [(str(kind), str(key), int(size)) for kind, key, size in index["artifacts"]]
        sound = index["format"] == 1 and all(size >= 0 for *_, size in rows) and sum(r[2] for r in rows) == len(rest)
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise StoreError("found torch's artifacts in another form, needed what fluxfire kept")
    artifacts, at = Artifacts(), 0
    for kind, key, size in rows:
        artifact = (kind, key, rest[at : at + size])
        if not _is_known(artifact):
            raise StoreError(f"found {kind[:20]!r} {key[:80]!r}, needed a key of torch's")
        artifacts[artifact] = None
        at += size
    return artifacts


def merged(old: Artifacts, new: Artifacts) -> Artifacts:
    """Both; of what there is one of, the new one, and timings of both."""
    groups: dict[tuple[str, str], list[bytes]] = {}
    for kind, key, content in (*old, *new):
        contents = groups.setdefault((kind, key), [])
        if kind == _TIMINGS and contents:
            content = canonical(_union(json.loads(contents[-1]), json.loads(content))).encode()
        if content in contents:
            contents.remove(content)
        contents.append(content)
        del contents[: -1 if kind in ONE_EACH else -VARIANTS]
    return {(kind, key, content): None for (kind, key), contents in groups.items() for content in contents}


def load(artifacts: Artifacts) -> None:
    """Gives the artifacts to torch, each type in one section, and the timings to inductor's file.

    Raises:
        StoreError: torch does not take them.
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch.compiler import _cache
    from torch.utils._appending_byte_serializer import AppendingByteSerializer

    sections: dict[str, list[_cache.CacheArtifact]] = {}
    _cache.CacheArtifactManager._ensure_cache_artifacts_registered()
    for kind, key, content in artifacts:
        if kind == _TIMINGS:
            _add_timings(key, content)
        else:
            sections.setdefault(kind, []).append(_cache.CacheArtifactFactory.create(kind, key, content))
    serializer = AppendingByteSerializer(serialize_fn=_cache._serialize_single_cache)
    serializer.extend(sections.items())
    with compile_lock:
        if sections and torch.compiler.load_cache_artifacts(serializer.to_bytes()) is None:
            raise StoreError("torch did not take what fluxfire kept")


def _recorded() -> list[tuple[str, str, bytes]]:
    """What torch has recorded in this process, in order; nothing where a new torch records in another way."""
    from torch.compiler._cache import CacheArtifactManager

    seen = getattr(CacheArtifactManager, "_seen_artifacts", ())
    return [(artifact.type(), artifact.key, artifact.content) for artifact in list(seen)]


def _counted(names: tuple[tuple[str, str], ...]) -> int:
    from torch._dynamo.utils import counters

    return sum(counters[group][name] for group, name in names)


def _is_known(artifact: tuple[str, str, bytes]) -> bool:
    kind, key, content = artifact
    return kind in FORMS and FORMS[kind].fullmatch(key) is not None and (kind != _TIMINGS or _are_timings(content))


def _are_timings(content: bytes) -> bool:
    def numbers(value: Any) -> bool:
        return all(map(numbers, value.values())) if isinstance(value, dict) else isinstance(value, int | float)

    try:
        found = json.loads(content)
        return isinstance(found, dict) and numbers(found)
    except (ValueError, RecursionError):
        return False


def _timings() -> Artifacts:
    """Inductor's file of timings on this kind of machine, which has those of padding too."""
    from torch._inductor.codecache import CacheBase

    try:
        content = canonical(CacheBase().get_local_cache()).encode()
    except (OSError, ValueError, KeyError):
        return {}
    artifact = (_TIMINGS, CacheBase.get_system()["hash"], content)
    return {artifact: None} if content != b"{}" and _are_timings(content) else {}


def _add_timings(system: str, content: bytes) -> None:
    from torch._inductor.codecache import CacheBase

    if system == CacheBase.get_system()["hash"]:
        cache = CacheBase()
        here = cache.get_local_cache()
        both = _union(json.loads(content), here)  # what was measured here goes first
        if both != here:
            cache.update_local_cache(both)


def _union(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = old | new
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            both[name] = _union(old[name], new[name])
    return both
