"""Restore the attributes, containers and variables that func sets.

Without that, a module that keeps its last result would keep that of a probe, or a tensor of a transform that has ended.
"""

from __future__ import annotations

import operator
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence
from typing import Any, Final

from torch import Tensor

from autojac.guards.tokens import SCALARS
from autojac.guards.walker import MODULE_FIELDS
from autojac.torch_internals import pytree

MISSING: Final = object()
CONTAINERS: Final = frozenset({dict, list, set, deque, defaultdict, OrderedDict})


class VariableMapping(MutableMapping[str, Any]):
    """Some global variables, or the one variable of a cell, as a mapping."""

    def __init__(self, place: dict[str, Any] | types.CellType, names: Iterable[str] = ("cell_contents",)) -> None:
        self.place = place
        self.names = tuple(names)

    def __getitem__(self, name: str) -> Any:
        if isinstance(self.place, dict):
            return self.place[name]
        try:
            return self.place.cell_contents
        except ValueError:  # not assigned
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(self.place, dict):
            self.place[name] = value
        else:
            self.place.cell_contents = value

    def __delitem__(self, name: str) -> None:
        if isinstance(self.place, dict):
            del self.place[name]
        else:
            del self.place.cell_contents

    def __iter__(self) -> Any:
        return (name for name in self.names if self.get(name, MISSING) is not MISSING)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class AttributeMapping(MutableMapping[str, Any]):
    """Attributes of a class, or those that an object holds in slots, as a mapping.

    Args:
        owner: the class or object.
        names: gives the names of attributes that there may be.
    """

    def __init__(self, owner: Any, names: Callable[[], Iterable[str]]) -> None:
        self.owner = owner
        self.names = names

    def __getitem__(self, name: str) -> Any:
        if isinstance(self.owner, type):  # a function, where getattr would give a method
            return vars(self.owner)[name]
        try:
            return getattr(self.owner, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        # of an instance, bypass a class that is frozen or has a `__setattr__` of its own
        (setattr if isinstance(self.owner, type) else object.__setattr__)(self.owner, name, value)

    def __delitem__(self, name: str) -> None:
        (delattr if isinstance(self.owner, type) else object.__delattr__)(self.owner, name)

    def __iter__(self) -> Any:
        return (name for name in self.names() if self.get(name, MISSING) is not MISSING)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class BufferMapping(MutableMapping[str, Any]):
    """A module's buffers, which `Module.to` replaces: one keeps the dtype and device that func gives it."""

    def __init__(self, place: dict[str, Any]) -> None:
        self.place = place

    def __getitem__(self, name: str) -> Any:
        return self.place[name]

    def __setitem__(self, name: str, value: Any) -> None:
        now = self.place.get(name)
        if isinstance(value, Tensor) and isinstance(now, Tensor):
            value = value.to(now.device, now.dtype)  # itself where neither has changed
        self.place[name] = value

    def __delitem__(self, name: str) -> None:
        del self.place[name]

    def __iter__(self) -> Any:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)


