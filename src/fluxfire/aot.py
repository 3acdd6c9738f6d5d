"""Blocks compiled ahead of time: made once, kept by the mega-cache, and served only where they are known to be right.

torch traces and compiles a block's *class* forward, with the block itself as an input, so that one artifact serves all
blocks of a kind, in any process, at any size (`torch.compile(...).aot_compile`, torch >= 2.11). It happens at a block's
first call, with its real inputs: who misses compiles once, as without a mega-cache, and what was compiled is kept after
the first complete run. Batch 1 and batch >= 2 are two artifacts, as they are two graphs.

Such an artifact comes without Dynamo's guards, except those on sizes. This file is the guard; what it does not know
takes the traced path, counted and reported. In the place of each kind of guard that is dropped stands:

- guards on the block, its modules, parameters and attributes, their types and identities: the block's description is a
  part of the key, and a `Watch` looks before every call whether any object of it was replaced (`structure.py`);
- guards on classes, functions, modules and globals: sources and class attributes are a part of the key or checked at
  load; once a denoiser call the namespaces of all traced modules and classes are compared with what they were;
- guards on arguments: the data type, device, rank and sizes (0, 1 or more) of all tensors, which of them are one, and
  all other values are a part of the key; exact sizes that were not seen before are put to the guards on sizes;
- guards on torch's state: gradients, autocast and modes take the traced path; what else there is is a part of the key
  and read once a denoiser call (`graphs.torch_state`).

Beyond that, an artifact that meets a block's description and sizes for the first time runs beside the block's own
forward, and is used if it gives the same numbers within rounding. That costs one uncompiled block call.
"""

from __future__ import annotations

import inspect
import logging
import math
import operator
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from fluxfire.blocks import denoiser_of
from fluxfire.environment import environment
from fluxfire.graphs import clones, compile_ahead, distance, exact, kind, pattern, torch_state
from fluxfire.megacache import Artifact, MegaCache
from fluxfire.run import at_last_step
from fluxfire.stats import ArtifactStats
from fluxfire.store.manifest import digest
from fluxfire.structure import Unknown, Watch, describe, is_torchs

_LOG: Final = logging.getLogger(__name__)


# Kinds of artifacts that one pipeline compiles for one class of blocks: batch 1 and more, a LoRA or two. Who changes a
# number in each call, such as a LoRA's scale, is better served by a traced graph that takes it as an input.
LIMIT: Final = 8


