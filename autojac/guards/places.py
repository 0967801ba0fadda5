"""The places where a callable's behaviour is kept: dicts, lists, cells and fields that Python can change."""

from __future__ import annotations

import functools
import gc
import importlib.machinery
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

ABSENT: Final = type("Absent", (), {"__repr__": lambda self: "absent"})()
Spot = tuple[int, type, str | None]
"""Identifies what may change: the id of an owner, the kind of place, and a key; None stands for all of the place."""

PYTHON_CACHES: Final = frozenset(
    ("__slotnames__", "__annotations__", "__annotations_cache__", "__annotate_func__", "__warningregistry__")
)
"""Names that Python writes into classes and modules by itself: copy, pickle, help() and warnings do."""

FUNCTION_FIELDS: Final = {
    "code": "__code__",
    "defaults": "__defaults__",
    "keyword defaults": "__kwdefaults__",
    "attributes": "__dict__",
}
"""What a function holds besides its closure, by human-readable names."""
_FUNCTIONS: Final = (types.FunctionType, types.BuiltinFunctionType)
_BASES: Final = (list, tuple, set, frozenset, deque, OrderedDict)
_PLAIN_C: Final = frozenset({object, dict, list, tuple, set, frozenset, deque, int, float, complex, str, bytes})


@dataclass(frozen=True, eq=False)
class Place:
    """One object that holds what is read.

    Attributes:
        owner: the object.
        name: human-readable; `{}` stands for the key where one is of interest.
    """

    owner: Any
    name: str

    def read(self) -> tuple[list[Any], list[Any]]:
        """Return the keys and the values held now, without running any code of the user's."""
        raise NotImplementedError

    def label(self, key: Any) -> str:
        """Return a human-readable name of the thing at a key."""
        return self.name.replace("{}", str(key) if type(key) in (str, int) else type(key).__name__)

    def spot(self, key: Any = None) -> Spot:
        """Return what identifies the thing at a key, as long as the owner lives; by default the whole place."""
        return id(self.owner), type(self), key if type(key) is str else None

    def without(self, spots: Collection[Spot]) -> Place | None:
        """Return the rest of the place without some spots; None if nothing is left."""
        owner, kind, whole = self.spot()
        keys = {key for number, other, key in spots if number == owner and other is kind}
        if whole in keys:
            return None
        return PartialPlace(self.owner, self.name, self, frozenset(keys)) if keys else self


class Items(Place):
    """All entries of a dict."""

    def read(self) -> tuple[list[Any], list[Any]]:
        return list(dict.keys(self.owner)), list(dict.values(self.owner))


class Attributes(Items):
    """The attributes of a class or a module, without what Python keeps there for itself."""

    def read(self) -> tuple[list[Any], list[Any]]:
        items = [(key, value) for key, value in dict.items(self.owner) if key not in PYTHON_CACHES]
        return [key for key, _ in items], [value for _, value in items]


class Callables(Items):
    """The functions in a library's module, which may be replaced; what it imports lazily is left out."""

    def read(self) -> tuple[list[Any], list[Any]]:
        items = [(key, value) for key, value in dict.items(self.owner) if isinstance(value, _FUNCTIONS)]
        return [key for key, _ in items], [value for _, value in items]


class Members(Place):
    """The elements of a list, set or deque, the order of an OrderedDict.

    Those of a tuple too, which can't change but shows where a tensor stands.
    """

    def read(self) -> tuple[list[Any], list[Any]]:
        base = next(base for base in _BASES if issubclass(type(self.owner), base))
        values = list(base.__iter__(self.owner))
        return list(range(len(values))), values


@dataclass(frozen=True, eq=False)
class Names(Place):
    """Some names in a dict that holds others too, such as a module's globals; they may be absent."""

    names: tuple[str, ...]

    def read(self) -> tuple[list[Any], list[Any]]:
        return list(self.names), [dict.get(self.owner, name, ABSENT) for name in self.names]


@dataclass(frozen=True, eq=False)
class Cells(Place):
    """The variables of a closure."""

    names: tuple[str, ...]

    def read(self) -> tuple[list[Any], list[Any]]:
        return list(self.names), [_content(cell) for cell in self.owner]


