"""ParaAttention's own decision on today's diffusers: the oracle for `first_block.py`.

para-attn (https://github.com/chengzeyi/ParaAttention, 0.3.32 to 0.3.38, the last) does not run FLUX.1 on diffusers 0.35
and later: there single blocks take and return both streams, text and image, and its walk over the blocks hands on one.
Here diffusers walks the blocks itself and their forwards are wrapped, on instances, as `first_block.py` does; what is
called of para-attn is its decision, `are_two_tensors_similar`. Not used: `apply_cache_on_pipe`, which replaces
`__call__` of the pipeline's class for good, and its contexts in a module global, which pipelines in two threads share.

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
from typing import Any

import torch

from fluxfire.blocks import denoiser_of, family_of
from fluxfire.first_block import FirstBlockCache
from fluxfire.run import Call


class _Threshold(float):
    """A threshold that keeps the distance it is compared with, which para-attn does not return."""

    distance = math.nan

    def __gt__(self, distance: float) -> bool:
        self.distance = distance
        return float(self) > distance


class ParaAttnCache(FirstBlockCache):
    """A `FirstBlockCache` whose decision is para-attn's."""

    def __init__(self, pipe: Any) -> None:
        from para_attn.first_block_cache import utils

        super().__init__(pipe, batch="any")
        self._similar: Callable[..., bool] = utils.are_two_tensors_similar

    def _tokens(self, call: Call[Any], out: torch.Tensor) -> int:
        return out.shape[1]

    def _distances(self, kept: Any, first: torch.Tensor) -> tuple[float, ...]:
        threshold = _Threshold(self.threshold)
        self._similar(kept.first, first, threshold=threshold)
        return (threshold.distance,) * first.shape[0]


def check_paraattn(
    pipe: Any,
    *,
    warmup_steps: int = 0,
    max_consecutive_hits: int | None = None,
    extrapolate: int = 0,
    schedule: str | None = None,
) -> str | None:
    """Why para-attn could not be the cache of this pipeline, besides what `check_cache` finds, or None.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.
    """
    family = family_of(pipe).name
    if family != "FLUX.1":
        return f'para-attn knows FLUX.1 only, found {family}: use backend="fluxfire"'
    knobs: dict[str, object] = {"warmup_steps": warmup_steps, "max_consecutive_hits": max_consecutive_hits}
    knobs |= {"extrapolate": extrapolate, "schedule": schedule}
    if given := [f"{name}={value!r}" for name, value in knobs.items() if value not in (0, None)]:
        return f'found {", ".join(given)}: only backend="fluxfire" has that'

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
