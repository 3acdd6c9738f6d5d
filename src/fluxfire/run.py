"""What one denoiser call is: which run it belongs to, which denoising step, which guidance branch.

A block sees only projected tensors, so the reading is done once a call, from the inputs of the denoiser's `forward`:

- A *run* is one call of the pipeline. It begins when the scheduler holds a new `timesteps` object, since
  `set_timesteps` always makes one, or when its step goes backwards; the scheduler is not patched, and a run that raised
  leaves nothing to the next. Runs on one denoiser follow each other: a call from another thread, or after the last
  step, belongs to no run (another pipeline around the same denoiser with a scheduler of its own, say).
- A *step* is one value of `scheduler.step_index`, an int on the host: no synchronization, and right for img2img (which
  starts in the middle), for repeated bf16 timesteps, for interrupted runs.
- A *guidance branch* is the ordinal of the call within its step: two calls a step with true CFG. The branch must show
  the same conditioning tensors in every step (same objects, not written to); if not, it starts anew. (Tensors made in
  inference mode do not count writes: one that is written to in the middle of a run goes unnoticed.)

What a step keeps of a branch (`new_state()`) starts empty at each of these boundaries, and when the sizes change. A
call that belongs to no run has no state: it is computed, and nothing of it is kept.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import operator
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import torch

from fluxfire.blocks import Family

MAX_BRANCHES: Final = 4  # more calls a step than any guidance makes: somebody calls the denoiser outside of a run

State = TypeVar("State")
Seen = list[tuple[weakref.ref[torch.Tensor], int]]


@dataclass(slots=True)
class Call(Generic[State]):
    """One denoiser call."""

    run: int
    step: int  # denoising steps of this run before this one
    branch: int
    batch: int
    noise_tokens: int
    splits: bool  # whether its samples can be computed apart
    state: State | None  # what is kept for this branch; None for a call that can neither hit nor be compared with
    steps: int = 0  # that the scheduler holds


@dataclass(slots=True)
class _Branch(Generic[State]):
    conditioning: Seen
    layout: tuple[object, ...]
    noise_tokens: int
    state: State


class RunReader(Generic[State]):
    """Follows the calls of one denoiser.

    Args:
        pipe: whose scheduler is followed; it may be replaced. The pipeline itself is held weakly.
        family: how to read the denoiser's inputs.
        new_state: makes an empty state for a branch.
    """

    def __init__(self, pipe: Any, family: Family, new_state: Callable[[], State]) -> None:
        self._pipe, self._last_scheduler = weakref.ref(pipe), pipe.scheduler
        self._signature = inspect.signature(pipe.transformer.forward)
        self._family = family
        self._new_state = new_state
        self.timesteps: Any = None  # the run's, as the scheduler has them
        self._run = self._levels_of = -1
        self._levels: list[float] = []
        self.outside = 0  # calls that belonged to no run
        self.reset()

    def reset(self) -> None:
        """Forgets the present run; the next call begins a new one, in its thread."""
        self._run += 1
        self._branches: dict[int, _Branch[State]] = {}
        self._key = -math.inf
        self._step = -1
        self._ordinal = 0
        self._thread = threading.get_ident()

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call[State]:
        """Places the denoiser call with these arguments."""
        inputs = self._signature.bind(*args, **kwargs).arguments
        batch = inputs["hidden_states"].shape[0]
        timesteps, key = self._schedule(inputs)
        steps = 0 if timesteps is None else len(timesteps)
        if timesteps is not self.timesteps or (key < self._key and self._thread == threading.get_ident()):
            self.reset()
            self.timesteps = timesteps
        if self._thread != threading.get_ident() or (timesteps is not None and key >= len(timesteps)):
            self.outside += 1
            return Call(self._run, max(self._step, 0), 0, batch, 0, True, None, steps)
        if key != self._key:
            self._key, self._step, self._ordinal = key, self._step + 1, 0
        branch, self._ordinal = self._ordinal, self._ordinal + 1
        known = self._open(branch, inputs) if branch < MAX_BRANCHES else None
        self.outside += branch >= MAX_BRANCHES
        noise_tokens, state = (known.noise_tokens, known.state) if known else (0, None)
        return Call(self._run, self._step, branch, batch, noise_tokens, self._family.splits(inputs), state, steps)

    def position(self) -> int:
        """The step that is under way, counted in the scheduler's timesteps (a run of img2img starts in the middle)."""
        return position(self._last_scheduler) if hasattr(self._last_scheduler, "step_index") else self._step

    def level(self) -> tuple[float, float]:
        """Sigma of this step, and the plain Euler step from it, nan for a scheduler that does otherwise.

        One device transfer a run. A scheduler without sigmas: its timesteps, as good an axis.
        """
        scheduler, index = self._last_scheduler, self.position()
        if self._levels_of != self._run:
            sigmas = getattr(scheduler, "sigmas", None)
            self._levels = (self.timesteps if sigmas is None else sigmas).tolist()
            self._levels_of = self._run
        euler = (
            type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.stochastic_sampling
        )
        here = self._levels[index]
        return here, self._levels[index + 1] - here if euler else math.nan

    def states(self) -> list[State]:
        """What is kept now, branch by branch."""
        return [branch.state for branch in self._branches.values()]

    def drop(self, branch: int) -> None:
        """Forgets what is kept for a branch: its call raised half-way."""
        self._branches.pop(branch, None)

    def _schedule(self, inputs: Mapping[str, Any]) -> tuple[Any, float]:
        """The scheduler's timesteps, and what grows from step to step and is the same for all calls of one."""
        if pipe := self._pipe():
            self._last_scheduler = pipe.scheduler
        scheduler = self._last_scheduler
        if hasattr(scheduler, "step_index"):
            key = -1 if scheduler.step_index is None else scheduler.step_index
        else:
            key = -inputs["timestep"].flatten()[0].item()  # one more device transfer a call
        return getattr(scheduler, "timesteps", None), key

    def _open(self, branch: int, inputs: Mapping[str, Any]) -> _Branch[State] | None:
        """What is kept of this branch: nothing if anything tells that the last call was of another kind."""
        x = inputs["hidden_states"]
        layout = (x.shape, x.dtype, x.device, inputs["encoder_hidden_states"].shape, inputs["img_ids"].shape)
        tensors = self._family.conditioning_tensors(inputs)
        known = self._branches.get(branch)
        if known is None or known.layout != layout or not same(known.conditioning, tensors):
            noise_tokens = self._family.noise_tokens(inputs)  # a device transfer, so once a run and not once a call
            if noise_tokens is None:
                return None
            known = self._branches[branch] = _Branch(seen(tensors), layout, noise_tokens, self._new_state())
        return known


