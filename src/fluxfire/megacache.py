"""The mega-cache: which artifact fits, and where artifacts are kept so that the next process compiles nothing.

An artifact is one kind of block compiled ahead of time (`aot.py`). It is found by its *fields*: the versions of Python,
torch (with a hash of its sources), Triton, CUDA, diffusers and what changes its blocks; the GPU, or the CPU's model and
flags; torch's settings and inductor's options; the block's description and the kind of its inputs. All must be equal.
What traced functions read besides, the sources of their modules, is checked before an artifact is deserialized. A miss
names what differs from the nearest entry, and is compiled; it is never an error.

Loading an artifact means running its code, so the store is a private folder and every byte is checked first
(`store/`). Artifacts are shared by all pipelines of a process, and compiled once however many ask at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from fluxfire.errors import ArgumentError
from fluxfire.store import Manifest, Store, StoreError
from fluxfire.store.manifest import digest
from fluxfire.structure import Unknown, source_of

PREFETCHED: Final = 16  # artifacts: a model's blocks at batch 1 and more are 4
_LOG: Final = logging.getLogger(__name__)
_OPEN: dict[str, MegaCache] = {}
_LOCK: Final = threading.RLock()


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


def check_path(megacache: object) -> None:
    """Refuses what is no place for artifacts.

    Raises:
        ArgumentError: neither "auto", nor a path, nor None.
    """
    if megacache is not None and (not isinstance(megacache, str | os.PathLike) or not str(megacache)):
        raise ArgumentError(f'megacache: found {megacache!r}, needed "auto", the path of a folder, or None')


def megacache_at(place: str | os.PathLike[str]) -> MegaCache:
    """The mega-cache of this process at "auto" or at a path."""
    path = os.path.abspath(default_folder() if place == "auto" else place)
    with _LOCK:
        if path not in _OPEN:
            _OPEN[path] = MegaCache(path)
        return _OPEN[path]


def prefetch(megacache: str | os.PathLike[str] = "auto") -> threading.Thread:
    """Begins to load this machine's artifacts, and to import what they need, while you load the weights.

    Call it first, then `from_pretrained`, then `optimize_pipeline`. diffusers, which you are about to import anyway, is
    imported before this returns, so that no two threads import it at once; the rest passes beside you. The most
    recently used artifacts for the current device are loaded, 16 at most; the others when they are needed.

    Args:
        megacache: "auto" or a path, as for `optimize_pipeline`.

    Returns:
        The thread that does it; nobody needs to wait for it.

    Raises:
        ArgumentError: `megacache` is neither "auto" nor a path.
    """
    check_path(megacache or b"")
    importlib.import_module("diffusers.pipelines.flux.pipeline_flux")
    thread = threading.Thread(target=megacache_at(megacache).prefetch, name="fluxfire-prefetch")
    thread.start()
    return thread


class MegaCache:
    """The artifacts of one store that this process has loaded or made."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._artifacts: dict[str, Future[Artifact]] = {}
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

    def get(self, fields: dict[str, Any], make: Callable[[str], Artifact]) -> Artifact:
        """The artifact of these fields: loaded already, else from the store, else made by `make(why)`, once a process.

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
            self.store.put(artifact.fields, facts, artifact.payload)
        except (StoreError, OSError) as error:
            _LOG.warning("an artifact was not kept: %s", error)
            return False
        artifact.payload = b""
        return True

    def prefetch(self) -> None:
        """Imports, then loads the artifacts of this environment that were used last. Never raises."""
        try:
            for name in ("torch._dynamo.aot_compile", "torch._inductor.compile_fx"):
                importlib.import_module(name)
            store = self.store
            if store is None:
                return
            device = torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
            here = environment(device)
            fitting = [found for found in store.manifests() if found.fields.get("environment") == here]
            for manifest in fitting[:PREFETCHED]:
                with contextlib.suppress(_Absent):
                    self.get(manifest.fields, _not_made)
        except Exception as error:  # whatever it is, the first call will meet it again and say so
            _LOG.info("prefetch ended early: %s", error)

    def _load(self, fields: dict[str, Any]) -> Artifact | str:
        """From the store; else why not."""
        start = time.perf_counter()
        store, key = self.store, digest(fields)
        if store is None:
            return self._fault
        try:
            manifest = store.manifest(key)
            if manifest is None:
                return _nearest(fields, store.manifests())
            for module, source in manifest.facts["sources"].items():
                importlib.import_module(module)
                if source_of(module) != source:
                    return f"the source of {module} changed"
            payload = store.payload(manifest)
            from torch._dynamo.convert_frame import compile_lock

            with compile_lock:
                run = torch.compiler.load_compiled_function(io.BytesIO(payload))
        except Exception as error:  # torch's deserializer raises anything: whatever it is, we compile
            _LOG.warning("an artifact could not be loaded: %s", error)
            return f"{type(error).__name__}: {error}".splitlines()[0]
        run.disable_guard_check()  # type: ignore[attr-defined]
        modules = tuple(manifest.facts["sources"])
        return Artifact(fields, run, modules, b"", len(payload), time.perf_counter() - start)


class _Absent(Unknown):
    """It is not in the store, and was not to be made."""


def _not_made(why: str) -> Artifact:
    raise _Absent(why)


def _nearest(fields: dict[str, Any], manifests: list[Manifest]) -> str:
    """The first differing fields against the entry that differs least."""
    differing = [_differences(fields, manifest.fields) for manifest in manifests]
    if not differing:
        return "the store is empty"
    nearest = min(differing, key=len)
    return ", ".join(nearest[:3]) + (f" and {len(nearest) - 3} more" if len(nearest) > 3 else "")


def _differences(here: Any, there: Any, at: str = "") -> list[str]:
    if isinstance(here, dict) and isinstance(there, dict):
        names = [*here, *(name for name in there if name not in here)]
        pairs = [(here.get(name), there.get(name), f"{at}.{name}".lstrip(".")) for name in names]
        return [line for one, other, name in pairs if one != other for line in _differences(one, other, name)]
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        triples = zip(here, there, range(len(here)), strict=True)
        return [line for a, b, index in triples if a != b for line in _differences(a, b, f"{at}[{index}]")]
    return [f"{at.removeprefix('environment.')} {_short(there)}, here {_short(here)}"]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """What kernels for this device depend on outside of the model, by name."""
    from torch._inductor.codecache import torch_key

    fluxfire = sys.modules["fluxfire"].__version__
    found: dict[str, Any] = {"python": platform.python_version(), "machine": f"{sys.platform} {platform.machine()}"}
    found |= {"torch": torch.__version__, "torch_sources": torch_key().hex()}
    found |= {name: _version(name) for name in ("triton", "diffusers", "torchao", "peft")} | {"fluxfire": fluxfire}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "gpu": properties.name}
        found |= {"capability": f"{properties.major}.{properties.minor}", "device": str(_with_index(device))}
    else:
        found |= {"device": str(device)} | _cpu()
    return found


def _with_index(device: torch.device) -> torch.device:
    return torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, str]:
    """The CPU's model, and a digest of its flags where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"cpu": platform.processor()}
    told = dict(reversed([line.split("\t: ", 1) for line in lines if "\t: " in line]))
    values = {name.strip(): value for name, value in told.items()}
    flags = " ".join(sorted(values.get("flags", values.get("Features", "")).split()))
    return {"cpu": values.get("model name", ""), "cpu_flags": hashlib.sha256(flags.encode()).hexdigest()[:16]}
