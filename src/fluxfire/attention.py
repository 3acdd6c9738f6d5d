"""The attention backend: which kernel computes softmax(Q K^T) V.

At 1024x1024 attention is a fifth of a FLUX.1 step's arithmetic, at 2048x2048 more than half. torch picks one of its
kernels by its own order; this step picks by name, or by measuring (`backend="auto"`). What there is:

- "native": torch's own choice. "cudnn", "flash", "efficient", "math": one of its kernels by name.
- "fa3", "fa4": FlashAttention-3 and -4 behind torch's flash kernel (torch >= 2.11). torch activates them for the whole
  process; here only while this pipeline's denoiser runs. FA4: `pip install --pre flash-attn-4`.
- "sage": SageAttention, 8-bit products (https://github.com/thu-ml/SageAttention). Approximate, so never by itself.

"auto" measures at the first denoiser call, on random tensors of its device, data type and shape (about 50 ms, once):
those kernels that are installed, take this shape and are as exact as native. Another than native is taken when it is
more than 3 % faster, so that equal ones do not change from process to process, and graphs with them. What it found is
in the report. On a CPU there is one kernel to choose from.

The choice stands on this denoiser's attention processors, where diffusers and torch's guards read it: a graph for each
backend. diffusers' `set_attention_backend` sets one for the whole process too.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch

import fluxfire.fa4 as fa4
from fluxfire.blocks import denoiser_of
from fluxfire.errors import ArgumentError
from fluxfire.linear import DTYPES
from fluxfire.patches import applying
from fluxfire.plan import Handle, Step
from fluxfire.sage import AS_OPERATOR

BACKENDS: Final = {  # ours: diffusers'
    "native": "native",
    "cudnn": "_native_cudnn",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "math": "_native_math",
    "fa3": "_native_flash",
    "fa4": "_native_flash",
    "sage": "sage",
}
APPROXIMATE: Final = frozenset({"sage"})
CANDIDATES: Final = ("native", "cudnn", "flash", "fa3", "fa4")  # of "auto", on CUDA
FASTER: Final = 0.97  # of native's time: closer than that is noise

IMPLEMENTATIONS: Final = {  # of torch's flash kernel: (torch's name, the module that brings it, how to get that)
    "fa3": ("FA3", "flash_attn_interface", "build it from https://github.com/Dao-AILab/flash-attention, folder hopper"),
    "fa4": (fa4.NAME, "flash_attn.cute", "pip install --pre flash-attn-4"),
}

_QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionStats:
    """The backend in use, and why it was chosen."""

    backend: str
    why: str


def check_attention(pipe: Any, backend: str = "auto") -> str | None:
    """Why `apply_attention` with this backend would refuse this pipeline, or None.

    Raises:
        ArgumentError: no backend of that name.
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_attention(pipe, "native")
    """
    if backend not in ("auto", *BACKENDS):
        raise ArgumentError(f'backend: found {backend!r}, needed "auto" or one of {", ".join(map(repr, BACKENDS))}')
    denoiser = denoiser_of(pipe)
    modules = _attentions(denoiser)
    if not modules:
        return f"found no attention processor in {type(denoiser).__name__} that takes a backend: leave attention out"
    if any(getattr(module.processor, "_parallel_config", None) for module in modules):
        return "found diffusers' enable_parallelism(), which needs its own choice of backend: leave attention out"
    if backend in ("auto", "native"):
        return None
    if missing := _missing(backend):
        return missing
    weight = next(denoiser.parameters())
    device = torch.accelerator.current_accelerator(check_available=True) if weight.device.type == "cpu" else None
    heads, size = _heads(modules[0])
    # Quantized and cast weights are in another type than what is computed in.
    dtype = next((p.dtype for p in denoiser.parameters() if p.dtype in DTYPES), weight.dtype)
    try:
        with _trying(backend):
            _attend(backend, _random((1, 128, heads, size), device or weight.device, dtype))
    except Exception as error:  # a kernel raises anything for what it does not take
        what = f"{heads} heads of {size} channels in {dtype} on {device or weight.device}"
        return f'found that "{backend}" does not take {what} ({str(error).partition(chr(10))[0]}): use backend="auto"'
    return None


def apply_attention(pipe: Any, backend: str = "auto") -> Any:
    """Chooses the attention kernel of this pipeline's denoiser. Lossless.

    "sage" is approximate; the report says so.

    Args:
        pipe: a FLUX pipeline, changed in place.
        backend: "auto", or by name: "native", "cudnn", "flash", "efficient", "math", "fa3", "fa4", "sage".

    Returns:
        The same pipe.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.

    Examples:
        >>> image = fluxfire.apply_attention(pipe, "auto")(**prompt).images
        >>> dict(fluxfire.report(pipe).other)["attention"].backend
        'native'
    """
    kind = "approximate" if backend in APPROXIMATE else "lossless"
    reason = check_attention(pipe, backend)
    with applying(pipe, Step("attention", kind, (("backend", backend),)), reason) as handle:
        state = Attention(handle, backend)
        if backend == "sage":
            AS_OPERATOR.hold(handle)
        handle.patch.wrap(handle.denoiser, "forward", state.around_denoiser)
        handle.states["attention"] = state
    return pipe


class Attention:
    """The backend of one denoiser: chosen at the first call, put on its processors, also on new ones."""

    def __init__(self, handle: Handle, backend: str) -> None:
        self._handle, self._backend = handle, backend
        self._why = "" if backend != "auto" else "to be measured at the first call"
        self._attentions = _attentions(handle.denoiser)  # found once: a walk over all modules takes a millisecond
        self._known: dict[int, Any] = {}  # processors that have been given the backend, by id, which they keep taken

    def stats(self) -> AttentionStats:
        """A snapshot."""
        return AttentionStats(self._backend, self._why)

    def around_denoiser(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Chooses, looks whether every processor has it (an IP-Adapter brings new ones), and calls on."""
        from diffusers.models.attention_dispatch import AttentionBackendName

        if self._backend == "auto":
            call = inspect.signature(forward).bind(*args, **kwargs).arguments
            self._backend, self._why = _fastest(*_shape(self._attentions[0], call))
        name = AttentionBackendName(BACKENDS[self._backend])
        for processor in (attention.processor for attention in self._attentions):
            if not hasattr(processor, "_attention_backend"):
                continue  # of somebody's own, put there meanwhile
            # None also where `tune` took back what was put while it ran.
            if processor._attention_backend is None or id(processor) not in self._known:
                self._handle.patch.set(processor, "_attention_backend", name)
                self._known[id(processor)] = processor
        with _implementation(self._backend):
            return forward(*args, **kwargs)