class Snapshot:
    """The contents of places, and of the containers in them, at one time.

    Args:
        places: dicts, lists, sets, deques, `VariableMapping` and `AttributeMapping`.
    """

    def __init__(self, places: Sequence[Any]) -> None:
        self.places: list[Any] = []
        self.copies: list[Any] = []
        todo, visited = list(reversed(places)), set()
        while todo:
            place = todo.pop()
            if id(place) in visited:
                continue
            visited.add(id(place))
            copy = _copy(place)
            self.places.append(place)
            self.copies.append(copy)
            # a container that an earlier call has put there is reached in no other way
            todo += [value for value in _values(copy) if type(value) in CONTAINERS]

    def find_changes(self) -> list[Any]:
        """Return the places that hold something else now."""
        return [place for place, copy in zip(self.places, self.copies, strict=True) if not _same(copy, _copy(place))]

    def differences(self) -> list[tuple[Any, Any]]:
        """Return each place and key that holds another object now; the key is None where a place has no keys."""
        differences: list[tuple[Any, Any]] = []
        for place, copy in zip(self.places, self.copies, strict=True):
            if _same(copy, _copy(place)):
                continue
            if not isinstance(copy, dict):
                differences.append((place, None))
                continue
            keys = dict.fromkeys((*copy, *place))
            differences += [(place, key) for key in keys if copy.get(key, MISSING) is not place.get(key, MISSING)]
        return differences

    def exchanged(self, kind: type) -> bool:
        """Check whether every change replaces an object of a kind, or a nest of such, by another."""
        return all(
            isinstance(copy, dict)
            and copy.keys() == place.keys()
            and all(
                isinstance(leaf, kind)
                for name, value in place.items()
                if not _alike(copy[name], value)
                for leaf in pytree.tree_leaves((copy[name], value))
            )
            for place, copy in zip(self.places, self.copies, strict=True)
            if not _same(copy, _copy(place))
        )

    def without_graph(self) -> None:
        """Detach the tensors that were put into the places since then."""
        before = {id(value) for copy in self.copies for value in (copy.values() if isinstance(copy, dict) else copy)}
        for place in self.find_changes():
            if isinstance(place, MutableSet):
                continue
            for at, value in place.items() if isinstance(place, Mapping) else enumerate(place):
                tensors, shape = pytree.tree_flatten(value)
                numbers = [value if id(value) in before else _without_graph(value) for value in tensors]
                if not all(map(operator.is_, tensors, numbers)):
                    place[at] = pytree.tree_unflatten(numbers, shape)

    def restore(self) -> list[Any]:
        """Put back the contents; return the places that held something else."""
        changed = []
        for place, copy in zip(self.places, self.copies, strict=True):
            if not _same(copy, _copy(place)):
                changed.append(place)
                replace_contents(place, copy)
        return changed


def _copy(place: Any) -> Any:
    if isinstance(place, MutableMapping):
        return dict(place)
    return set(place) if isinstance(place, MutableSet) else list(place)


def _values(copy: Any) -> Iterator[Any]:
    if isinstance(copy, dict):
        # a module's buffers are a place of their own, its parameters and hooks are none
        yield from (value for name, value in copy.items() if name not in MODULE_FIELDS)
    else:
        yield from copy


def _same(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(_equal(value, other.get(name, MISSING)) for name, value in one.items())
    return one == other if isinstance(one, set) else all(map(_equal, one, other))


def _equal(one: Any, other: Any) -> bool:
    # a float that is another object was set again, and may differ for another input
    return one is other or (type(one) not in (float, complex) and _alike(one, other))


def _alike(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in SCALARS and one == other)


def replace_contents(place: Any, copy: Any) -> None:
    """Set the contents of a place to those of a copy."""
    if isinstance(place, MutableMapping):
        for name in [name for name in place if name not in copy]:
            del place[name]
        for name, value in copy.items():
            if place.get(name, MISSING) is not value:
                place[name] = value
    elif isinstance(place, MutableSet):
        place.clear()
        for item in copy:
            place.add(item)
    elif isinstance(place, (MutableSequence, deque)):
        place.clear()
        place.extend(copy)


def _without_graph(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.requires_grad or value.is_leaf:
        return value
    try:
        return value.detach_()
    except RuntimeError:  # a view
        return value.detach()


def leaving(
    compute: Callable[..., Any], places: Sequence[Any], plainly: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Wrap a computation so that it leaves in `places` what one plain call of func leaves.

    Args:
        compute: the computation.
        places: what func sets.
        plainly: makes the plain call; None where func sets nothing any more in a plain call.
    """

    def run(leaves: Any, kwargs: Mapping[str, Any]) -> Any:
        snapshot = Snapshot(places)
        try:
            result = compute(leaves, kwargs)
        finally:
            snapshot.restore()
        if plainly is not None:
            plainly(leaves, kwargs)
        return result

    return run
