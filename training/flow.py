"""Flow matching and packing, exactly as `FluxKontextPipeline` does them at inference.

    x_t = (1 - t) x_0 + t noise,   the denoiser's target: noise - x_0,   its timestep: t in [0, 1]

Latents (B, 16, 16, 16) are packed in 2 x 2 patches to tokens (B, 64, 64). An edit's reference tokens follow the noise
tokens; their position ids have a 1 in the first column, and the denoiser's output for them is thrown away. A test
holds `pack`, `image_ids` and `encode` equal to the pipeline's own methods.

The letters: B batch, L tokens of a picture (64), D = 4 x 16 packed channels.
"""

import math

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor

GUIDANCE = (1.0, 4.0)  # the range that the denoiser's guidance input is trained on
LOGIT_MEAN, LOGIT_STD = 0.4675, 1.4  # of t in training: centred on the pipeline's schedule at 64 tokens (mu)


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4C), channel slowest in a patch."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def image_ids(rows: int, columns: int, reference: bool, device: torch.device | str = "cpu") -> Tensor:
    """Position ids of the packed tokens: (L, 3), or (2L, 3) when reference tokens follow."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    ids = ids.reshape(-1, 3)
    if not reference:
        return ids
    marked = ids.clone()
    marked[:, 0] = 1
    return torch.cat([ids, marked])


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> packed, normalised latents: the posterior's mode, as the pipeline does."""
    latents = vae.encode(pictures).latent_dist.mode()
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


def noised(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clean tokens (B, L, D) -> x_t, t (B,), target velocity."""
    t = torch.sigmoid(torch.randn(len(clean), device=clean.device) * LOGIT_STD + LOGIT_MEAN)
    noise = torch.randn_like(clean)
    mix = t[:, None, None]
    return (1 - mix) * clean + mix * noise, t, noise - clean


def velocity(
    denoiser: FluxTransformer2DModel,
    x: Tensor,
    t: Tensor,
    guidance: Tensor,
    text: tuple[Tensor, Tensor],
    reference: Tensor | None = None,
) -> Tensor:
    """One denoiser call as the pipeline makes it; `text` is (T5 states (B, T, W), CLIP pooled (B, W))."""
    states, pooled = text
    side = math.isqrt(x.shape[1])
    out: Tensor = denoiser(
        hidden_states=x if reference is None else torch.cat([x, reference], dim=1),
        timestep=t,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3, device=x.device),
        img_ids=image_ids(side, side, reference is not None, x.device),  # made there: a copy would wait for the GPU
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]
