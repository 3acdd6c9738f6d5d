"""ParaAttention's own first-block cache on today's diffusers: the oracle for `first_block.py`.

para-attn (https://github.com/chengzeyi/ParaAttention, 0.3.32 to 0.3.38, the last) does not run FLUX.1 on diffusers 0.35
and later: there single blocks take and return both streams, text and image, and its walk over the blocks hands on one.
Here diffusers walks the blocks itself and their forwards are wrapped, on instances; what is called of para-attn is its
decision (`are_two_tensors_similar`) and its `CacheContext`, one for each guidance branch of a run, in which the
residuals are kept. Not used: `apply_cache_on_pipe`, which replaces `__call__` of the pipeline's class for good, and the
helpers that find the context in a module global, which pipelines in two threads would share.

Costs what `first_block.py` costs, over all image tokens. Approximate above threshold 0, bit-identical at 0.

How it differs from `first_block.py`. With batch 1, no reference picture and float32 the decisions are the same, and the
outputs up to rounding:
- One decision for the whole batch, mean|r - r'| / mean|r'| over all of it; `first_block.py`: each sample for itself.
- All image tokens count and are kept, a reference picture's too (Kontext), so thresholds mean other distances there.
- The means and their ratio are in the model's dtype, so a bfloat16 distance has 8 bits (steps of 0.4 to 0.8 %);
  `first_block.py` sums in float32. Both hit when distance < threshold, strictly. No downsampling (factor 1).
- Its options are left at none: warm-up steps, TaylorSeer, skip-layer guidance.

What it adds between blocks is the denoiser's own: unlike para-attn's, whose walk hides all blocks but one from the
denoiser, ControlNet residuals reach every block in a computed call and are part of the kept residual in a hit.

Importing para-attn registers its custom operators with torch (`torch.ops.para_attn`); it patches nothing and warns of
nothing. It is imported when the cache is installed, not with fluxfire. Its diffusers adapters are never imported.

Shapes: B samples, T text tokens, L image tokens, D channels.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from fluxfire.blocks import denoiser_of, family_of
from fluxfire.plan import Handle
from fluxfire.run import Call, RunReader
from fluxfire.stats import CacheCall, CacheStats

Streams = tuple[torch.Tensor, torch.Tensor]  # (encoder_hidden_states (B, T, D), hidden_states (B, L, D))

# para-attn's names for what its context keeps.
FIRST: Final = "first_hidden_states_residual"
REST: Final = "hidden_states_residual"


@dataclass(slots=True)
class _Present:
    """The denoiser call that is under way."""

    call: Call[Any]  # its state is a para_attn CacheContext
    leader_out: torch.Tensor | None = None  # (B, L, D)
    hit: bool = False
    distance: float = math.nan


class _Threshold(float):
    """A threshold that keeps the distance it is compared with, which para-attn does not return."""

    distance = math.nan

    def __gt__(self, distance: float) -> bool:
        self.distance = distance
        return float(self) > distance


class ParaAttnCache:
    """The cache of one denoiser; `around_*` are put around the forward of the denoiser and of its blocks."""

    def __init__(self, pipe: Any) -> None:
        from para_attn.first_block_cache import utils

        self.threshold = 0.0
        self._similar: Callable[..., bool] = utils.are_two_tensors_similar
        self._family = family_of(pipe)
        self._reader: RunReader[Any] = RunReader(pipe, self._family, utils.create_cache_context)
        self._present: _Present | None = None
        self._run = -1
        self._last_run: list[CacheCall] = []
        self._hits = self._computed = 0

    def install(self, handle: Handle) -> None:
        """Puts the cache around the denoiser and its blocks."""
        handle.patch.wrap(handle.denoiser, "forward", self.around_denoiser)
        leader, *followers, last = self._family.blocks(handle.denoiser)
        handle.patch.wrap(leader, "forward", self.around_leader)
        for block in followers:
            handle.patch.wrap(block, "forward", self.around_follower)
        handle.patch.wrap(last, "forward", self.around_last)

    def stats(self) -> CacheStats:
        """A snapshot of the counts; all samples of a call have the same decision and distance."""
        kept = sum(tensor.nbytes for context in self._reader.states() for tensor in context.buffers.values())
        outside = self._reader.outside
        return CacheStats(self.threshold, self._hits, self._computed, outside, tuple(self._last_run), kept)

    def around_denoiser(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Opens the context of this call's guidance branch, then calls on."""
        call = self._reader.read(args, kwargs)
        self._present = _Present(call)
        try:
            return forward(*args, **kwargs)
        except BaseException:
            self._reader.drop(call.branch)  # it may hold a first residual without its rest
            raise
        finally:
            self._present = None

    def around_leader(
        self,
        block: Callable[..., Streams],
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Streams:
        """Always computed; para-attn decides for the whole call."""
        encoder, out = block(hidden_states, encoder_hidden_states, *args, **kwargs)
        if present := self._present:
            present.leader_out = out
            if present.call.state is not None:
                self._decide(present, present.call.state, out - hidden_states)
            self._record(present, samples=out.shape[0])
        return encoder, out

    def around_follower(
        self,
        block: Callable[..., Streams],
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Streams:
        """Hands its input on when it is a hit."""
        if self._present and self._present.hit:
            return encoder_hidden_states, hidden_states
        return block(hidden_states, encoder_hidden_states, *args, **kwargs)

    def around_last(self, block: Callable[..., Streams], *args: Any, **kwargs: Any) -> Streams:
        """A follower whose image tokens are the leader's plus the rest; FLUX.1 throws the text tokens away here."""
        encoder, out = self.around_follower(block, *args, **kwargs)
        present = self._present
        if present is None or present.call.state is None:
            return encoder, out
        assert present.leader_out is not None
        context = present.call.state
        if present.hit:
            return encoder, context.get_buffer(REST) + present.leader_out
        context.set_buffer(REST, out - present.leader_out)
        return encoder, out

    def _decide(self, present: _Present, context: Any, first: torch.Tensor) -> None:
        """Hit or miss, given the leader's residual (B, L, D); keeps it on a miss."""
        before, threshold = context.get_buffer(FIRST), _Threshold(self.threshold)
        present.hit = before is not None and self._similar(before, first, threshold=threshold)
        present.distance = threshold.distance
        if not present.hit:
            context.set_buffer(FIRST, first)

    def _record(self, present: _Present, samples: int) -> None:
        call = present.call
        if call.run != self._run:
            self._run, self._last_run = call.run, []
        self._last_run.append(
            CacheCall(call.step, call.branch, (present.hit,) * samples, (present.distance,) * samples)
        )
        self._hits += samples * present.hit
        self._computed += samples * (not present.hit)


def check_paraattn(pipe: Any, *, warmup_steps: int = 0, max_consecutive_hits: int | None = None) -> str | None:
    """Why para-attn could not be the cache of this pipeline, besides what `check_cache` finds, or None.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.
    """
    family = family_of(pipe).name
    if family != "FLUX.1":
        return f'para-attn knows FLUX.1 only, found {family}: use backend="fluxfire"'
    if warmup_steps or max_consecutive_hits is not None:
        return (
            f"found warmup_steps={warmup_steps} and max_consecutive_hits={max_consecutive_hits}, needed 0 and None: "
            'only backend="fluxfire" has them'
        )
    if getattr(pipe, "_is_cached", False) or getattr(denoiser_of(pipe), "_is_cached", False):
        return (
            "found para-attn's own apply_cache_on_pipe, which changes the pipeline's class and cannot be taken back: "
            "start a new process without it"
        )
    if importlib.util.find_spec("para_attn") is None:
        return (
            "found no package para-attn, which this backend needs. pip 26.3 and later refuse it, since its metadata "
            'has a direct URL in an extra. Type: uv pip install para-attn; or: pip install "pip<26.3" and then '
            "pip install para-attn"
        )
    return None
