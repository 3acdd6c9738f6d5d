"""Pictures as tensors, training and held-out ones apart."""

import torch
from torch import Tensor

from training import data, lists


def unit(pictures: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def names(held_out: bool) -> list[str]:
    held = set(lists.read()["held_out"])
    return [name for name in data.names() if (name in held) == held_out]


def pictures(held_out: bool, device: str) -> Tensor:
    """uint8, (names, styles, 3, 128, 128)."""
    index = {name: i for i, name in enumerate(data.names())}
    chosen = data.load()[:, [index[name] for name in names(held_out)]]
    return torch.from_numpy(chosen).permute(1, 0, 4, 2, 3).contiguous().to(device)
