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
from typing import Any, Final, NoReturn, cast

from fluxfire.blocks import code_of, denoiser_of, is_own
from fluxfire.errors import CopyError, StepError, UndoError
from fluxfire.plan import COPY, Handle, Step, refusal

MARK: Final = "_fluxfire"
_MISSING: Final = object()


class Wrapper(functools.partial[Any]):
    """A callable in the place of a bound method: `Wrapper(around, wrapped)` calls `around(wrapped, *args, **kwargs)`.

    It keeps the signature of what it wraps, since diffusers inspects it. It refuses to be copied or pickled: a copied
    module would carry this wrapper, and so run the original's weights.
    """

    def __init__(self, around: Callable[..., Any], wrapped: Callable[..., Any]) -> None:
        functools.update_wrapper(self, wrapped)
        self.wrapped = wrapped

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise CopyError(COPY)


@dataclass(frozen=True, slots=True)
class _Attribute:
    owner: Any
    name: str
    ours: Any
    before: Any  # what stood in the owner's __dict__, or _MISSING

    def place(self) -> tuple[Any, str] | None:
        """Where ours is now: (holder, attribute); where it was put, or in the chain of another library's hooks."""
        # accelerate keeps what it wraps at `_old_forward`, and puts it back at `forward` when its hook goes.
        places = [(self.owner, name) for name in (self.name, "_old_forward", "forward")]
        registry = vars(self.owner).get("_diffusers_hook")  # diffusers.hooks.HookRegistry
        references = getattr(registry, "_fn_refs", ())
        places += [(reference, name) for reference in references for name in ("original_forward", "forward")]
        return next((place for place in places if vars(place[0]).get(place[1], _MISSING) is self.ours), None)

    def gone(self) -> bool:
        """Whether somebody put the class's own method back, as accelerate does when its hook was below us and goes."""
        current = vars(self.owner).get(self.name, _MISSING)
        return current is _MISSING or is_own(self.owner, self.name)

    def blocked(self) -> bool:
        return self.place() is None and not self.gone()

    def put_back(self) -> None:
        place = self.place()
        if place == (self.owner, self.name):
            if self.before is _MISSING:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.before)
        elif place:
            setattr(*place, self.ours.wrapped)
            if place[0] is self.owner and place[1] == "forward" and is_own(self.owner, "forward"):
                del self.owner.forward


@dataclass(frozen=True, slots=True)
class _Final:
    reason: str


class Patch:
    """The changes made to one pipeline, and the way back."""

    def __init__(self) -> None:
        self._changes: list[_Attribute | _Final | Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._changes)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Puts `value` at `owner.name`, on the instance."""
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        self._changes.append(_Attribute(owner, name, value, before))

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Wraps the bound method `owner.name`: calls become `around(method, *args, **kwargs)`.

        Below a hook of accelerate, which diffusers takes off and puts on anew after every picture: a wrapper on top
        of it would be thrown away then.
        """
        if name == "forward" and "_hf_hook" in vars(owner) and "_old_forward" in vars(owner):
            name = "_old_forward"
        self.set(owner, name, Wrapper(around, getattr(owner, name)))

    def lost(self) -> list[str]:
        """Attributes of ours that somebody has thrown away: that part of a step is not in effect any more."""
        return [f"{type(it.owner).__name__}.{it.name}" for it in self._outermost() if it.place() is None]

    def _outermost(self, start: int = 0) -> list[_Attribute]:
        """Of several wrappers of ours around one method the last: the others are where it wraps them."""
        changes = [change for change in self._changes[start:] if isinstance(change, _Attribute)]
        chain = {"_old_forward": "forward"}
        return list({(id(it.owner), chain.get(it.name, it.name)): it for it in changes}.values())

    def on_undo(self, reverse: Callable[[], object]) -> None:
        """Calls `reverse()` at its turn in the undo: for changes that are no attributes, such as a tensor's layout."""
        self._changes.append(reverse)

    def final(self, reason: str) -> None:
        """What comes now cannot be taken back: an undo from before it is refused with this reason."""
        self._changes.append(_Final(reason))

    def undo(self, start: int = 0) -> None:
        """Takes back all changes after the first `start`, the last one first.

        Raises:
            UndoError: somebody wrapped an attribute in a way that we cannot step out of, or something is final.
                Nothing was changed.
        """
        if final := next((change for change in self._changes[start:] if isinstance(change, _Final)), None):
            raise UndoError(final.reason)
        blockers = [
            f"{type(change.owner).__name__}.{change.name} was replaced by {code_of(vars(change.owner)[change.name])}"
            for change in self._outermost(start)
            if change.blocked()
        ]
        if blockers:
            raise UndoError("; ".join(blockers) + ": take that off, then call fluxfire.restore_pipeline(pipe)")
        while len(self._changes) > start:
            change = self._changes[-1]
            assert not isinstance(change, _Final)
            change.put_back() if isinstance(change, _Attribute) else change()
            self._changes.pop()  # last: a change that cannot be taken back now can be later


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
        self._ours: Callable[..., Any] | None = None

    def hold(self, handle: Handle) -> None:
        """Keeps the repair in place until this handle is undone or its denoiser is gone."""
        module = importlib.import_module(self._module)
        function = getattr(module, self._function)
        if not self._holders:
            if not self._broken(function):
                return
            self._original, self._ours = function, self._repair(function)
            setattr(module, self._function, self._ours)
        release = weakref.finalize(handle.denoiser, self._release, id(handle))
        self._holders.add(id(handle))
        handle.patch.on_undo(release)

    def _release(self, holder: int) -> None:
        self._holders.remove(holder)
        module = importlib.import_module(self._module)
        if not self._holders and getattr(module, self._function) is self._ours:  # else somebody patched over it
            setattr(module, self._function, self._original)


def handle_of(pipe: Any) -> Handle | None:
    """The mark on the pipeline's denoiser, which all pipelines around it share (`from_pipe` makes such).

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.
    """
    handle: Handle | None = vars(denoiser_of(pipe)).get(MARK)
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
    except BaseException as cause:
        try:
            handle.patch.undo(start)
        except UndoError as final:  # the mark stays: whoever restores is told so too
            cause.add_note(f"{step.name} cannot be taken back: {final}")
        else:
            if not handle.steps:
                unmark(handle)
        raise
    handle.steps.append(step)


def mark(pipe: Any) -> Handle:
    """Puts a new `Handle` on the pipeline's denoiser."""
    denoiser = denoiser_of(pipe)
    setattr(denoiser, MARK, Handle(denoiser, Patch()))
    return cast(Handle, handle_of(pipe))


def unmark(handle: Handle) -> None:
    """Takes the mark off again."""
    vars(handle.denoiser).pop(MARK, None)
