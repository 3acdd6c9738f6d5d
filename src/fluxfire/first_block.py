"""First-block cache: where the first block's residual hardly changed since the last computed step, skip the others.

The idea is ParaAttention's (https://github.com/chengzeyi/ParaAttention, "First Block Cache", after TeaCache,
https://arxiv.org/abs/2411.19108). In a denoiser of blocks 1..n, with x the image tokens that enter block 1:

    first    = block_1(x) - x                        the first block's residual: computed in every call, cheap
    rest     = block_n(...) - block_1(x)             what all other blocks add: the expensive part
    distance = sum|first - first'| / sum|first'|     relative L1 distance; ' marks the last *computed* call

With distance < threshold the call is a *hit*: blocks 2..n are skipped and `rest'` is added to block 1's output.

What it costs: three tensors of the size of the noise tokens for each guidance branch, a few passes over them, and one
transfer of B floats to the host in every call. Approximate above threshold 0, bit-identical at 0.

How it differs from the peers:
- The last block adds `rest'`, the blocks between hand their input on. So what the denoiser adds between blocks
  (ControlNet) is in `rest'` once and is not added again; what comes after the last block is.
- Every sample of a batch decides for itself; only those that miss are computed.
- Only noise tokens count: a reference picture's output is thrown away, so it neither dilutes the distance nor is kept.
- State belongs to one run and one guidance branch (`run.py`), and instances are patched, never classes.
- `rest'` may be a forecast, corrected afterwards (`forecast.py`); a schedule may decide in the place of the distance.

Shapes: B samples, N noise tokens (the first N of the L image tokens), T text tokens, D channels.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, cast

import torch

from fluxfire.blocks import family_of
from fluxfire.errors import StepError
from fluxfire.forecast import Corrector, History
from fluxfire.plan import Handle
from fluxfire.run import Call, RunReader
from fluxfire.stats import CacheCall, CacheStats

Batch = Literal["sample", "any"]
# What a block returns: (encoder_hidden_states (B, T, D), hidden_states (B, L, D)), or both as one (B, T + L, D).
Streams = tuple[torch.Tensor, torch.Tensor] | torch.Tensor


@dataclass(slots=True)
class _Kept:
    """What is kept of one guidance branch: the last computed call of each sample."""

    first: torch.Tensor | None = None  # (B, N, D)
    size: torch.Tensor | None = None  # (B,) sum|first|
    rest: History = field(default_factory=lambda: History(1))  # (B, N, D)
    corrector: Corrector | None = None
    consecutive_hits: list[int] = field(default_factory=list)  # (B,)

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        own = [tensor for tensor in (self.first, self.size) if tensor is not None]
        return own + self.rest.values + (self.corrector.values if self.corrector else [])


@dataclass(slots=True)
class _Present:
    """The denoiser call that is under way."""

    call: Call[_Kept]
    tokens: int = 0  # the first image tokens, those that count
    leader_out: torch.Tensor | None = None  # (B, L, D)
    hits: tuple[bool, ...] = ()  # (B,)
    missed: torch.Tensor | None = None  # rows that missed, where others hit


class FirstBlockCache:
    """The cache of one denoiser; `around_*` are put around the forward of the denoiser and of its blocks."""

    def __init__(
        self,
        pipe: Any,
        warmup_steps: int = 0,
        max_consecutive_hits: int | None = None,
        batch: Batch = "sample",
        extrapolate: int = 0,
        schedule: str | None = None,
    ) -> None:
        self.threshold = 0.0
        self.steps: int | None = None  # the only number of denoising steps in which calls may hit; None: any
        self._warmup_steps = warmup_steps
        self._max_consecutive_hits = max_consecutive_hits
        self._batch = batch
        self._extrapolate = extrapolate
        self._schedule = schedule
        self._family = family_of(pipe)
        self._reader = RunReader(pipe, self._family, self._new_kept)
        self._local = threading.local()  # .present: each thread has a call of its own under way
        self._run = -1
        self._last_run: list[CacheCall] = []
        self._hits = self._computed = self._other_steps = 0

    def install(self, handle: Handle) -> None:
        """Puts the cache around the denoiser and its blocks."""
        denoiser = handle.denoiser
        handle.patch.wrap(denoiser, "forward", self.around_denoiser)
        leader, *followers, last = self._family.blocks(denoiser)
        roles = [(leader, self.around_leader), *((block, self.around_follower) for block in followers)]
        for block, around in (*roles, (last, self.around_last)):
            handle.patch.wrap(block, "forward", _by_name(block, around))

    def stats(self) -> CacheStats:
        """A snapshot of the counts."""
        held = sum(tensor.nbytes for state in self._reader.states() for tensor in state.tensors())
        outside = self._reader.outside
        other = self._other_steps
        return CacheStats(self.threshold, self._hits, self._computed, outside, tuple(self._last_run), held, other)

    @property
    def _present(self) -> _Present | None:
        present: _Present | None = getattr(self._local, "present", None)
        return present

    def around_denoiser(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Opens the state of this call's guidance branch, then calls on."""
        call = self._reader.read(args, kwargs)
        if self.steps not in (None, call.steps):
            call.state, self._other_steps = None, self._other_steps + 1
        self._local.present = _Present(call)
        try:
            return self._corrected(self._local.present, forward(*args, **kwargs))
        except BaseException:
            if call.state is not None:
                self._reader.drop(call.branch)  # it may hold a first residual without its rest
            raise
        finally:
            self._local.present = None

    def around_leader(self, block: Callable[..., Streams], arguments: dict[str, Any]) -> Streams:
        """Always computed; decides for the whole call."""
        streams = block(**arguments)
        if present := self._present:
            present.leader_out = _image(streams)
            present.tokens = self._tokens(present.call, present.leader_out)
            self._decide(present, arguments["hidden_states"])
        return streams

    def around_follower(self, block: Callable[..., Streams], arguments: dict[str, Any]) -> Streams:
        """Computes the samples that missed and hands the others on."""
        present = self._present
        if present is None or not any(present.hits):
            return block(**arguments)
        missed, text, image = present.missed, arguments.get("encoder_hidden_states"), arguments["hidden_states"]
        given = (image,) if text is None else (text, image)
        if missed is not None:
            computed = block(**self._rows_that_missed(missed, arguments))
            rows = (computed,) if isinstance(computed, torch.Tensor) else computed
            given = tuple(all_.index_copy(0, missed, some) for all_, some in zip(given, rows, strict=True))
        return cast(Streams, given if len(given) == 2 else given[0])

    def around_last(self, block: Callable[..., Streams], arguments: dict[str, Any]) -> Streams:
        """A follower whose output is the leader's plus `rest`: the kept one on a hit, a new one to keep on a miss."""
        streams = self.around_follower(block, arguments)
        present = self._present
        if present is None or present.call.state is None or self.threshold == 0 or present.leader_out is None:
            return streams  # a guider of diffusers may skip the leader: then nothing was decided
        kept, n, leader_out, out = present.call.state, present.tokens, present.leader_out, _image(streams)
        text = out.shape[1] - leader_out.shape[1] if isinstance(streams, torch.Tensor) else 0  # before the image tokens
        noise = slice(text, text + n)
        missed, sigma = present.missed, self._reader.level()[0] if self._extrapolate else 0.0
        if not all(present.hits):
            kept.rest.push(out[:, noise] - leader_out[:, :n], sigma, present.hits, missed)
        if not any(present.hits):
            return streams
        result = leader_out[:, :n] + kept.rest.at(sigma)
        if missed is not None:  # to the bit what the block gave, not leader + (block - leader)
            result = result.index_copy(0, missed, out[missed, noise])
        if n < out.shape[1]:  # text and reference tokens have no output: any values of the right shape
            result = torch.cat([out[:, :text], result, out[:, text + n :]], dim=1)
        return result if isinstance(streams, torch.Tensor) else (streams[0], result)

    def _corrected(self, present: _Present, output: Any) -> Any:
        """The denoiser's output, with what the forecasts since the last computed call have missed."""
        kept = present.call.state
        if kept is None or kept.corrector is None or not present.hits or self.threshold == 0:
            return output
        level = self._reader.level()
        if math.isnan(level[1]):
            return output
        n = present.tokens
        settled = kept.corrector.settle(output[0][:, :n], level, present.hits, present.missed)
        if n < output[0].shape[1]:
            settled = torch.cat([settled, output[0][:, n:]], dim=1)
        return (settled, *output[1:]) if isinstance(output, tuple) else replace(output, sample=settled)

    def _new_kept(self) -> _Kept:
        order = self._extrapolate
        return _Kept(rest=History(order + 1), corrector=Corrector(order + 2) if order else None)

    def _rows_that_missed(self, missed: torch.Tensor, arguments: Mapping[str, Any]) -> dict[str, Any]:
        batch = arguments["hidden_states"].shape[0]
        names = [name for name in ("hidden_states", "encoder_hidden_states") if arguments.get(name) is not None]
        streams = {name: arguments[name][missed] for name in names}
        return self._family.rows(arguments, missed, batch) | streams

    def _decide(self, present: _Present, x: torch.Tensor) -> None:
        """Hit or miss for every sample, given x (B, L, D) that entered the leader; keeps the residuals that missed."""
        batch = x.shape[0]
        call, kept = present.call, present.call.state
        present.hits, distances = (False,) * batch, (math.nan,) * batch
        if kept is not None and self.threshold == 0:  # this call is computed, and not what a later one compares with
            kept.first, kept.size, empty = None, None, self._new_kept()
            kept.rest, kept.corrector = empty.rest, empty.corrector
        elif kept is not None and self._schedule is not None:
            present.hits = (bool(kept.rest.values) and self._marked(self._schedule) == ".",) * batch
        elif kept is not None:
            assert present.leader_out is not None
            first = present.leader_out[:, : present.tokens] - x[:, : present.tokens]
            if kept.rest.values:
                distances = self._distances(kept, first)
                present.hits = self._hits_of(call, distances, kept.consecutive_hits)
            self._keep_first(kept, first, present)
        self._record(CacheCall(call.step, call.branch, present.hits, distances), call.run)

    def _marked(self, schedule: str) -> str:
        """This step's mark; a schedule is for one number of steps, which the scheduler's timesteps tell."""
        steps = len(self._reader.timesteps)
        if steps != len(schedule):
            found = f"cache: found a schedule of {len(schedule)} steps and a run of {steps}: "
            raise StepError(found + f"call it with num_inference_steps={len(schedule)}, or apply_cache for {steps}")
        return schedule[self._reader.position()]

    def _tokens(self, call: Call[_Kept], out: torch.Tensor) -> int:
        """How many of the first image tokens count."""
        return call.noise_tokens

    def _distances(self, kept: _Kept, first: torch.Tensor) -> tuple[float, ...]:
        """The relative L1 distance of every sample to its last computed call."""
        assert kept.first is not None and kept.size is not None
        return tuple((_sum_abs(first - kept.first) / kept.size).tolist())

    def _hits_of(self, call: Call[_Kept], distances: tuple[float, ...], consecutive: list[int]) -> tuple[bool, ...]:
        limit = math.inf if self._max_consecutive_hits is None else self._max_consecutive_hits
        hits = tuple(
            call.step >= self._warmup_steps and distance < self.threshold and count < limit
            for distance, count in zip(distances, consecutive, strict=True)
        )
        return hits if self._batch == "sample" and call.splits else (all(hits),) * len(hits)

    def _keep_first(self, kept: _Kept, first: torch.Tensor, present: _Present) -> None:
        """Keeps the first residual of the samples that missed."""
        counts = kept.consecutive_hits or [0] * len(present.hits)
        kept.consecutive_hits = [count + 1 if hit else 0 for hit, count in zip(present.hits, counts, strict=True)]
        if all(present.hits):
            return
        if not any(present.hits):
            kept.first, kept.size = first, _sum_abs(first)
            return
        assert kept.first is not None and kept.size is not None
        missed = present.missed = torch.tensor(
            [i for i, hit in enumerate(present.hits) if not hit], device=first.device
        )
        kept.first = kept.first.index_copy(0, missed, first[missed])
        kept.size = kept.size.index_copy(0, missed, _sum_abs(first[missed]))

    def _record(self, call: CacheCall, run: int) -> None:
        if run != self._run:
            self._run, self._last_run = run, []
        self._last_run.append(call)
        self._hits += sum(call.hits)
        self._computed += len(call.hits) - sum(call.hits)


def _by_name(block: torch.nn.Module, around: Callable[..., Streams]) -> Callable[..., Streams]:
    """Gives `around(forward, arguments)` a block's arguments by name, however they were passed."""
    names: Final = tuple(inspect.signature(block.forward).parameters)

    def call(forward: Callable[..., Streams], *args: Any, **kwargs: Any) -> Streams:
        return around(forward, dict(zip(names, args, strict=False)) | kwargs if args else kwargs)

    return call


def _image(streams: Streams) -> torch.Tensor:
    return streams if isinstance(streams, torch.Tensor) else streams[1]


def _sum_abs(x: torch.Tensor) -> torch.Tensor:
    """Sum of magnitudes of every sample, in float32: (B, N, D) -> (B,)."""
    sums: torch.Tensor = torch.linalg.vector_norm(x, ord=1, dim=(1, 2), dtype=torch.float32)
    return sums
