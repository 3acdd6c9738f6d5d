"""What a graph made ahead of time was made for: compiling it, torch's settings, and inputs as a graph sees them.

`aot.py` says what each of these stands for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from fluxfire.megacache import Artifact
from fluxfire.structure import Unknown, is_torchs, source_of

_LOG: Final = logging.getLogger(__name__)

KEPT: Final = frozenset({"SHAPE_ENV"})  # needs nothing but the arguments' sizes
_DROPPED: Final = """
    AUTOGRAD_SAVED_TENSORS_HOOKS BOOL_MATCH BUILTIN_MATCH CLASS_MATCH CLOSURE_MATCH CONSTANT_MATCH DEFAULT_DEVICE
    DETERMINISTIC_ALGORITHMS DICT_CONTAINS DICT_KEYS_MATCH DICT_NOT_CONTAINS DUPLICATE_INPUT
    EMPTY_NN_MODULE_HOOKS_DICT EQUALS_MATCH FUNCTION_MATCH GLOBAL_STATE GRAD_MODE HASATTR ID_MATCH
    MAPPING_KEYS_CHECK MODULE_MATCH NONE_MATCH NOT_NONE_MATCH NOT_PRESENT_IN_GENERIC_DICT SEQUENCE_LENGTH
    SET_CONTAINS SET_NOT_CONTAINS TENSOR_MATCH TENSOR_SUBCLASS_METADATA_MATCH TORCH_FUNCTION_STATE
    TUPLE_ITERATOR_LEN TYPE_MATCH
"""
# Kinds of Dynamo's guards that the checks of `aot.py` stand for; an artifact with any other is not used.
DROPPED: Final = frozenset(_DROPPED.split())
# Two computations of a block may differ by this share of what the block adds to its input, and by an ulp of the output.
TOLERANCE: Final = {torch.float16: 0.1, torch.bfloat16: 0.1, torch.float32: 1e-2, torch.float64: 1e-6}


def compile_ahead(
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
    for module in traced:
        source_of(module)  # what cannot be told from its next version is not kept
    _LOG.info("%s compiled ahead of time in %.1f s", type(block).__name__, time.perf_counter() - start)
    return Artifact(fields, run, traced, payload, len(payload))


@contextmanager
def _settings() -> Iterator[None]:
    import torch._dynamo.config as dynamo
    from torch._dynamo.convert_frame import compile_lock

    # A symbolic float makes tracing begin anew, in a way that compilation ahead of time does not know.
    with compile_lock, dynamo.patch(enable_aot_compile=True, specialize_float=True):
        yield


def _keep_guards_on_sizes(guards: Any) -> list[bool]:
    if unknown := {guard.guard_type for guard in guards} - KEPT - DROPPED:
        raise Unknown(f"depends on what fluxfire does not check: {', '.join(sorted(unknown))}")
    return [guard.guard_type in KEPT for guard in guards]


def torch_state() -> tuple[tuple[str, Any], ...] | str:
    """Torch's settings that graphs depend on; or why no graph made ahead of time is to be used now."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a mode of torch is on (torch.set_default_device is one)"
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "there are global module hooks"
    sdp = [getattr(torch._C, f"_get_{kernel}_sdp_enabled")() for kernel in ("flash", "mem_efficient", "math", "cudnn")]
    return (
        ("inference_mode", torch.is_inference_mode_enabled()),
        ("matmul_precision", torch.get_float32_matmul_precision()),
        ("deterministic", torch.are_deterministic_algorithms_enabled()),
        ("dtype", str(torch.get_default_dtype())),
        ("sdp", "".join("01"[on] for on in sdp)),
        ("attention", _attention_backend()),
    )


def _attention_backend() -> str:
    """Diffusers' process-wide backend, for processors without one of their own."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return str(_AttentionBackendRegistry.get_active_backend()[0].value)


def exact(value: Any, seen: list[int]) -> Any:
    """The value as a graph sees it, to be compared; collects the tensors' identities."""
    if type(value) is torch.Tensor:
        seen.append(id(value))
        if value.requires_grad or value.layout != torch.strided:
            raise Unknown("a tensor that requires a gradient, or is sparse")
        return (value.shape, value.dtype, value.device)
    if value is None or isinstance(value, bool | int | float | str):
        return (type(value), value)
    if isinstance(value, list | tuple):
        return (type(value), tuple([exact(item, seen) for item in value]))
    if isinstance(value, dict):
        return tuple([(name, exact(item, seen)) for name, item in value.items()])
    raise Unknown(f"an argument of type {type(value).__qualname__}")


def kind(value: Any, dynamic: bool, seen: list[int]) -> Any:
    """The value as far as an artifact is made for it, in JSON: sizes are 0, 1 or more."""
    if isinstance(value, torch.Tensor):
        seen.append(id(value))
        sizes = [min(size, 2) if dynamic else size for size in value.shape]
        return [str(value.dtype), str(value.device), sizes]
    if isinstance(value, int) and not isinstance(value, bool):
        return min(value, 2) if dynamic else value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [kind(item, dynamic, seen) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[str(name), kind(item, dynamic, seen)] for name, item in value.items()]}
    return repr(value) if isinstance(value, float) else value


def pattern(seen: list[int]) -> tuple[int, ...]:
    """Which tensors are one, where any are."""
    return () if len(set(seen)) == len(seen) else tuple(map(seen.index, seen))


def clones(value: Any) -> Any:
    """The same values in tensors of their own: what a block writes into stays as it was."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(map(clones, value))
    return {name: clones(item) for name, item in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def distance(got: Any, wanted: Any, inputs: list[Any]) -> float:
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
