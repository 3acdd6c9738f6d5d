"""Static blocks: what does not change over the steps of a run is computed once a run. FLUX.3 has such blocks.

FLUX.3 gives every kind of tokens blocks of its own before the joint ones. Those of the text and of reference pictures
attend to their own kind only and are modulated by timestep 0: their inputs are the same in every step, so their outputs
are, to the bit (diffusers' `Flux3Transformer2DModel.forward`). The first call of each guidance branch computes them;
later ones take the kept output. Lossless: bit-identical on the same device.

What it saves: of 5 + 28 blocks, the 5 of the text in every call (also in one that hits the cache, of whose few blocks
they are most), and the 5 of the references, which count most where references are large. What it costs: for each branch
one tensor of the size of the text and one of the references, and a look at the blocks in every call.

When it is computed anew: a new run, another guidance branch, changed shapes, conditioning or position ids (`run.py`
tells, also what it cannot see), and where what computes it changed: hooks (a guider that skips a block), attention
processors, an adapter or its scale, weights that were written to. Not for flow-map models: there the timestep that a
step jumps to is added for all tokens. Under a cache of which some samples of a batch hit, the references of those that
missed are computed.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fluxfire.blocks import compiled_by_others, denoiser_of, family_of
from fluxfire.patches import applying
from fluxfire.plan import Step
from fluxfire.run import RunReader, writes


@dataclass(frozen=True, slots=True)
class StaticStats:
    """Calls of static blocks, computed and saved since `apply_static_blocks`, and the memory held now."""

    computed: int
    saved: int
    kept_bytes: int


# For each list of blocks, by its number: what the model was like, and the last block's output (B, N, D).
_Kept = dict[int, tuple[list[object], torch.Tensor]]


@dataclass(slots=True)
class _Present:
    """The denoiser call that is under way."""

    kept: _Kept
    batch: int
    likeness: list[object] | None = None


class StaticBlocks:
    """The static blocks of one denoiser; `around_*` are put around the forward of the denoiser and of the blocks."""

    def __init__(self, pipe: Any, lists: list[list[torch.nn.Module]]) -> None:
        self._lists, self._denoiser = lists, denoiser_of(pipe)
        self._others = set(family_of(pipe).blocks(self._denoiser)).difference(*lists)
        self._reader: RunReader[_Kept] = RunReader(pipe, family_of(pipe), dict)
        self._local = threading.local()
        self._computed = self._saved = 0

    def stats(self) -> StaticStats:
        """A snapshot of the counts."""
        held = sum(out.nbytes for kept in self._reader.states() for _, out in kept.values())
        return StaticStats(self._computed, self._saved, held)

    def around_denoiser(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Opens what is kept of this call's guidance branch, then calls on."""
        call = self._reader.read(args, kwargs)
        self._local.present = call.state is not None and _Present(call.state, call.batch)
        try:
            return forward(*args, **kwargs)
        finally:
            self._local.present = None

    def around_block(self, number: int, place: int, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Hands the input on where the list's output is kept, and gives that in the place of the last block."""
        present: _Present | None = getattr(self._local, "present", None)
        x, last = args[0] if args else kwargs["hidden_states"], place == len(self._lists[number]) - 1
        # Some rows of a batch by themselves are the cache's.
        if not present or x.shape[0] != present.batch or torch.is_grad_enabled():
            self._computed += 1
            return block(*args, **kwargs)
        if present.likeness is None:  # not before: the denoiser's forward scales adapters
            present.likeness = self._likeness()
        known = present.kept.get(number)
        if known is not None and known[0] == present.likeness:
            self._saved += 1
            return known[1] if last else x
        self._computed += 1
        out = block(*args, **kwargs)
        if last:
            present.kept[number] = (present.likeness, out)
        return out

    def _likeness(self) -> list[object]:
        """What is the same as long as the model computes the same: hooks, processors, adapters, writes to weights."""
        found: list[object] = []
        for _, module in self._denoiser.named_modules(memo=set(self._others)):
            found += (getattr(module, "processor", None), *getattr(vars(module).get("_diffusers_hook"), "hooks", ()))
            # An offload by layers puts new parameters in the place of those on "meta" in every call.
            found += [_stamp(part) for part in module._parameters.values() if part is not None and not part.is_meta]
            if isinstance(scaling := getattr(module, "scaling", None), dict):  # an adapter of peft
                found += [(name, _stamp(scale)) for name, scale in scaling.items()]
                found += (*module.active_adapters, module.disable_adapters, *module.merged_adapters)
        return found


def _stamp(value: object) -> object:
    return (id(value), writes(value)) if isinstance(value, torch.Tensor) else value


def has_static_blocks(pipe: Any) -> bool:
    """Whether the pipeline's model has blocks that compute the same in every step.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.
    """
    return bool(family_of(pipe).static_lists) and not denoiser_of(pipe).config.flow_map


def check_static_blocks(pipe: Any) -> str | None:
    """Why `apply_static_blocks` would refuse this pipeline, or None.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_static_blocks(pipe)
        'found FLUX.1, all of whose blocks see the timestep, needed FLUX.3: leave static_blocks out'
    """
    family, denoiser = family_of(pipe), denoiser_of(pipe)
    if not family.static_lists:
        return f"found {family.name}, all of whose blocks see the timestep, needed FLUX.3: leave static_blocks out"
    if denoiser.config.flow_map:
        return (
            "found a flow-map model, whose text and reference tokens see the timestep that a step jumps to, needed a "
            "model without flow_map: leave static_blocks out"
        )
    blocks = itertools.chain(*family.static_blocks(denoiser))
    return compiled_by_others((denoiser, *blocks))


def apply_static_blocks(pipe: Any) -> Any:
    """FLUX.3's text and reference blocks once a run in the place of once a denoiser call. Lossless.

    Embeddings that you pass to the pipeline should be on its device: else hooks of an offload copy them in every call,
    and the blocks are computed for what looks like another prompt.

    Args:
        pipe: a FLUX.3 pipeline that is no flow map, changed in place.

    Returns:
        The same pipe.

    Raises:
        NotFluxError, StepError: nothing was changed.

    Examples:
        >>> fluxfire.apply_static_blocks(pipe)
        Traceback (most recent call last):
        fluxfire.errors.StepError: static_blocks: found FLUX.1, all of whose blocks see the timestep, ...
    """
    with applying(pipe, Step("static_blocks", "lossless"), check_static_blocks(pipe)) as handle:
        lists = family_of(pipe).static_blocks(handle.denoiser)
        state = StaticBlocks(pipe, lists)
        handle.patch.wrap(handle.denoiser, "forward", state.around_denoiser)
        for number, blocks in enumerate(lists):
            for place, block in enumerate(blocks):
                handle.patch.wrap(block, "forward", functools.partial(state.around_block, number, place))
        handle.states["static_blocks"] = state
    return pipe
