"""Random changes of pictures, the same for all styles of a thing, so that pairs stay aligned.

What makes held-out edits work: with the plain pictures alone the model would learn 1,300 things by heart; turned,
mirrored, recoloured and cut together, the pairs teach what a style does to any shape."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _chance(n: int, p: float, device: torch.device) -> Tensor:
    return torch.rand(n, device=device) < p


def _geometry(n: int, device: torch.device) -> Tensor:
    """Random affine maps (N, 2, 3): mirrored, turned by up to 30 degrees, scaled by 0.7-1.25, moved by up to 12 %."""
    angle = (torch.rand(n, device=device) * 2 - 1) * math.pi / 6 * _chance(n, 0.6, device)
    scale = torch.exp((torch.rand(n, device=device) * 0.58 - 0.22) * _chance(n, 0.7, device))
    mirror = 1 - 2 * _chance(n, 0.5, device).float()
    shift = (torch.rand(n, 2, device=device) * 2 - 1) * 0.24 * _chance(n, 0.7, device)[:, None]
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos * mirror, -sin, shift[:, 0]], 1), torch.stack([sin * mirror, cos, shift[:, 1]], 1)]
    return torch.stack(rows, 1)


def _recolour(things: Tensor) -> Tensor:
    """Permute the channels of 15 % and change the contrast of another 15 % (white stays white):
    not more, since styles differ in colours too."""
    n, device = things.shape[0], things.device
    order = torch.rand(n, 3, device=device).argsort(1)
    keep = ~_chance(n, 0.15, device)
    order[keep] = torch.arange(3, device=device)
    things = things.gather(2, order[:, None, :, None, None].expand_as(things))
    gain = (
        1 + (torch.rand(n, 1, 3, 1, 1, device=device) * 0.6 - 0.3) * _chance(n, 0.15, device)[:, None, None, None, None]
    )
    return (1 - (1 - things) * gain).clamp(-1, 1)


def _cut(things: Tensor) -> Tensor:
    """Join 30 % of the things with another one along a random line near the middle."""
    n, size, device = things.shape[0], things.shape[-1], things.device
    axis = torch.linspace(-1, 1, size, device=device)
    angle = torch.rand(n, device=device) * 2 * math.pi
    offset = (torch.rand(n, device=device) - 0.5) * 0.6
    side = torch.cos(angle)[:, None, None] * axis[None, :, None] + torch.sin(angle)[:, None, None] * axis[None, None]
    mask = (side > offset[:, None, None]) & _chance(n, 0.3, device)[:, None, None]
    return torch.where(mask[:, None, None], things[torch.randperm(n, device=device)], things)


def augment(things: Tensor) -> Tensor:
    """(N, S, 3, H, W) in [-1, 1], S styles of N things -> the same shape, each thing changed in its own way."""
    n, s = things.shape[:2]
    grid = F.affine_grid(
        _geometry(n, things.device).repeat_interleave(s, 0), [n * s, *things.shape[2:]], align_corners=False
    )
    moved = (
        F.grid_sample(things.flatten(0, 1) - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1
    )
    return _cut(_recolour(moved.unflatten(0, (n, s))))
