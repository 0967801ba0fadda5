"""Compare fields of live objects in one pass: that each holds the object that it held takes a nanosecond.

CPython keeps an object where it is as long as it lives, and what one of its fields holds is a word there, a pointer.
Where in an object the word of a field lies is found by trial on objects made for that: the one word that follows every
store. A field without such a word, as on a Python made in another way, is left to other means of comparison. Nothing
is read but the fixed part of objects that are kept alive, and nothing is written.
"""

from __future__ import annotations

import ctypes
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from autojac.guards.dict_versions import counts_changes
from autojac.guards.places import ABSENT, class_dict

_WORD: Final = 8
_LOWEST, _HIGHEST = 1 << 12, 1 << 47
"""Bounds of the addresses that processes of 64 bits have their objects at."""

VERSION, NAMES, CONTENT, LENGTH = "version", "names", "content", "length"
"""Fields that have a word: of a dict, of a cell, and how many entries a dict has."""
SIZES: Final[dict[type, str]] = {list: "size", set: "used"}
"""Fields that tell how many elements there are."""

Stores = Callable[[], Iterator[tuple[Any, int]]]
"""Yields an object after each of some stores to a field of it, with the word that there must be for that field."""


class MemoryWords:
    """Words of live objects, and whether they are what they were.

    Attributes:
        memory, where: an array, and where in it the words are. A compiled check compares them without a call.
        known: a cell with the words as they were, as bytes.
    """

    memory: npt.NDArray[Any]
    where: npt.NDArray[np.intp]
    known: types.CellType

    def __init__(self) -> None:
        self._owners: list[Any] = []
        self._known: dict[tuple[int, str], int] = {}
        self._indices: list[int] = []
        self._names: dict[int, list[tuple[dict[str, Any], str, Any]]] = {}

    def add(self, owner: Any, field: str) -> None:
        """Compare a field of an object from the next `note` on, if there is a word for it.

        Args:
            owner: the object; it is kept alive.
            field: `VERSION` of a dict, `NAMES` for some names in it, or a key of `FIELDS`.
        """
        offset = version_offset() if field in (VERSION, NAMES) else offset_of(field)
        if offset is None or not _is_in_reach(owner):
            return
        if (id(owner), field) not in self._known:
            self._known[id(owner), field] = len(self._indices)
            self._owners.append(owner)
            self._indices.append((id(owner) + offset - _LOWEST) // _WORD)

    def __contains__(self, key: tuple[Any, str]) -> bool:
        return (id(key[0]), key[1]) in self._known

    def __len__(self) -> int:
        return len(self._indices)

    def note(self) -> None:
        """Compare with the words as they are at this moment."""
        self.where = np.array(self._indices, dtype=np.intp)
        memory = _memory()
        # one that has nothing to show is never asked
        self.memory = self.where if memory is None else memory
        self._words = self.memory[self.where]
        self.known = types.CellType(self._words.tobytes())

    def expect(self, scope: dict[str, Any], name: str, value: Any) -> None:
        """Take writes to a dict whose version is compared for no change as long as a name in it has its value."""
        self._names.setdefault(self._known[id(scope), NAMES], []).append((scope, name, value))

    def only_other_names(self) -> bool:
        """Check whether nothing has moved but versions of dicts in which the names that count have their values."""
        words = self.memory[self.where]
        for index in np.flatnonzero(words != self._words).tolist():
            names = self._names.get(index)
            if names is None or any(dict.get(scope, name, ABSENT) is not value for scope, name, value in names):
                return False
        self._words, self.known.cell_contents = words, words.tobytes()
        return True


@functools.cache
def _memory() -> npt.NDArray[np.uint64] | None:
    """Return the addresses of this process as an array of words; None where words or addresses have other sizes."""
    if ctypes.sizeof(ctypes.c_void_p) != _WORD:
        return None
    words: Any = (ctypes.c_uint64 * ((_HIGHEST - _LOWEST) // _WORD)).from_address(_LOWEST)
    return np.frombuffer(words, dtype=np.uint64)


def _is_in_reach(owner: Any) -> bool:
    return _LOWEST <= id(owner) < _HIGHEST - type(owner).__basicsize__


def _reader(owner: Any, offset: int) -> Callable[[object], int]:
    """Return what reads a word of an object that is kept alive, whatever its argument."""
    memory = _memory()
    assert memory is not None
    read, index = memory.item, (id(owner) + offset - _LOWEST) // _WORD
    return lambda _: read(index)


@functools.cache
def offset_of(field: str) -> int | None:
    """Return where in an object the word of a field lies, in bytes; None where no single word follows each store."""
    kind, stores = FIELDS[field]
    offsets = list(range(0, kind.__basicsize__, _WORD)) if _memory() is not None else []
    for owner, expected in stores():
        if not _is_in_reach(owner):
            return None
        offsets = [offset for offset in offsets if _reader(owner, offset)(owner) == expected]
    return offsets[0] if len(offsets) == 1 else None


@functools.cache
def version_offset() -> int | None:
    """Return where in a dict the count of its changes lies, in bytes; None where Python keeps none that is complete."""
    offsets = list(range(0, dict.__basicsize__, _WORD)) if _memory() is not None else []
    probes = (types.SimpleNamespace(), types.ModuleType("probe"), type("Probe", (), {}), type("Probe", (), {})())
    for probe in probes:
        held = class_dict(probe) if isinstance(probe, type) else vars(probe)
        if not _is_in_reach(held):
            return None
        offsets = [offset for offset in offsets if counts_changes(_reader(held, offset), probe)]
    return offsets[0] if len(offsets) == 1 else None


def _of_function(attribute: str, values: Sequence[Any]) -> tuple[type, Stores]:
    def stores() -> Iterator[tuple[Any, int]]:
        def probe() -> None: ...

        for value in values:
            setattr(probe, attribute, value)
            yield probe, id(value)

    return types.FunctionType, stores


def _of_cell() -> Iterator[tuple[Any, int]]:
    cell = types.CellType()
    for value in ([], [], []):  # type: ignore[var-annotated]
        cell.cell_contents = value
        yield cell, id(value)


def _of_object() -> Iterator[tuple[Any, int]]:
    kinds = [type("Probe", (), {}) for _ in range(3)]
    probe = kinds[0]()
    for kind in kinds:
        probe.__class__ = kind
        yield probe, id(kind)


def _of_container(*kinds: Callable[[Any], Any]) -> tuple[type, Stores]:
    def stores() -> Iterator[tuple[Any, int]]:
        for make in kinds:
            for length in (0, 17, 5):
                yield make(range(length)), length

    return type(kinds[0](())), stores


def _with_gaps(keys: range) -> set[int]:
    """Return a set that has had other elements too, for which it keeps room."""
    found = {-2, -1, *keys}
    found -= {-2, -1}
    return found


_CODES: Final = [offset_of.__wrapped__.__code__.replace(co_firstlineno=line) for line in (1, 2, 3)]
FIELDS: Final[dict[str, tuple[type, Stores]]] = {
    "code": _of_function("__code__", _CODES),
    "defaults": _of_function("__defaults__", [(number,) for number in range(3)]),
    "keyword defaults": _of_function("__kwdefaults__", [{}, {}, {}]),
    "attributes": _of_function("__dict__", [{}, {}, {}]),
    CONTENT: (types.CellType, _of_cell),
    "class": (object, _of_object),
    LENGTH: _of_container(dict.fromkeys, OrderedDict.fromkeys),
    SIZES[list]: _of_container(list),
    SIZES[set]: _of_container(_with_gaps),
}
"""Fields of objects that have a word, the objects' class, and what finds the word."""
