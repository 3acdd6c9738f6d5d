"""Whether what a step relies on is still in its place.

Steps that stand in the place of layers (fused projections, fused kernels, modulation rows) must notice a module that
was replaced, a weight that was moved or written to, a hook that came: in every denoiser call, and at full size that is
some thousand objects. Asked one by one they took 2.7 ms a step, in which the GPU had nothing to do wherever the host
waits for it, as a cache's decision does. Here they stand in flat lists and the loops are C's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, is_
from typing import Any, Final

import torch

_VERSION: Final = attrgetter("_version")


class Seal:
    """Attributes, tensors and hooks as they were when each was put under it."""

    def __init__(self) -> None:
        self._places: set[tuple[int, str]] = set()  # of what is held, so that each is asked for once
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._tensors: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._counted: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._hooks: list[Mapping[Any, Any]] = []
        self._dicts: list[Mapping[Any, Any]] = []
        self._sizes: list[int] = []

    def hold(self, owner: dict[str, Any], *names: str) -> None:
        """What is in a dict of a module under these names, which may be nothing."""
        for name in names:
            if (id(owner), name) not in self._places:
                self._places.add((id(owner), name))
                self._owners.append(owner)
                self._names.append(name)
                self._values.append(owner.get(name))

    def hold_children(self, module: torch.nn.Module) -> None:
        """A module's submodules and weights, all the way down: which they are, and how many."""
        for part in module.modules():
            for children in (part._modules, part._parameters):
                self.hold(children, *children)
                self._dicts.append(children)
                self._sizes.append(len(children))

    def hold_addresses(self, tensors: Iterable[torch.Tensor]) -> None:
        """Where they are, which tells the device and the data type too as long as the memory is not given back."""
        for tensor in tensors:
            self._tensors.append(tensor)
            self._addresses.append(tensor.data_ptr())

    def hold_writes(self, tensors: Iterable[torch.Tensor]) -> None:
        """How often they were written to; tensors made in inference mode do not count it."""
        for tensor in tensors:
            if not tensor.is_inference():
                self._counted.append(tensor)
                self._versions.append(tensor._version)

    def hold_unhooked(self, modules: Iterable[torch.nn.Module]) -> None:
        """That calling these modules does no more than their own forward."""
        for module in modules:
            self.hold(vars(module), "forward")
            self.hold_empty(module._forward_pre_hooks, module._forward_hooks)

    def hold_empty(self, *hooks: Mapping[Any, Any]) -> None:
        """That nothing is in them."""
        self._hooks += hooks

    def unbroken(self) -> bool:
        """Whether all is as it was."""
        return (
            all(map(is_, map(dict.get, self._owners, self._names), self._values))
            and not any(self._hooks)
            and list(map(len, self._dicts)) == self._sizes
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_VERSION, self._counted)) == self._versions
        )
