"""The latent bank: every training picture, plain and in many augmented forms, encoded once and kept on the GPU.

One entry is 64 tokens of 64 numbers, 8 KiB in bf16: 64 forms of 4,000 pictures are 2 GiB, and a training step reads
its batch by index, with no autoencoder in it. Form 0 is the plain picture; form k is the same change for all styles
of a thing."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training import data, flow, lists, text
from training.augment import augment
from training.pictures import unit


@torch.no_grad()
def latents(vae: AutoencoderKL, plain: Tensor, forms: int) -> Tensor:
    """uint8 (N, S, 3, H, W) -> bf16 (forms, N, S, L, D); form 0 is plain."""
    found = []
    for form in range(forms):
        for part in plain.split(128):
            x = unit(part)
            x = augment(x) if form else x
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                tokens = flow.encode(vae, x.flatten(0, 1).contiguous(memory_format=torch.channels_last))
            found.append(tokens.to(torch.bfloat16).unflatten(0, x.shape[:2]))
    return torch.cat(found).unflatten(0, (forms, len(plain)))


class Prompts:
    """Token ids of every prompt, (rows, 24) a tokenizer: names x styles, then the edit prompts, then the empty one."""

    def __init__(self, known: list[str], device: str, tokenizers: Path) -> None:
        self.styles = len(data.STYLES)
        rows = [lists.t2i_prompt(name, style) for name in known for style in data.STYLES]
        rows += [lists.edit_prompt(style) for style in data.STYLES]
        self.clip_tokenizer, self.t5_tokenizer = text.tokenizers(rows, tokenizers)
        self.first_edit, self.empty = len(rows) - self.styles, len(rows)
        rows.append("")
        self.clip = text.ids(self.clip_tokenizer, rows).to(device)
        self.t5 = text.ids(self.t5_tokenizer, rows).to(device)
