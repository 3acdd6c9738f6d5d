"""The one door for change: attributes of instances, each with its reverse.

A `Patch` holds the changes made to one pipeline. `set` puts an attribute on an instance, never on a class; `wrap` puts
a `Wrapper` around a bound method. `undo` takes everything back, last change first, and leaves no attribute behind that
was not there before. Others may have wrapped our wrapper meanwhile (accelerate's and diffusers' hooks, a user): then
ours is taken out of their chain, and where we do not know the chain an `UndoError` names the owner before anything is
touched. A blind put-back would throw their wrapper away.

`applying` is what every `apply_<step>` is made of: it refuses with the step's reason, and a step that fails half-way
leaves nothing behind. `Workaround` is the one exception to "instances only": a repair of an upstream bug.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from fluxfire.blocks import denoiser_of
from fluxfire.errors import CopyError, StepError, UndoError
from fluxfire.plan import COPY, Handle, Step, refusal

MARK: Final = "_fluxfire"
_MISSING: Final = object()


class Wrapper:
    """A callable in the place of a bound method: calls `around(wrapped, *args, **kwargs)`.

    It keeps the signature of what it wraps, since diffusers inspects it. It refuses to be copied or pickled: a copied
    module would carry this wrapper, and so run the original's weights.
    """

    def __init__(self, wrapped: Callable[..., Any], around: Callable[..., Any]) -> None:
        functools.update_wrapper(self, wrapped)
        self.wrapped = wrapped
        self.around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `around` with what was wrapped."""
        return self.around(self.wrapped, *args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise CopyError(COPY)


@dataclass(frozen=True, slots=True)
class _Attribute:
    owner: Any
    name: str
    ours: Any
    before: Any  # what stood in the owner's __dict__, or _MISSING

    def current(self) -> Any:
        return vars(self.owner).get(self.name, _MISSING)

    def gone(self) -> bool:
        """Whether somebody put the class's own method back, as accelerate does when its hook was below us and goes."""
        own = getattr(type(self.owner), self.name, _MISSING)
        return self.current() is _MISSING or getattr(self.current(), "__func__", None) is own

    def blocked(self) -> bool:
        return self.current() is not self.ours and not self.gone() and _link(self.owner, self.ours) is None

    def put_back(self) -> None:
        if self.current() is not self.ours:
            if link := _link(self.owner, self.ours):
                setattr(*link, self.ours.wrapped)
        elif self.before is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


class Patch:
    """The changes made to one pipeline, and the way back."""

    def __init__(self) -> None:
        self._changes: list[_Attribute | Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._changes)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Puts `value` at `owner.name`, on the instance."""
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        self._changes.append(_Attribute(owner, name, value, before))

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Wraps the bound method `owner.name`: calls become `around(method, *args, **kwargs)`."""
        self.set(owner, name, Wrapper(getattr(owner, name), around))

    def on_undo(self, reverse: Callable[[], object]) -> None:
        """Calls `reverse()` at its turn in the undo: for changes that are no attributes, such as a tensor's layout."""
        self._changes.append(reverse)

    def undo(self, start: int = 0) -> None:
        """Takes back all changes after the first `start`, the last one first.

        Raises:
            UndoError: somebody wrapped an attribute in a way that we cannot step out of. Nothing was changed.
        """
        attributes = [change for change in self._changes[start:] if isinstance(change, _Attribute)]
        outermost = {(id(change.owner), change.name): change for change in attributes}.values()
        blockers = [
            f"{type(change.owner).__name__}.{change.name} was replaced by {_code(change.current())}"
            for change in outermost
            if change.blocked()
        ]
        if blockers:
            raise UndoError("; ".join(blockers) + ": take that off, then call fluxfire.restore_pipeline(pipe)")
        while len(self._changes) > start:
            change = self._changes[-1]
            change.put_back() if isinstance(change, _Attribute) else change()
            self._changes.pop()  # last: a change that cannot be taken back now can be later


def _link(obj: Any, ours: Any) -> tuple[Any, str] | None:
    """Where another library's wrapper of `obj`'s forward keeps `ours` as what it calls next: (holder, attribute)."""
    if vars(obj).get("_old_forward") is ours:  # accelerate.hooks.add_hook_to_module
        return obj, "_old_forward"
    registry = vars(obj).get("_diffusers_hook")  # diffusers.hooks.HookRegistry
    for reference in getattr(registry, "_fn_refs", ()):
        for attribute in ("original_forward", "forward"):
            if getattr(reference, attribute) is ours:
                return reference, attribute
    return None


def _code(value: Any) -> str:
    """The function behind `value`, by its code: `update_wrapper` gives wrappers the name of what they wrap."""
    code = getattr(getattr(value, "func", value), "__code__", None)
    return f"{code.co_qualname} ({code.co_filename})" if code else repr(value)


class Workaround:
    """A repair of an upstream bug in a module's function: the one change that is process-wide.

    It is made only where `broken(function)` says that the bug is here, counted over the denoisers that need it, and
    gone with the last of them.
    """

    def __init__(
        self,
        module: str,
        function: str,
        broken: Callable[[Callable[..., Any]], bool],
        repair: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self._module, self._function, self._broken, self._repair = module, function, broken, repair
        self._holders: set[int] = set()
        self._original: Callable[..., Any] | None = None

    def hold(self, handle: Handle) -> None:
        """Keeps the repair in place until this handle is undone or its denoiser is gone."""
        module = importlib.import_module(self._module)
        function = getattr(module, self._function)
        if not self._holders:
            if not self._broken(function):
                return
            self._original = function
            setattr(module, self._function, self._repair(function))
        release = weakref.finalize(handle.denoiser, self._release, id(handle))
        self._holders.add(id(handle))
        handle.patch.on_undo(release)

    def _release(self, holder: int) -> None:
        self._holders.remove(holder)
        if not self._holders:
            setattr(importlib.import_module(self._module), self._function, self._original)


def handle_of(pipe: Any) -> Handle | None:
    """The mark on `pipe`, or on its denoiser: `from_pipe` makes a second pipeline around the same denoiser."""
    handle: Handle | None = vars(pipe).get(MARK) or vars(denoiser_of(pipe)).get(MARK)
    return handle


@contextmanager
def applying(pipe: Any, step: Step, reason: str | None) -> Iterator[Handle]:
    """Applies one step: changes go through the handle's `patch`, and none stay if the body raises.

    Raises:
        StepError: `reason`, or the step's place among the steps applied so far, refuses it. Nothing was changed.
    """
    handle = handle_of(pipe)
    reason = refusal(step, tuple(handle.steps) if handle else ()) or reason
    if reason:
        raise StepError(f"{step.name}: {reason}")
    handle = handle or mark(pipe)
    start = len(handle.patch)
    try:
        yield handle
    except BaseException:
        handle.patch.undo(start)
        if not handle.steps:
            unmark(handle)
        raise
    handle.steps.append(step)


def mark(pipe: Any) -> Handle:
    """Puts a new `Handle` on the pipeline and on its denoiser."""
    handle = Handle(pipe, denoiser_of(pipe), Patch())
    for owner in (handle.pipe, handle.denoiser):
        setattr(owner, MARK, handle)
    return handle


def unmark(handle: Handle) -> None:
    """Takes the mark off again."""
    for owner in (handle.pipe, handle.denoiser):
        vars(owner).pop(MARK, None)
