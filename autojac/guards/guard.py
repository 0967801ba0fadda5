"""Hold a trace of a callable to what the callable was when it was traced."""

from __future__ import annotations

import struct
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.guards.compiled_check import Held, checker
from autojac.guards.object_places import Reached
from autojac.guards.places import Place
from autojac.guards.tensor_metadata import Metadata, described
from autojac.guards.tokens import SCALARS


class Change(NamedTuple):
    """What is other than it was.

    Attributes:
        what: a short name of the first thing other than a tensor; empty if there is none.
        tensors: where nothing else has changed, the tensor that now stands wherever another stood, by the id of that.
    """

    what: str
    tensors: dict[int, Tensor]


class Guard:
    """Everything that a callable reads besides its arguments, and whether it is still the same.

    Not looked at: the values of tensors, which a replay reads anew; `__dict__` and hooks of torch's own modules that
    are set past the attributes that hold them; what is computed from outside the process.

    Args:
        func: the callable.

    Attributes:
        reason: why what `func` reads can't be listed, as a sentence; empty if it can.
        tensors: the distinct tensors that it reaches: parameters, buffers, those in closures, globals and attributes.
        codes: the code of every function of the user's that it reaches, nested functions included.
    """

    reason: str
    tensors: tuple[Tensor, ...]
    codes: tuple[types.CodeType, ...]

    def __init__(self, func: Callable[..., Any]) -> None:
        self._func = func
        self._walk()

    def holds(self) -> bool:
        """Whether everything is the object that it was; quick, and runs none of the user's code."""
        return self._unchanged()

    @property
    def check(self) -> Callable[[], bool]:
        """What `holds` calls, for who asks in every call; to be fetched again after `renew`."""
        return self._unchanged

    def compare(self) -> Change:
        """Tell a change from its appearance, such as an attribute set to what it was; slow."""
        try:
            return _Comparison(self._names, self._metadata).of(self._held)
        except RuntimeError:  # another thread is writing there
            return Change("something that another thread is changing", {})

    def renew(self) -> None:
        """Take the present state as the one to hold against; where it differs, all attributes are made anew."""
        if self.compare() == Change("", {}):
            self._hold()
        else:
            self._walk()

    def _walk(self) -> None:
        reached = Reached()
        reached.follow(self._func)
        self.reason = reached.reason
        self.tensors = tuple({id(tensor): tensor for tensor in reached.tensors}.values())
        self.codes = reached.codes
        self._places = tuple(reached.places)
        self._names = reached.called
        self._hold()

    def _hold(self) -> None:
        self._metadata = Metadata(self.tensors)
        self._unchanged = checker(self._look, self._places, self._metadata)

    def _look(self) -> Sequence[Held]:
        self._held = [(place, *place.look()) for place in self._places]
        return self._held


class _Comparison:
    """One look at all places beside what they held."""

    def __init__(self, names: dict[int, str], metadata: Metadata) -> None:
        self._names = names
        self._known = {id(t): known for t, known in zip(metadata.tensors, metadata.known, strict=True)}
        self._metadata = metadata
        self._now: dict[int, Tensor] = {}
        self._was: dict[int, Tensor] = {}

    def of(self, held: Sequence[Held]) -> Change:
        for place, keys, values in held:
            if what := self._place(place, keys, values):
                return Change(what, {})
        tensors = self._metadata.tensors
        for tensor, known, hooked in zip(tensors, self._metadata.known, self._metadata.hooked, strict=True):
            name = self._names.get(id(tensor), "a tensor")
            if described(tensor) != known:
                return Change(f"shape, type or requires_grad of {name}", {})
            if bool(tensor._backward_hooks) != hooked:
                return Change(f"hook of {name}", {})
        if len({id(tensor) for tensor in self._now.values()}) < len(self._now):
            return Change("a tensor that stands for two", {})
        swapped = {number: now for number, now in self._now.items() if now is not self._was[number]}
        return Change("", swapped)

    def _place(self, place: Place, keys: list[Any], values: list[Any]) -> str:
        now, found = place.look()
        for old, new in zip(keys, now, strict=False):
            if not alike(old, new):
                return place.label(old)
        if len(now) != len(keys):
            return place.label(max(keys, now, key=len)[min(len(keys), len(now))])
        for key, old, new in zip(keys, values, found, strict=True):
            if id(old) in self._known and type(new) is type(old):  # isinstance would ask a stranger for its class
                if not self._swap(old, new):
                    return place.label(key)
            elif not alike(old, new):
                return place.label(key)
        return ""

    def _swap(self, old: Tensor, new: Tensor) -> bool:
        """Whether a tensor may stand for another, as it does elsewhere."""
        if self._now.setdefault(id(old), new) is not new:
            return False
        self._was[id(old)] = old
        known = self._known[id(old)]
        return new is old or (known == described(new) and not new._backward_hooks and not new.__dict__)


def alike(one: Any, other: Any) -> bool:
    """Whether two objects are one, or equal constants of one type; nothing of the user's is asked."""
    if one is other:
        return True
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is float:
        return struct.pack("d", one) == struct.pack("d", other)
    if kind is complex:
        return alike(one.real, other.real) and alike(one.imag, other.imag)
    if kind in (tuple, torch.Size):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other) if kind in SCALARS or kind is torch.device else False