@dataclass(frozen=True, eq=False)
class Fields(Place):
    """What an object holds outside its dict: a class, defaults, slots."""

    fields: tuple[tuple[str, Callable[[Any], Any]], ...]

    def read(self) -> tuple[list[Any], list[Any]]:
        return [name for name, _ in self.fields], [self._value(read) for _, read in self.fields]

    def _value(self, read: Callable[[Any], Any]) -> Any:
        try:
            return read(self.owner)
        except TypeError:  # a descriptor of the class that the object had
            return ABSENT


class Bytes(Place):
    """A small NumPy array."""

    def contents(self) -> str:
        """Return all of the array as one string."""
        array = self.owner
        return repr((array.shape, array.strides, array.dtype.descr, array.tobytes()))

    def read(self) -> tuple[list[Any], list[Any]]:
        return ["contents"], [self.contents()]


@dataclass(frozen=True, eq=False)
class FixedTensor(Place):
    """A tensor that is held where nothing can replace it."""

    tensor: Tensor

    def read(self) -> tuple[list[Any], list[Any]]:
        return [""], [self.tensor]


@dataclass(frozen=True, eq=False)
class PartialPlace(Place):
    """A place without some of its keys."""

    whole: Place
    ignored: frozenset[str | None]

    def read(self) -> tuple[list[Any], list[Any]]:
        items = [(key, value) for key, value in zip(*self.whole.read(), strict=True) if not self._is_ignored(key)]
        return [key for key, _ in items], [value for _, value in items]

    def spot(self, key: Any = None) -> Spot:
        return self.whole.spot(key)

    def _is_ignored(self, key: Any) -> bool:
        return type(key) is str and key in self.ignored


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return ABSENT


def cell_contents(function: types.FunctionType) -> list[Any]:
    """Return the contents of a function's closure, `ABSENT` where a variable is not assigned yet."""
    return [_content(cell) for cell in function.__closure__ or ()]


def state_reader(kind: type) -> Callable[[Any], Any] | None:
    """Return a reader of instances' dicts that bypasses `__getattribute__`; None where there is no plain dict."""
    for base in kind.__mro__:
        descriptor = vars(base).get("__dict__")
        if descriptor is not None:
            plain = isinstance(descriptor, (types.GetSetDescriptorType, types.MemberDescriptorType))
            return descriptor.__get__ if plain else None
    return None


def slot_readers(kind: type) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    """Return readers of the slots of instances of a class; an empty slot reads as absent."""
    readers: dict[str, Callable[[Any], Any]] = {}
    for base in kind.__mro__:
        for name, descriptor in vars(base).items():
            if isinstance(descriptor, types.MemberDescriptorType) and name != "__dict__":
                readers.setdefault(name, functools.partial(_slot, descriptor))
    return tuple(readers.items())


def _slot(descriptor: types.MemberDescriptorType, obj: Any) -> Any:
    try:
        return descriptor.__get__(obj)
    except AttributeError:
        return ABSENT


def class_dict(kind: type) -> dict[str, Any]:
    """Return the dict behind a class, of which `vars` gives a proxy only."""
    (scope,) = (item for item in gc.get_referents(vars(kind)) if type(item) is dict)
    return scope


def hidden_state(kind: type) -> bool:
    """Check whether instances hold state that is neither in a dict nor in slots: made in C, or larger than these."""
    if issubclass(kind, BaseException):
        return False
    if any(is_made_in_c(base) for base in kind.__mro__ if base not in _PLAIN_C):
        return True
    root = next(base for base in kind.__mro__ if base in _PLAIN_C)
    if root.__itemsize__:  # numbers and tuples: what they hold can't change
        return False
    fields = len(slot_readers(kind))
    fields += kind.__dictoffset__ > 0
    fields += kind.__weakrefoffset__ > 0 and root.__weakrefoffset__ == 0
    return kind.__basicsize__ > root.__basicsize__ + fields * object.__basicsize__ // 2


def is_made_in_c(kind: type) -> bool:
    """Check whether a class belongs to an extension module."""
    if kind.__module__ in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return file.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