class Blocks:
    """Serves the blocks of one denoiser; `around` and `around_denoiser` are put around their forward.

    Args:
        pipe: whose runs are followed; held weakly.
        cache: where artifacts come from.
        fields: what else artifacts must agree on: the denoiser's configuration, the options of the compilation.
        options: makes inductor's options anew for each compilation.
        dynamic: one artifact for all sizes.
    """

    def __init__(
        self,
        pipe: Any,
        cache: MegaCache,
        fields: Mapping[str, Any],
        options: Callable[[], dict[str, Any]],
        dynamic: bool,
    ) -> None:
        self._pipe, self._cache, self._options, self._dynamic = weakref.ref(pipe), cache, options, dynamic
        self._fields = dict(fields)
        self._lock = threading.RLock()
        self._local = threading.local()  # .state: torch's, of the denoiser call that is under way
        self._served: dict[str, dict[Any, Artifact | None]] = {}  # block's digest -> (state, inputs) -> None: traced
        self._artifacts: dict[int, Artifact] = {}  # those that this pipeline uses
        self._to_keep: list[Artifact] = []
        self._world: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {}  # namespaces, and what they were
        self._made: Counter[type] = Counter()
        self._counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._reasons: Counter[str] = Counter()
        self._group = ""  # what is compiled together, so that another process waits for all of it

    def serves(self, module: torch.nn.Module) -> bool:
        """Whether this is a block of the denoiser, and not the VAE's decoder."""
        return any(module is part for part in denoiser_of(self._pipe()).modules())

    def stats(self) -> ArtifactStats:
        """A snapshot of the counts."""
        counts, seconds = self._counts, self._seconds
        size = sum(artifact.kept_bytes for artifact in self._artifacts.values())
        told: dict[str, Any] = {name: counts[name] for name in ("hits", "misses", "kept", "served", "traced")}
        told |= {"bytes": size, "load_s": seconds["load"], "waited_s": seconds["waited"]}
        return ArtifactStats(**told, reasons=tuple(self._reasons.items()))

    def around(self, block: torch.nn.Module, traced: Callable[..., Any]) -> Callable[..., Any]:
        """What to put around the block's forward; `traced` is for what is not known. Inputs come in one form."""
        known = _Block(block)

        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                artifact, values = self._find(known, forward, args, kwargs)
            except Unknown as reason:
                self._reasons[f"traced: {reason}"] += 1
                artifact = None
            if artifact is None:
                self._counts["traced"] += 1
                return traced(*args, **kwargs)
            self._counts["served"] += 1
            return artifact.run(block, *values)

        return call

    def around_denoiser(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Reads torch's state and looks at the traced namespaces once for all blocks; keeps what a whole run used."""
        for name, (live, before) in self._world.items():
            if not _unchanged(live, before):
                self._reasons[f"tried again: {name} changed"] += 1
                self._world.clear()
                self._served.clear()
                break
        self._local.state = torch_state()
        try:
            out = forward(*args, **kwargs)
        except BaseException:
            self._cache.release(self._group)
            raise
        finally:
            self._local.state = None
        if self._group and at_last_step(getattr(self._pipe(), "scheduler", None)):
            with self._lock:
                artifacts, self._to_keep = self._to_keep, []
            self._counts["kept"] += sum(map(self._cache.keep, artifacts))
            self._cache.release(self._group)
        return out

    def _find(self, known: _Block, forward: Any, args: Any, kwargs: Any) -> tuple[Artifact | None, list[Any]]:
        values = known.bind(args, kwargs)
        state = getattr(self._local, "state", None) or torch_state()
        if isinstance(state, str):
            raise Unknown(state)
        seen: list[int] = []
        inputs = (state, tuple([exact(value, seen) for value in values]), pattern(seen))
        if known.watch is None or not known.watch.unchanged():
            with self._lock:
                known.look(_device(values))
        if known.description is None:
            raise Unknown(known.reason)
        artifact: Any = self._served.get(known.digest, {}).get(inputs, ...)
        if artifact is ...:
            with self._lock:  # one thread makes, others wait
                served = self._served.setdefault(known.digest, {})
                if inputs not in served:
                    served[inputs] = self._resolve(known, forward, values, dict(state))
                artifact = served[inputs]
        return artifact, values

    def _resolve(self, known: _Block, forward: Any, values: list[Any], state: dict[str, Any]) -> Artifact | None:
        """The artifact for this block and these inputs, tried on them; None for the traced path, the reason counted."""
        try:
            seen: list[int] = []
            kinds = [kind(value, self._dynamic, seen) for value in values]
            fields = {"environment": environment(_device(values)), **self._fields, "state": state}
            fields |= {"threads": torch.get_num_threads() if _device(values).type == "cpu" else None}
            fields |= {"block": known.description, "inputs": [*kinds, list(pattern(seen))]}
            artifact = self._get(fields, known.block, values)
            self._try(artifact, known.block, forward, values)
        except Unknown as reason:
            self._reasons[f"traced: {reason}"] += 1
            return None
        for module in artifact.modules:
            names = vars(sys.modules[module])
            self._world[module] = (names, dict(names))
        for cls in known.classes:
            if not is_torchs(cls.__module__):
                self._world[f"{cls.__module__}.{cls.__qualname__}"] = (vars(cls), dict(vars(cls)))
        return artifact

    def _get(self, fields: dict[str, Any], block: torch.nn.Module, values: list[Any]) -> Artifact:
        start, made = time.perf_counter(), False

        def make(why: str) -> Artifact:
            nonlocal made
            made = True
            self._seconds["waited"] += time.perf_counter() - start
            if self._made[type(block)] >= LIMIT:
                raise Unknown(f"{LIMIT} artifacts of {type(block).__name__} were compiled here already")
            self._made[type(block)] += 1
            self._reasons[f"compiled: {why}"] += 1
            return compile_ahead(fields, block, values, self._options(), self._dynamic)

        self._group = digest({"environment": fields["environment"], **self._fields})
        artifact = self._cache.get(fields, make, self._group)
        if made:
            self._to_keep.append(artifact)
        else:
            self._seconds["waited"] += time.perf_counter() - start
        if id(artifact) not in self._artifacts:
            self._artifacts[id(artifact)] = artifact
            self._counts["misses" if made else "hits"] += 1
            self._seconds["load"] += artifact.load_s
        return artifact

    def _try(self, artifact: Artifact, block: torch.nn.Module, forward: Callable[..., Any], values: list[Any]) -> None:
        """Claims that the artifact gives for these values what the block gives."""
        if not artifact.run.guard_check(block, *values):
            raise Unknown("sizes outside of those that the artifact was compiled for")
        try:
            wanted = forward(*clones(values))
            error = distance(artifact.run(block, *clones(values)), wanted, values)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            error, why = math.inf, f"the artifact failed: {type(failure).__name__}: {failure}".splitlines()[0]
        else:
            why = f"the artifact's numbers are not the block's: {error:.2g} times what rounding explains"
        if not error <= 1:
            if not artifact.trusted:
                self._cache.forget(artifact.fields, remove=True)
            self._to_keep = [other for other in self._to_keep if other is not artifact]
            _LOG.warning("%s: %s", type(block).__name__, why)
            raise Unknown(why)
        artifact.trusted = True


class _Block:
    """One block: its arguments in their order, its description, and what watches that it still holds."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.block = block
        self.watch: Watch | None = None
        self.description: dict[str, Any] | None = None
        self.digest = self.reason = ""
        self.classes: set[type] = set()
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
        self._defaults = {parameter.name: parameter.default for parameter in parameters}
        self._fixed = all(parameter.kind == parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments by position."""
        values = {**self._defaults, **dict(zip(self._defaults, args, strict=False)), **kwargs}
        if not self._fixed or len(values) != len(self._defaults) or len(args) > len(values):
            raise Unknown(f"{type(self.block).__name__}.forward was called with arguments that it does not name")
        return list(values.values())

    def look(self, device: torch.device) -> None:
        """Describes the block as it is now."""
        self.watch = Watch(self.block)
        self.classes = self.watch.classes
        try:
            self.description = describe(self.block, device)
            self.digest = digest(self.description)
        except Unknown as reason:
            self.description, self.reason = None, str(reason)


def _device(values: list[Any]) -> torch.device:
    return next(value for value in values if isinstance(value, torch.Tensor)).device


def _unchanged(live: Mapping[str, Any], before: dict[str, Any]) -> bool:
    return len(live) == len(before) and all(map(operator.is_, map(live.get, before), before.values()))