def position(scheduler: Any) -> int:
    """The index of the step that is under way, of a scheduler that counts its steps."""
    index: int | None = scheduler.step_index
    if index is None:  # before the first step
        index = getattr(scheduler, "begin_index", None) or 0
    return index


def at_last_step(scheduler: Any) -> bool:
    """Whether the denoising step that is under way is the last of its run; True where the scheduler does not tell."""
    timesteps, index = getattr(scheduler, "timesteps", None), -1
    if hasattr(scheduler, "step_index"):
        index = position(scheduler)
    return timesteps is None or index == -1 or index >= len(timesteps) - 1


def seen(tensors: list[torch.Tensor]) -> Seen:
    """These tensors as they are now, for `same`; they are not kept alive."""
    return [(weakref.ref(tensor), writes(tensor)) for tensor in tensors]


def same(known: Seen, tensors: list[torch.Tensor]) -> bool:
    """Whether these are the objects that were seen, not written to since."""
    return len(known) == len(tensors) and all(
        ref() is tensor and count == writes(tensor) for (ref, count), tensor in zip(known, tensors, strict=True)
    )


def writes(tensor: torch.Tensor) -> int:
    """How often the tensor was written to; tensors made in inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def on_plain_inputs(call: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `call(forward, ...)` in the place of the block's forward, with inputs of one form."""
    return call(forward, *map(plain_tensor, args), **{name: plain_tensor(value) for name, value in kwargs.items()})


def plain_tensor(value: Any) -> Any:
    """The same values as a contiguous tensor that is no view; None for an empty dict. Looks into tuples."""
    if not isinstance(value, torch.Tensor):
        if isinstance(value, tuple):
            return tuple(map(plain_tensor, value))
        return None if isinstance(value, dict) and not value else value
    if value.requires_grad or not (shape := value.shape):
        return value
    canonical = _strides(shape)
    if value.stride() == canonical and not value._is_view():
        return value
    if not value.is_contiguous():
        return value.contiguous()
    # Contiguous but a view, or of odd strides in dimensions of size 1: the storage without the relation to its base.
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(
        value.untyped_storage(), value.storage_offset(), shape, canonical
    )


@functools.lru_cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor of this shape; kept, since a denoiser call's blocks are asked for the same few."""
    return tuple(itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1]
