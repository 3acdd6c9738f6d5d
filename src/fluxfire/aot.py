"""Blocks compiled ahead of time: made once, kept by the mega-cache, and served only where they are known to be right.

torch traces and compiles a block's *class* forward, with the block itself as an input, so that one artifact serves all
blocks of a kind, in any process, at any size (`torch.compile(...).aot_compile`, torch >= 2.11). It happens at a block's
first call, with its real inputs: who misses compiles once, as without a mega-cache, and what was compiled is kept after
the first complete run. Batch 1 and batch >= 2 are two artifacts, as they are two graphs.

Such an artifact comes without Dynamo's guards, except those on sizes. This file is the guard; what it does not know takes
the traced path, counted and reported. In the place of each kind of guard that is dropped (`DROPPED`) stands:

- guards on the block, its modules, parameters and attributes, their types and identities: the block's description is a
  part of the key, and a `Watch` looks before every call whether any object of it was replaced (`structure.py`);
- guards on classes, functions, modules and globals: sources and class attributes are a part of the key or checked at
  load; once a denoiser call the namespaces of all traced modules and classes are compared with what they were;
- guards on arguments: the data type, device, rank and sizes (0, 1 or more) of all tensors, which of them are one, and all
  other values are a part of the key; exact sizes that were not seen before are put to the guards on sizes;
- guards on torch's state: gradients, autocast and modes take the traced path; what else there is is a part of the key and
  read once a denoiser call (`_state`).

Beyond that, an artifact that meets a block's description and sizes for the first time runs beside the block's own forward,
and is used if it gives the same numbers within rounding. That costs one uncompiled block call.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch

from fluxfire.megacache import Artifact, MegaCache, environment
from fluxfire.run import at_last_step
from fluxfire.stats import ArtifactStats
from fluxfire.store.manifest import digest
from fluxfire.structure import Unknown, Watch, describe, is_torchs

_LOG: Final = logging.getLogger(__name__)

KEPT: Final = frozenset({"SHAPE_ENV"})  # needs nothing but the arguments' sizes
# Kinds of Dynamo's guards that the checks above stand for; an artifact with any other is not used.
DROPPED: Final = frozenset(
    "AUTOGRAD_SAVED_TENSORS_HOOKS BOOL_MATCH BUILTIN_MATCH CLASS_MATCH CLOSURE_MATCH CONSTANT_MATCH DEFAULT_DEVICE "
    "DETERMINISTIC_ALGORITHMS DICT_CONTAINS DICT_KEYS_MATCH DICT_NOT_CONTAINS DUPLICATE_INPUT EMPTY_NN_MODULE_HOOKS_DICT "
    "EQUALS_MATCH FUNCTION_MATCH GLOBAL_STATE GRAD_MODE HASATTR ID_MATCH MAPPING_KEYS_CHECK MODULE_MATCH NONE_MATCH "
    "NOT_NONE_MATCH NOT_PRESENT_IN_GENERIC_DICT SEQUENCE_LENGTH SET_CONTAINS SET_NOT_CONTAINS TENSOR_MATCH "
    "TENSOR_SUBCLASS_METADATA_MATCH TORCH_FUNCTION_STATE TUPLE_ITERATOR_LEN TYPE_MATCH".split()
)
# Two computations of a block may differ by this share of what the block adds to its input, and by an ulp of the output.
TOLERANCE: Final = {torch.float16: 0.1, torch.bfloat16: 0.1, torch.float32: 1e-2, torch.float64: 1e-6}


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
        self._world: dict[int, tuple[Mapping[str, Any], dict[str, Any]]] = {}  # namespaces, and what they were
        self._counts: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def stats(self) -> ArtifactStats:
        """A snapshot of the counts."""
        counts, seconds = self._counts, self._seconds
        size = sum(artifact.kept_bytes for artifact in self._artifacts.values())
        numbers = (counts[name] for name in ("hits", "misses", "kept", "served", "traced"))
        return ArtifactStats(*numbers, size, seconds["load"], seconds["waited"], tuple(self._reasons.items()))

    def around(self, block: torch.nn.Module, traced: Callable[..., Any]) -> Callable[..., Any]:
        """What to put around the block's forward; `traced` is for what is not known. Inputs come in one form."""
        known = _Block(block)

        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                artifact, values = self._find(known, forward, args, kwargs)
            except Unknown as reason:
                self._reasons[str(reason)] += 1
                artifact = None
            if artifact is None:
                self._counts["traced"] += 1
                return traced(*args, **kwargs)
            self._counts["served"] += 1
            return artifact.run(block, *values)

        return call

    def around_denoiser(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Reads torch's state and looks at the traced namespaces once for all blocks; keeps what a whole run used."""
        if any(live != before for live, before in self._world.values()):
            self._world.clear()
            self._served.clear()  # everything is put to the test again
        self._local.state = _state()
        try:
            out = forward(*args, **kwargs)
        finally:
            self._local.state = None
        if self._to_keep and (pipe := self._pipe()) and at_last_step(pipe.scheduler):
            with self._lock:
                artifacts, self._to_keep = self._to_keep, []
            self._counts["kept"] += sum(map(self._cache.keep, artifacts))
        return out

    def _find(self, known: _Block, forward: Any, args: Any, kwargs: Any) -> tuple[Artifact | None, list[Any]]:
        values = known.bind(args, kwargs)
        state = getattr(self._local, "state", None) or _state()
        if isinstance(state, str):
            raise Unknown(state)
        seen: list[int] = []
        inputs = (state, tuple([_exact(value, seen) for value in values]), _pattern(seen))
        if known.watch is None or not known.watch.unchanged():
            with self._lock:
                known.look(next(value for value in values if isinstance(value, torch.Tensor)).device)
        if known.description is None:
            raise Unknown(known.reason)
        served = self._served.get(known.digest)
        if served is None or inputs not in served:
            with self._lock:  # one thread makes, others wait
                served = self._served.setdefault(known.digest, {})
                if inputs not in served:
                    served[inputs] = self._resolve(known, forward, values, dict(state))
        return served[inputs], values

    def _resolve(self, known: _Block, forward: Any, values: list[Any], state: dict[str, Any]) -> Artifact | None:
        """The artifact for this block and these inputs, tried on them; None: the traced path, with the reason counted."""
        try:
            device = next(value for value in values if isinstance(value, torch.Tensor)).device
            seen: list[int] = []
            kinds = [_kind(value, self._dynamic, seen) for value in values]
            fields = {"environment": environment(device), **self._fields, "state": state, "block": known.description}
            artifact = self._get(fields | {"inputs": [*kinds, list(_pattern(seen))]}, known.block, values)
            self._try(artifact, known.block, forward, values)
        except Unknown as reason:
            self._reasons[str(reason)] += 1
            return None
        for module in artifact.modules:
            self._watch_namespace(module)
        for cls in known.classes:
            if not is_torchs(cls.__module__):
                self._world[id(cls)] = (vars(cls), dict(vars(cls)))
        return artifact

    def _watch_namespace(self, module: str) -> None:
        import sys

        names = vars(sys.modules[module])
        self._world[id(names)] = (names, dict(names))

    def _get(self, fields: dict[str, Any], block: torch.nn.Module, values: list[Any]) -> Artifact:
        start, made = time.perf_counter(), False

        def make(why: str) -> Artifact:
            nonlocal made, start
            made = True
            self._seconds["waited"] += time.perf_counter() - start
            self._reasons[f"compiled: {why}"] += 1
            return _compile(fields, block, values, self._options(), self._dynamic)

        artifact = self._cache.get(fields, make)
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
            wanted = forward(*_clones(values))
            error = _error(artifact.run(block, *_clones(values)), wanted, values)
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
        values = self._defaults | dict(zip(self._defaults, args, strict=False)) | kwargs
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


def _compile(
    fields: dict[str, Any], block: torch.nn.Module, values: list[Any], options: dict[str, Any], dynamic: bool
) -> Artifact:
    """Compiles the block's class forward with these values.

    Raises:
        Unknown: torch cannot compile or serialize it.
    """
    options["guard_filter_fn"] = _keep_guards_on_sizes
    start = time.perf_counter()
    try:
        with _settings():
            forward = torch.compile(type(block).forward, fullgraph=True, dynamic=dynamic, options=options)
            run = forward.aot_compile(((block, *values), {}))  # type: ignore[attr-defined]
            payload = type(run).serialize(run).serialized_data
    except (torch.OutOfMemoryError, Unknown):
        raise
    except Exception as error:  # torch raises anything here; traced, it is compiled or raised again
        reason = f"cannot be compiled ahead of time: {type(error).__name__}: {error}".splitlines()[0]
        _LOG.warning("%s %s", type(block).__name__, reason)
        raise Unknown(reason) from error
    run.disable_guard_check()
    modules = {source.module for source in run.source_info().inlined_sources}
    traced = tuple(sorted(module for module in modules if not is_torchs(module)))
    _LOG.info("%s compiled ahead of time in %.1f s", type(block).__name__, time.perf_counter() - start)
    return Artifact(fields, run, traced, payload, len(payload))


@contextmanager
def _settings() -> Any:
    import torch._dynamo.config as dynamo
    from torch._dynamo.convert_frame import compile_lock

    # A symbolic float makes tracing begin anew, in a way that compilation ahead of time does not know.
    with compile_lock, dynamo.patch(enable_aot_compile=True, specialize_float=True):  # type: ignore[attr-defined]
        yield


def _keep_guards_on_sizes(guards: Any) -> list[bool]:
    if unknown := {guard.guard_type for guard in guards} - KEPT - DROPPED:
        raise Unknown(f"depends on what fluxfire does not check: {', '.join(sorted(unknown))}")
    return [guard.guard_type in KEPT for guard in guards]


def _state() -> tuple[tuple[str, Any], ...] | str:
    """Torch's settings that graphs depend on; or why no graph made ahead of time is to be used now."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a mode of torch is on (torch.set_default_device is one)"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are global module hooks"
    sdp = torch.backends.cuda
    kernels = (
        sdp.flash_sdp_enabled(),
        sdp.mem_efficient_sdp_enabled(),
        sdp.math_sdp_enabled(),
        sdp.cudnn_sdp_enabled(),
    )
    return (
        ("inference_mode", torch.is_inference_mode_enabled()),
        ("matmul_precision", torch.get_float32_matmul_precision()),
        ("deterministic", torch.are_deterministic_algorithms_enabled()),
        ("dtype", str(torch.get_default_dtype())),
        ("threads", torch.get_num_threads()),
        ("sdp", "".join("01"[on] for on in kernels)),
        ("attention", _attention_backend()),
    )


def _attention_backend() -> str:
    """Diffusers' process-wide backend, for processors without one of their own."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return str(_AttentionBackendRegistry.get_active_backend()[0].value)


def _exact(value: Any, seen: list[int]) -> Any:
    """The value as a graph sees it, to be compared; collects the tensors' identities."""
    if type(value) is torch.Tensor:
        seen.append(id(value))
        if value.requires_grad or value.layout != torch.strided:
            raise Unknown("a tensor that requires a gradient, or is sparse")
        return (value.shape, value.dtype, value.device)
    if value is None or isinstance(value, bool | int | float | str):
        return (type(value), value)
    if isinstance(value, list | tuple):
        return (type(value), tuple([_exact(item, seen) for item in value]))
    if isinstance(value, dict):
        return tuple([(name, _exact(item, seen)) for name, item in value.items()])
    raise Unknown(f"an argument of type {type(value).__qualname__}")


def _kind(value: Any, dynamic: bool, seen: list[int]) -> Any:
    """The value as far as an artifact is made for it, in JSON: sizes are 0, 1 or more."""
    if isinstance(value, torch.Tensor):
        seen.append(id(value))
        sizes = [min(size, 2) if dynamic else size for size in value.shape]
        return [str(value.dtype), str(value.device), sizes]
    if isinstance(value, int) and not isinstance(value, bool):
        return min(value, 2) if dynamic else value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_kind(item, dynamic, seen) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[str(name), _kind(item, dynamic, seen)] for name, item in value.items()]}
    return repr(value) if isinstance(value, float) else value