def _attentions(denoiser: Any) -> list[Any]:
    """The modules whose processor takes a backend."""
    return [part for part in denoiser.modules() if hasattr(getattr(part, "processor", None), "_attention_backend")]


def _heads(attention: Any) -> tuple[int, int]:
    """Heads and channels of each."""
    size = getattr(attention, "head_dim", None) or attention.inner_dim // attention.heads
    return attention.heads, size


def _missing(backend: str) -> str | None:
    """What is to be installed for this backend, or None."""
    if backend in IMPLEMENTATIONS:
        name, module, how = IMPLEMENTATIONS[backend]
        parts = itertools.accumulate(module.split("."), "{}.{}".format)
        found = next((part for part in parts if not _spec(part)), None)
        if name not in fa4.register():
            return f'found torch {torch.__version__}, needed torch >= 2.11 for "{backend}": use "auto"'
        return found and f'found no {module}, needed for "{backend}": {how}'
    if backend == "sage" and not _spec("sageattention"):
        return 'found no sageattention, needed for "sage": pip install "sageattention>=2.1.1"'
    return None


def _spec(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def _implementation(backend: str) -> Iterator[None]:
    """FlashAttention-3 or -4 behind torch's flash kernel, as long as this lasts; then what was there before."""
    if backend not in IMPLEMENTATIONS:
        yield
        return
    before, wanted = torch.nn.attention.current_flash_attention_impl(), IMPLEMENTATIONS[backend][0]
    if before != wanted:
        torch.nn.attention.activate_flash_attention_impl(wanted)
    try:
        yield
    finally:
        if before is None:
            torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        elif before != wanted:
            torch.nn.attention.activate_flash_attention_impl(before)


@contextmanager
def _trying(backend: str) -> Iterator[None]:
    with warnings.catch_warnings(), _implementation(backend):
        warnings.simplefilter("ignore")  # torch tells of every kernel that does not fit
        yield


def _attend(backend: str, qkv: _QKV) -> torch.Tensor:
    """What diffusers computes with this backend: three (B, L, heads, channels) -> one."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    with torch.no_grad():
        out: torch.Tensor = dispatch_attention_fn(*qkv, backend=AttentionBackendName(BACKENDS[backend]))
    return out


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> _QKV:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    return q, k, v


def _shape(attention: Any, call: Mapping[str, Any]) -> tuple[tuple[int, ...], torch.device, torch.dtype]:
    """Of queries in the denoiser call with these arguments: (B, all tokens, heads, channels)."""
    x = call["hidden_states"]
    tokens = sum(value.shape[1] for name, value in call.items() if name.endswith("hidden_states") and value is not None)
    return (x.shape[0], tokens, *_heads(attention)), x.device, x.dtype


def _fastest(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that "auto" means for this shape, and why."""
    if device.type != "cuda":
        return "native", f"the one there is on {device.type}"
    times, errors = measure(shape, device, dtype)
    if "native" not in times:
        return "native", "not measured: it failed beside the model, as where memory is short"
    told = ", ".join(f"{name} {ms:.3f}" for name, ms in times.items())
    return choose(times, errors), f"measured, ms at {shape[1]} tokens x {shape[0]}: {told}"


def choose(times: Mapping[str, float], errors: Mapping[str, float]) -> str:
    """The fastest backend that is as exact as native, or native where none is clearly faster."""
    right = {name: ms for name, ms in times.items() if errors[name] <= 1.1 * errors["native"]}
    best = min(right, key=right.__getitem__)
    return best if right[best] < FASTER * right["native"] else "native"


def measure(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, candidates: tuple[str, ...] = CANDIDATES
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds and relative error of one attention with each backend that takes it.

    Args:
        shape: of queries, keys and values: (B, L, heads, channels).
        device: where.
        dtype: of the tensors.
        candidates: backends by name; what is not installed, or does not take the shape, is left out.
    """
    qkv = _random(shape, device, dtype)
    rows = min(shape[1], 128)  # the float32 reference of all rows would take gigabytes
    q, k, v = (tensor.float().transpose(1, 2) for tensor in qkv)
    scores = (q[:, :, :rows] @ k.transpose(2, 3) * shape[3] ** -0.5).softmax(-1)
    reference = (scores @ v).transpose(1, 2)
    times: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name in candidates:
        if _missing(name):
            continue
        with contextlib.suppress(Exception), _trying(name):
            out = _attend(name, qkv)[:, :rows].float()
            error = ((out - reference).norm() / reference.norm()).item()
            times[name], errors[name] = _milliseconds(name, qkv), error
    return times, errors


def _milliseconds(backend: str, qkv: _QKV, repeats: int = 10) -> float:
    """Of one call, the least of three rounds."""
    wait: Callable[[], None] = torch.accelerator.synchronize if qkv[0].device.type != "cpu" else lambda: None
    rounds = []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            _attend(backend, qkv)
        wait()
        rounds.append(time.perf_counter() - start)
    return min(rounds) / repeats * 1e3
