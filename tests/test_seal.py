"""A seal tells each kind of change, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fluxfire.seal import Seal


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()))


def replace_module(model: nn.Sequential) -> None:
    model[1][1] = nn.ReLU()


def add_module(model: nn.Sequential) -> None:
    model[1].add_module("more", nn.ReLU())


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach())


def remove_parameter(model: nn.Sequential) -> None:
    model[0].bias = None


def move(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data.clone()


def write(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


def hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda *_: None)


def pre_hook(model: nn.Sequential) -> None:
    model[0].register_forward_pre_hook(lambda *_: None)


def own_forward(model: nn.Sequential) -> None:
    model[1].forward = model[1].forward


def attribute(model: nn.Sequential) -> None:
    model[0].note = "new"


CHANGES = (
    *(replace_module, add_module, replace_parameter, remove_parameter, move, write, hook, pre_hook),
    *(own_forward, attribute),
)


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_breaks_it(change: Callable[[nn.Sequential], None]) -> None:
    model, seal = make(), Seal()
    assert seal.unbroken()
    seal.hold_children(model)
    seal.hold_unhooked(model.modules())
    seal.hold_addresses(model.parameters())
    seal.hold_writes(model.parameters())
    seal.hold(vars(model[0]), "note", "other")
    model(torch.ones(1, 2)).sum().backward()
    model.eval()
    assert seal.unbroken()
    change(model)
    assert not seal.unbroken()


def test_writes_to_tensors_of_inference_mode_do_not_count() -> None:
    with torch.inference_mode():
        tensor = torch.ones(2)
    seal = Seal()
    seal.hold_writes([tensor])
    with torch.inference_mode():
        tensor.mul_(2)
    assert seal.unbroken()
