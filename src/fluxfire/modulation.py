"""Modulation table: what the AdaLayerNorm layers make of the timestep, for all steps of a run at once.

Each FLUX.1 block shifts, scales and gates its tokens by numbers that a linear layer makes from one vector, `temb`, of
the timestep, the guidance and the pooled prompt: 3.2 of 12 B parameters, read in every step for a product with one row.
All of a run's timesteps are known at its first step, so one product gives the rows of all steps (59 MB for 28 of them
and a sample), and a block gets its row in the place of `temb`: no index in a graph, the same graph for all blocks.
The same goes for what the denoiser embeds before its blocks: `temb` is a row as well, text and positions are embedded
once a run. That is 60 small kernels a step, which a host that must not fall behind has no time to launch.
What it saves: 6.4 GB of reads a step in bfloat16; or, with weights="cpu", their 6 GiB: they stay in host memory and
travel once a run. `norm_out`, behind the blocks, gets `temb`. Lossless up to rounding: a product with more rows.

Which row: the first call of a run looks for its timestep, as the pipeline rounded it, among the scheduler's; later ones
count steps. Each call compares its timestep and guidance with the row's on the device, without waiting: the next call
reads the outcome, the last one of a run its own. A call that belongs to no row (another conditioning is a row of its
own, `run.py`) gets its modulation from its own `temb`, one product a layer as before.

Each call looks whether modules, parameters, hooks and writes are as before. Values written through `.data`, or into
tensors made in inference mode, leave no trace: in mid-run they go unnoticed. Embedders of another class, with a hook or
an adapter are computed in each step.

It steps back, for good and with the reason in the report, when an adapter is put on one of these layers. FLUX.2's
blocks share one modulation, FLUX.3's differs by token: nothing to gain.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Final

from torch import nn

from fluxfire.blocks import compiled_by_others, denoiser_of, family_of
from fluxfire.errors import ArgumentError
from fluxfire.linear import obstacle
from fluxfire.modulation_rows import EMBEDDERS, Given, Modulation, norms_of
from fluxfire.patches import applying
from fluxfire.plan import Step

WEIGHTS: Final = ("gpu", "cpu")


def check_modulation_table(pipe: Any, *, weights: str = "gpu") -> str | None:
    """Why `apply_modulation_table` would refuse this pipeline, or None.

    Raises:
        ArgumentError: an argument that no pipeline could take.
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_modulation_table(pipe)
    """
    if weights not in WEIGHTS:
        raise ArgumentError(f'weights: found {weights!r}, needed "gpu" (where they are) or "cpu" (host memory)')
    family, denoiser = family_of(pipe), denoiser_of(pipe)
    if not family.modulated:
        return f"found {family.name}, whose blocks have no modulation layers of their own, needed FLUX.1: leave it out"
    for block in family.blocks(denoiser):
        for norm in norms_of(block, family.modulated):
            if isinstance(norm.linear, Given):
                return None  # ours: the plan says that the step is applied already
            if reason := obstacle(norm.linear):
                return f"found a {type(norm).__name__}'s linear {reason}"
            if type(norm.silu) is not nn.SiLU:
                return (
                    f"found a {type(norm.silu).__name__} before a modulation layer, needed SiLU: leave modulation out"
                )
    return compiled_by_others((denoiser, *family.blocks(denoiser)))


def apply_modulation_table(pipe: Any, *, weights: str = "gpu") -> Any:
    """The modulation of all steps of a run in one product. Lossless.

    Args:
        pipe: a FLUX.1 pipeline, changed in place.
        weights: "gpu": they stay where they are; "cpu": in host memory, and travel to the device once a run.

    Returns:
        The same pipe.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.

    Examples:
        >>> image = fluxfire.apply_modulation_table(pipe)(**prompt).images
        >>> dict(fluxfire.report(pipe).other)["modulation_table"].from_table
        6
    """
    reason = check_modulation_table(pipe, weights=weights)
    with applying(pipe, Step("modulation_table", "lossless", (("weights", weights),)), reason) as handle:
        state = Modulation(pipe, handle)
        handle.patch.on_undo(state.put_back)
        state.take(weights)
        handle.patch.wrap(handle.denoiser, "forward", state.around_denoiser)
        for name in EMBEDDERS:
            around = functools.partial(state.around_embedder, name)
            handle.patch.wrap(getattr(handle.denoiser, name), "forward", around)
        for number, block in enumerate(state.blocks):
            names = tuple(inspect.signature(block.forward).parameters)
            handle.patch.wrap(block, "forward", functools.partial(state.around_block, number, names))
        handle.states["modulation_table"] = state
    return pipe
