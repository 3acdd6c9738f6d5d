"""What a block is, as far as a graph made from it can depend on it: described in JSON, and watched for changes.

An ahead-of-time graph carries no guards on modules: the block's classes, the sources of these, its parameters' shapes,
data types and tensor types, and every plain attribute of its modules and attention processors are described here, and
graphs are shared between blocks of equal descriptions only. What cannot be described raises `Unknown`, and such a block
takes the traced path. `Watch` tells in some 20 microseconds whether anything of it was replaced since.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import sys
import types
from collections.abc import Mapping
from operator import attrgetter, is_, itemgetter
from typing import Any, Final

import torch
from torch import nn

from fluxfire.blocks import is_own

_PLAIN: Final = (float, complex, bytes, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)
_SEEN_ELSEWHERE: Final = (nn.Module, torch.Tensor, type, types.FunctionType)
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What torch keeps on every module. `training` is read by dropout.
_BOOKKEEPING: Final = frozenset(vars(nn.Module())) - {"training"}
_KIND: Final = attrgetter("__class__", "dtype", "device")
# Of the block itself: what stands around its forward is not in the graph.
_AROUND: Final = frozenset({"forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_is_stateful"})


class Unknown(Exception):
    """A graph could depend on this and we cannot tell how; or it is not what the graph was made for."""


def describe(block: nn.Module, device: torch.device) -> dict[str, Any]:
    """The block as JSON values; tensors on `device` are expected.

    Raises:
        Unknown: a part that cannot be described, by its place.
    """
    return _Description(device).module(block, "block")


class _Description:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[int, str] = {}  # where a tensor was met first: tied ones are one input of a graph
        self._path: list[int] = []

    def module(self, module: nn.Module, at: str) -> dict[str, Any]:
        top = at == "block"
        if not top:
            if "forward" in vars(module) and not is_own(module, "forward"):
                raise Unknown(f"{at}.forward was replaced")
            if any(getattr(module, hooks) for hooks in _HOOKS) or module._compiled_call_impl is not None:
                raise Unknown(f"{at} has hooks or is compiled")
        skipped = _BOOKKEEPING | (_AROUND if top else {"forward"})
        attributes = {name: value for name, value in vars(module).items() if name not in skipped}
        tensors = {**module._parameters, **module._buffers}
        return {
            "class": _class(type(module), at),
            "attributes": {name: self.value(value, f"{at}.{name}") for name, value in attributes.items()},
            "tensors": {name: self._tensor(value, f"{at}.{name}") for name, value in tensors.items()},
            "modules": {
                name: None if child is None else self.module(child, f"{at}.{name}")
                for name, child in module._modules.items()
            },
        }

    def value(self, value: Any, at: str) -> Any:
        if value is None or (isinstance(value, bool | int | str) and not isinstance(value, enum.Enum)):
            return value
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, torch.Tensor):
            return self._tensor(value, at)
        if isinstance(value, Mapping):
            return {str(key): self.value(item, f"{at}[{key!r}]") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item, f"{at}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, set | frozenset):
            return sorted(map(str, (self.value(item, at) for item in value)))
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            return _class(value, at) if isinstance(value, type) else _function(value)
        if isinstance(value, functools.partial):
            return [self.value(part, at) for part in (value.func, value.args, value.keywords)]
        return self._object(value, at)

    def _object(self, value: Any, at: str) -> Any:
        """An object by its class and attributes, such as an attention processor; `traced()` says what a graph reads."""
        if type(value).__module__.startswith("fluxfire.") and hasattr(value, "traced"):
            return self.value(value.traced(), at)
        if not _is_its_attributes(value) or id(value) in self._path:
            raise Unknown(f"{at} is a {type(value).__module__}.{type(value).__qualname__}")
        self._path.append(id(value))
        try:
            attributes = {name: self.value(item, f"{at}.{name}") for name, item in vars(value).items()}
        finally:
            self._path.pop()
        return {"class": _class(type(value), at), "attributes": attributes}

    def _tensor(self, tensor: torch.Tensor | None, at: str) -> Any:
        if tensor is None:
            return None
        if id(tensor) in self._tensors:
            return {"same as": self._tensors[id(tensor)]}
        self._tensors[id(tensor)] = at
        kind = type(tensor)
        found: dict[str, Any] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
        if tensor.device != self._device:
            found["device"] = str(tensor.device)
        if kind not in (torch.Tensor, nn.Parameter) or type(tensor.data) is not torch.Tensor:
            found["type"] = self._subclass(tensor.data, at)
        elif tensor.layout != torch.strided:
            raise Unknown(f"{at} is {tensor.layout}")
        elif not tensor.is_contiguous():
            found["stride"] = list(tensor.stride())
        return found

    def _subclass(self, tensor: Any, at: str) -> Any:
        """A tensor subclass, such as torchao's quantized weights, by its inner tensors and its context."""
        if not hasattr(tensor, "__tensor_flatten__"):
            raise Unknown(f"{at} is a {type(tensor).__module__}.{type(tensor).__qualname__}")
        names, context = tensor.__tensor_flatten__()
        inner = {name: self._tensor(getattr(tensor, name), f"{at}.{name}") for name in names}
        return {"class": _class(type(tensor), at), "inner": inner, "context": self.value(context, f"{at}.context")}