def _pattern(seen: list[int]) -> tuple[int, ...]:
    """Which tensors are one, where any are."""
    return () if len(set(seen)) == len(seen) else tuple(map(seen.index, seen))


def _clones(value: Any) -> Any:
    """The same values in tensors of their own: what a block writes into stays as it was."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(map(_clones, value))
    return {name: _clones(item) for name, item in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _error(got: Any, wanted: Any, inputs: list[Any]) -> float:
    """The largest difference of two results, in units of what rounding explains; inf where they are not alike."""
    outputs, references = _tensors(got), _tensors(wanted)
    if [(o.shape, o.dtype) for o in outputs] != [(r.shape, r.dtype) for r in references] or not outputs:
        return math.inf
    errors = []
    for output, reference in zip(outputs, references, strict=True):
        exact = reference.double() if reference.device.type == "cpu" else reference.float()
        bases = [tensor for tensor in _tensors(inputs) if tensor.shape == reference.shape]
        added = [(exact - base).norm() for base in bases] + [exact.norm()]
        allowed = TOLERANCE.get(reference.dtype, 0.0) * torch.stack(added).min()
        allowed = allowed + torch.finfo(reference.dtype).eps * exact.norm()
        errors.append(((output - exact).norm() / allowed.clamp_min(1e-30)).item())
    return max(errors) if not any(map(math.isnan, errors)) else math.inf
