"""The VAE's memory, in two steps: its convolutions in channels_last, its pictures in tiles.

**channels_last** (`apply_memory_format`). The weights and pictures of a convolution are stored channel after channel
(torch's default) or with the channels of a pixel side by side, as many convolution kernels of GPUs want them; else they
transpose at their door. Of a FLUX pipeline only the VAE is made of convolutions. Sums are taken in another order
(https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html). Measure before you use it: on an H100
(torch 2.11, bfloat16, uncompiled) decoding 1024x1024 took 142 ms instead of 90, with a peak of 1.76 GiB instead of
2.38, so `optimize_pipeline` leaves it off.

**Tiles** (`apply_vae_tiling`). The activations of decoding grow with the picture's area; in tiles they grow with the
tile's. Every tile is normalised by itself and neighbours are blended over a quarter of their width: it takes longer and
gives another picture. What fits into one tile is not touched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fluxfire.blocks import denoiser_of, offload_hook
from fluxfire.patches import applying
from fluxfire.plan import Step


def check_memory_format(pipe: Any) -> str | None:
    """Why `apply_memory_format` would refuse this pipeline, or None.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_memory_format(fluxfire.apply_memory_format(pipe))
        'all ... convolutions of AutoencoderKL are channels_last already'
    """
    denoiser_of(pipe)
    vae: Any = getattr(pipe, "vae", None)
    if vae is None:
        return f"found no VAE in {type(pipe).__name__}, needed one: nothing else in it is made of convolutions"
    weights = [weight for weight in vae.parameters() if weight.dim() == 4]
    if all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights):
        return f"all {len(weights)} convolutions of {type(vae).__name__} are channels_last already"
    if (hook := offload_hook(vae)) not in (None, "CpuOffload"):  # that one moves the weights, others keep copies
        return f"found {type(vae).__name__} offloaded ({hook}): take that off and use fluxfire.apply_offload last"
    return None


def apply_memory_format(pipe: Any) -> Any:
    """Stores the VAE's convolutions channels_last. Lossless.

    Args:
        pipe: a FLUX pipeline, changed in place. Parameters stay the same objects.

    Returns:
        The same pipe.

    Raises:
        NotFluxError, StepError: nothing was changed.

    Examples:
        >>> vae = fluxfire.apply_memory_format(pipe).vae
        >>> vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    with applying(pipe, Step("memory_format", "lossless"), check_memory_format(pipe)) as handle:
        for weight in pipe.vae.parameters():
            if weight.dim() == 4 and not weight.is_contiguous(memory_format=torch.channels_last):
                handle.patch.on_undo(functools.partial(_set_strides, weight, weight.stride()))
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return pipe


def _set_strides(weight: torch.nn.Parameter, strides: tuple[int, ...]) -> None:
    empty = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
    weight.data = empty.copy_(weight.data)


def check_vae_tiling(pipe: Any) -> str | None:
    """Why `apply_vae_tiling` would refuse this pipeline, or None.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_vae_tiling(fluxfire.apply_vae_tiling(pipe))
        'AutoencoderKL works in tiles already'
    """
    denoiser_of(pipe)
    vae: Any = getattr(pipe, "vae", None)
    if not hasattr(vae, "use_tiling"):
        return f"found {vae and type(vae).__name__} as VAE of {type(pipe).__name__}, needed one that can work in tiles"
    return f"{type(vae).__name__} works in tiles already" if vae.use_tiling else None


def apply_vae_tiling(pipe: Any) -> Any:
    """Encodes and decodes pictures larger than a tile in tiles that overlap and are blended. Approximate.

    A tile has the VAE's training size (`vae.tile_sample_min_size`), 1024 pixels for FLUX.1. Pictures up to 1024x1024
    stay exact, reference pictures too; one longer side is enough to exceed it.

    Args:
        pipe: a FLUX pipeline, changed in place.

    Returns:
        The same pipe.

    Raises:
        NotFluxError, StepError: nothing was changed.

    Examples:
        >>> fluxfire.apply_vae_tiling(pipe).vae.use_tiling
        True
    """
    with applying(pipe, Step("vae_tiling", "approximate"), check_vae_tiling(pipe)) as handle:
        handle.patch.on_undo(pipe.vae.disable_tiling)
        pipe.vae.enable_tiling()
    return pipe