def _class(cls: type, at: str) -> Any:
    """A class by its name, the source of its module, and its plain attributes with those of its bases."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if is_torchs(cls.__module__):
        return name
    attributes: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if not is_torchs(base.__module__):
            plain = {key: item for key, item in vars(base).items() if not key.startswith("__")}
            attributes |= {key: repr(item) for key, item in plain.items() if _is_plain(item)}
    sources = {base.__module__: source_of(base.__module__) for base in cls.__mro__ if not is_torchs(base.__module__)}
    return {"name": name, "sources": sources, "attributes": attributes}


def _is_its_attributes(value: Any) -> bool:
    """Whether an object is of classes written in Python, without slots: then its `vars` are all there is of it."""
    written = 1 << 9  # Py_TPFLAGS_HEAPTYPE
    classes = [cls for cls in type(value).__mro__ if cls is not object]
    plain = all(cls.__flags__ & written and not vars(cls).get("__slots__") for cls in classes)
    return plain and hasattr(value, "__dict__") and not isinstance(value, nn.Module)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _function(function: Any) -> Any:
    name = f"{function.__module__}.{function.__qualname__}"
    owner = getattr(function, "__self__", None)
    if getattr(function, "__closure__", None) or not isinstance(owner, types.ModuleType | None):
        raise Unknown(f"{name} is a closure or a method")
    return name if is_torchs(str(function.__module__)) else [name, source_of(function.__module__)]


def is_torchs(module: str) -> bool:
    """Whether the module's source is told by the versions of torch and Python."""
    top = module.partition(".")[0]
    return top == "torch" or top in sys.stdlib_module_names


@functools.cache
def source_of(module: str) -> str:
    """The SHA-256 of a module's file as it is when first asked.

    Raises:
        Unknown: it has no file; a notebook's cells have none.
    """
    path = getattr(sys.modules.get(module), "__file__", None)
    if not path:
        raise Unknown(f"the source of {module} is in no file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Watch:
    """Whether a block is, object by object, what it was when this was made. Its loops are C's."""

    def __init__(self, block: nn.Module) -> None:
        modules = list(block.modules())
        self.classes = {type(module) for module in modules}
        dicts: list[dict[str, Any]] = [block._modules, block._parameters, block._buffers]
        for module in modules[1:]:
            dicts += [vars(module), module._modules, module._parameters, module._buffers]
        self._mutable: list[Any] = []
        own = [value for name, value in vars(block).items() if name not in _BOOKKEEPING | _AROUND]
        for value in itertools.chain(own, *(vars(module).values() for module in modules[1:])):
            self._look_into(value, dicts)
        self._empty = [item for item in (*dicts, *self._mutable) if not item]  # many, and quick to ask
        self._mutable = [*filter(None, self._mutable)]
        self._copies = [item.copy() for item in self._mutable]
        self._dicts = [*filter(None, dicts), {"end": object()}]  # found nowhere else: where it stands tells the length
        self._top, names = vars(block), vars(block).keys() - _AROUND
        self._size, self._own = len(names), itemgetter(*names)
        self._values = [*self._own(self._top), *itertools.chain(*map(dict.values, self._dicts))]  # kept alive
        self._tensors = [value for value in self._values if isinstance(value, torch.Tensor)]
        self._kinds = list(map(_KIND, self._tensors))

    def _look_into(self, value: Any, dicts: list[dict[str, Any]], depth: int = 0) -> None:
        if isinstance(value, list | set | dict) and not any(value is known for known in dicts):
            self._mutable.append(value)
            for item in value.values() if isinstance(value, dict) else value:
                self._look_into(item, dicts, depth)
        elif depth < 2 and hasattr(value, "__dict__") and not isinstance(value, _SEEN_ELSEWHERE):
            dicts.append(vars(value))
            self.classes.add(type(value))
            for item in vars(value).values():
                self._look_into(item, dicts, depth + 1)

    def unchanged(self) -> bool:
        """Whether nothing was put in the place of anything, and no tensor moved or changed its type."""
        try:
            return (
                all(map(is_, itertools.chain(self._own(self._top), *map(dict.values, self._dicts)), self._values))
                and len(self._top) - sum(map(self._top.__contains__, _AROUND)) == self._size
                and not any(self._empty)
                and list(map(_KIND, self._tensors)) == self._kinds
                and self._mutable == self._copies
            )
        except (KeyError, RuntimeError, ValueError):  # an attribute is gone; replaced tensors have no single truth
            return False
