"""Prompts: what text encoders made of a prompt is remembered, and the encoders may wait in host memory.

A FLUX pipeline encodes its prompt in every call: with FLUX.1 9 GiB of CLIP and T5 weights for one pass of 512 tokens.
The same prompt gives the same numbers, so those of the last prompts are kept (4 MB each in bfloat16): a gallery of
seeds, an edit of many pictures and a server's favourites run no encoder at all.

With encoders="cpu" their weights are on the accelerator only while they run: 9 GiB less for the rest of a picture, and
what a new prompt costs is their way over the bus. It is `apply_offload(pipe, "model")` for those parts alone; the
denoiser stays where it is. Their forward brings them, so pipelines that share the encoders work as before.

Remembered is by all that `encode_prompt` is given, the device, and FLUX.2's system message. Other encoders, tokenizers
and weights forget all: 32 numbers of each weight are compared, since peft fuses a LoRA without a trace in torch's
versions. While an adapter is in an encoder nothing is remembered; tensors among the arguments (prompt embeddings of
one's own), gradients, autocast and training mode pass by.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from fluxfire.blocks import denoiser_of, offload_hook, tensors_in
from fluxfire.errors import ArgumentError
from fluxfire.patches import applying
from fluxfire.plan import Step

ENCODERS: Final = ("stay", "cpu")
# One at a time: a tokenizer keeps how it pads from call to call, so that threads would get each other's lengths.
_ENCODING: Final = threading.RLock()


@dataclass(frozen=True, slots=True)
class PromptStats:
    """Calls of `encode_prompt` answered from memory and by the encoders, what is kept, journeys of the encoders."""

    remembered: int
    encoded: int
    kept: int
    kept_bytes: int
    brought: int


def check_prompts(pipe: Any, *, entries: int = 16, encoders: str = "stay") -> str | None:
    """Why `apply_prompts` with these arguments would refuse this pipeline, or None.

    Raises:
        ArgumentError: an argument that no pipeline could take.
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_prompts(pipe)
        'found no text encoder in FluxPipeline, needed one: leave prompts out'
    """
    if isinstance(entries, bool) or not isinstance(entries, int) or entries < 0:
        raise ArgumentError(f"entries: found {entries!r}, needed a number of prompts to remember, 0 or more")
    if encoders not in ENCODERS:
        raise ArgumentError(f'encoders: found {encoders!r}, needed "stay" (where they are) or "cpu" (host memory)')
    denoiser_of(pipe)
    if not callable(getattr(pipe, "encode_prompt", None)):
        return f"found a {type(pipe).__name__}, which has no encode_prompt: leave prompts out"
    found = _encoders(pipe)
    if not found:
        return f"found no text encoder in {type(pipe).__name__}, needed one: leave prompts out"
    for name, encoder in found.items() if encoders == "cpu" else ():
        if hook := offload_hook(encoder):
            return f'found {name} offloaded already ({hook}): encoders="stay"'
        around = getattr(vars(encoder).get("forward"), "func", None)
        if isinstance(getattr(around, "__self__", None), Waiting):
            return f'found that {name} waits already, for another pipeline: encoders="stay"'
        if any(type(p) is not nn.Parameter for p in encoder.parameters()):
            return f'found {name} quantized, whose weights move in a way of their own: encoders="stay"'
        if next((part for part in pipe.components.values() if isinstance(part, nn.Module)), None) is encoder:
            return f'found {name} first among the parts, from which the pipeline tells its device: encoders="stay"'
    return None


def apply_prompts(pipe: Any, *, entries: int = 16, encoders: str = "stay") -> Any:
    """Remembers what the last prompts were encoded to; on request the encoders wait in host memory. Lossless.

    Args:
        pipe: a FLUX pipeline, changed in place.
        entries: prompts to remember (4 MB each of FLUX.1 in bfloat16); the one unused for longest goes first.
        encoders: "stay": where they are; "cpu": in host memory (pinned, where there is CUDA) unless they run.

    Returns:
        The same pipe.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.

    Examples:
        >>> from fluxfire import demo
        >>> pipe = fluxfire.apply_prompts(demo.load_pipeline())
        >>> with torch.no_grad():
        ...     made = [pipe.encode_prompt("teapot, noto style", max_sequence_length=24) for _ in range(3)]
        >>> dict(fluxfire.report(pipe).other)["prompts"].remembered
        2
    """
    reason = check_prompts(pipe, entries=entries, encoders=encoders)
    settings = (("entries", entries), ("encoders", encoders))
    with applying(pipe, Step("prompts", "lossless", settings), reason) as handle:
        state = Prompts(pipe, entries)
        if encoders == "cpu":
            for encoder in _encoders(pipe).values():
                waiting = Waiting(encoder, pipe)
                handle.patch.on_undo(waiting.put_back)
                waiting.leave()
                handle.patch.wrap(encoder, "forward", waiting.around_forward)
                state.waiting.append(waiting)
        handle.patch.wrap(pipe, "encode_prompt", state.around_encode)
        handle.states["prompts"] = state
    return pipe


class Prompts:
    """What one pipeline remembers."""

    def __init__(self, pipe: Any, entries: int) -> None:
        self._pipe, self._entries = pipe, entries
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, tuple[Any, ...]] = OrderedDict()
        self._weights: object = None
        self._remembered = self._encoded = 0
        self.waiting: list[Waiting] = []

    def stats(self) -> PromptStats:
        """A snapshot."""
        with self._lock:
            tensors = [part for made in self._kept.values() for part in made if isinstance(part, torch.Tensor)]
            kept_bytes = sum(tensor.nbytes for tensor in tensors)
            brought = sum(one.brought for one in self.waiting)
            return PromptStats(self._remembered, self._encoded, len(self._kept), kept_bytes, brought)

    def around_encode(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What was made of these arguments before, as new tensors; else what is made now."""
        key = self._key(encode, args, kwargs)
        if key is None:
            with _ENCODING:
                return encode(*args, **kwargs)
        with self._lock:
            if (weights := self._version()) != self._weights:
                self._kept.clear()
                self._weights = weights
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                self._remembered += 1
                return _copied(found)
        with _ENCODING:
            made = encode(*args, **kwargs)
        with self._lock:
            self._encoded += 1
            if isinstance(made, tuple) and weights == self._version():
                self._kept[key] = _copied(made)
            while len(self._kept) > self._entries:
                self._kept.popitem(last=False)
        return made

    def _key(self, encode: Callable[..., Any], args: Any, kwargs: Any) -> object:
        """All arguments as one plain value; None where a call is not to be remembered."""
        encoders = _encoders(self._pipe).values()
        if not self._entries or torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return None
        if any(encoder.training for encoder in encoders):
            return None
        if any(hasattr(module, "base_layer") for encoder in encoders for module in encoder.modules()):
            with self._lock:
                self._kept.clear()
            return None
        bound = inspect.signature(encode).bind(*args, **kwargs)
        bound.apply_defaults()
        around = getattr(self._pipe, "system_message", None), self._pipe._execution_device
        return _plain([bound.arguments, *around])

    def _version(self) -> object:
        """Of the encoders and tokenizers: changes when any of their weights does."""
        parts = [part for name, part in sorted(self._pipe.components.items()) if name.startswith(("text", "tokenizer"))]
        weights = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
        pieces: dict[object, list[torch.Tensor]] = {}
        for weight in weights:
            if type(weight) is not nn.Parameter:  # quantized: no slices of it, and nobody fuses into it in place
                continue
            flat = weight.detach().reshape(-1)
            start = max(0, flat.numel() // 2 - 16)
            pieces.setdefault((weight.device.type, weight.dtype), []).append(flat[start : start + 32])
        numbers = [torch.cat(some).float().cpu().numpy().tobytes() for some in pieces.values()]
        return [id(part) for part in parts], [(id(p), p._version, p.dtype) for p in weights], numbers


class Waiting:
    """An encoder whose weights wait in host memory, and are on the pipeline's device while it runs."""

    def __init__(self, encoder: nn.Module, pipe: Any) -> None:
        self._encoder, self._pipe = encoder, weakref.ref(pipe)
        self._before = {tensor: tensor.device for tensor in self._tensors()}
        self._lock = threading.RLock()
        self.brought = 0

    def _tensors(self) -> list[torch.Tensor]:
        """As they are now: an adapter brings more."""
        return list(dict.fromkeys([*self._encoder.parameters(), *self._encoder.buffers()]))

    def leave(self) -> None:
        """Takes the weights off the device."""
        with torch.inference_mode(False), torch.no_grad():
            pin = torch.cuda.is_available()
            for tensor in self._tensors():
                tensor.data = torch.empty_like(tensor.data, device="cpu", pin_memory=pin).copy_(tensor.data)

    def around_forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Brings the weights, runs, and lets go of them.

        Pipelines send inputs to where an encoder's weights are (diffusers 0.42), here to host memory, and there they
        expect the outputs.
        """
        device, inputs = self._device(), tensors_in([args, kwargs])
        args, kwargs = _moved(args, device), _moved(kwargs, device)
        made = self._run(forward, args, kwargs, device)
        return _moved(made, inputs[0].device) if inputs else made

    def _run(self, forward: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> Any:
        with self._lock:  # another thread may have them on the device just now, and take them off
            away = [tensor for tensor in self._tensors() if tensor.device != device]
            if not away:
                return forward(*args, **kwargs)
            host = [tensor.data for tensor in away]
            try:
                with torch.inference_mode(False), torch.no_grad():
                    for tensor in away:
                        tensor.data = tensor.data.to(device, non_blocking=True)
                self.brought += 1
                return forward(*args, **kwargs)
            finally:
                for tensor, value in zip(away, host, strict=True):
                    tensor.data = value

    def _device(self) -> torch.device:
        """Where the pipeline works; without it, where the weights were."""
        pipe = self._pipe()
        device: torch.device = next(iter(self._before.values())) if pipe is None else pipe._execution_device
        return torch.empty(0, device=device).device  # with its index, as weights tell it

    def put_back(self) -> None:
        """To the device on which the weights were."""
        first = next(iter(self._before.values()), torch.device("cpu"))
        with torch.inference_mode(False), torch.no_grad():
            for tensor in self._tensors():
                tensor.data = tensor.data.to(self._before.get(tensor, first))


def _moved(value: Any, device: torch.device) -> Any:
    """Also what is in tuples, dicts and transformers' outputs."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)(**{name: _moved(part, device) for name, part in value.items()})
    return type(value)(_moved(part, device) for part in value) if type(value) in (tuple, list) else value


def _encoders(pipe: Any) -> dict[str, Any]:
    parts = pipe.components.items()
    return {name: part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)}


def _copied(made: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.clone() if isinstance(part, torch.Tensor) else part for part in made)


def _plain(value: Any) -> Any:
    """As something to be compared by value; None where there is a tensor or anything else in it."""
    if value is None or isinstance(value, str | int | float | torch.device):
        return type(value).__name__, value
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return None if None in parts else (type(value).__name__, *parts)
    if isinstance(value, dict):
        parts = [(name, _plain(part)) for name, part in value.items()]
        return None if any(part is None for _, part in parts) else tuple(parts)
    return None
