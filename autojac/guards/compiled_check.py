"""Generate a function that checks in a few microseconds that a list of places holds the objects it held before.

A dict costs one comparison, of the version that Python (3.11) or torch (its watchers, from 3.12) counts for it. Empty
dicts, most of those of a module, are checked together, and so are tensors. Everything else is compared by identity, in
code generated for these places. None of the user's code runs.
"""

from __future__ import annotations

import functools
import operator
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from autojac.guards.places import (
    ABSENT,
    Attributes,
    Bytes,
    Callables,
    Cells,
    Fields,
    Items,
    Members,
    Names,
    Pinned,
    Place,
    class_dict,
)
from autojac.guards.tensor_metadata import Metadata
from autojac.torch_internals import dict_version

Reading = tuple[Place, list[Any], list[Any]]
"""A place with the keys and the values that it held."""

_FIELDS: Final = {
    "code": "__code__",
    "defaults": "__defaults__",
    "keyword defaults": "__kwdefaults__",
    "attributes": "__dict__",
}
# gone, or another thread is writing there
_UNREADABLE: Final = (LookupError, NameError, AttributeError, RuntimeError, TypeError)
# the user may have changed Python's own
_BUILTINS: Final = {function.__name__: function for function in (all, any, len, list, map, operator.is_, type)} | {
    "UNREADABLE": _UNREADABLE
}


@functools.cache
def change_counter(of_instances: bool) -> Callable[[dict[Any, Any]], int] | None:
    """Return what counts the changes of a dict in C; None where torch has no such thing, or it misses changes.

    Args:
        of_instances: whether the dict may be that of an instance, or else is of a class or a module: Python 3.13.0
            hides stores to attributes from watchers of the dict, but of instances only.
    """
    if dict_version is None:
        return None
    fresh = type("Probe", (), {})
    probes = [fresh()] if of_instances else [fresh, types.ModuleType("probe")]
    return dict_version if all(_sound(dict_version, probe) for probe in probes) else None


def _sound(version: Callable[[Any], int], probe: Any) -> bool:
    """Check whether every store to an attribute is counted for the dict that holds it, also by specialized bytecode."""
    store = types.FunctionType(_store.__code__.replace(), {})  # not specialized for another kind of object
    store(probe, 0)
    held = class_dict(probe) if isinstance(probe, type) else vars(probe)
    for number in range(1000):
        before = version(held)
        store(probe, number + 1)
        stored = version(held)
        held["stored"] = -1
        written = version(held)
        del probe.stored
        if len({before, stored, written, version(held)}) < 4 or version(held) != version(held):
            return False
        store(probe, 0)
    return True


def _store(probe: Any, value: int) -> None:
    probe.stored = value


def versions_of(places: Sequence[Place], restless: Collection[int] = ()) -> dict[int, int]:
    """Return the versions of the dicts behind places, by id, as far as something counts them.

    Args:
        places: the places.
        restless: ids of dicts that are written to all the time without effect: these are compared entry by entry.
    """
    versions: dict[int, int] = {}
    for place in places:
        if isinstance(place, Items) and id(place.owner) not in restless:
            version = change_counter(not isinstance(place, (Attributes, Callables)))
            if version is not None:
                versions[id(place.owner)] = version(place.owner)
    return versions


def checker(
    read: Callable[[], Sequence[Reading]], places: Sequence[Place], metadata: Metadata, restless: Collection[int] = ()
) -> Callable[[], bool]:
    """Generate the function that compares places with what they hold at this moment.

    Args:
        read: reads the places.
        places: the places.
        metadata: of the tensors in these places.
        restless: as in `versions_of`.
    """
    versions = versions_of(places, restless)  # before reading: a race fails
    draft = _Draft()
    for place, keys, values in read():
        draft.place(place, keys, values, versions)
    if draft.empty:
        draft.terms.append(f"not any({draft.constant(tuple(draft.empty))})")
    if draft.dicts:
        names = [draft.constant(part) for part in (dict_version, draft.dicts, draft.versions)]
        draft.terms.append("list(map({}, {})) == {}".format(*names))
    if metadata.tensors:
        draft.tensors(metadata)
    return draft.function()


class _Draft:
    """The terms of the function and the objects that they name."""

    def __init__(self) -> None:
        self.terms: list[str] = []
        self.empty: list[dict[Any, Any]] = []
        self.dicts: list[dict[Any, Any]] = []
        self.versions: list[int] = []
        self._cells: list[types.CellType] = []
        self._numbers: dict[int, int] = {}
        self._seen: set[tuple[int, str]] = set()

    def constant(self, value: Any) -> str:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._cells)
            self._cells.append(types.CellType(value))
        return f"v{self._numbers[id(value)]}"

    def variable(self, cell: types.CellType) -> str:
        self._cells.append(cell)
        return f"v{len(self._cells) - 1}"

    def place(self, place: Place, keys: list[Any], values: list[Any], versions: dict[int, int]) -> None:
        if isinstance(place, Names):
            self._names(place.owner, keys, values)
        elif isinstance(place, Cells):
            for cell, value in zip(place.owner, values, strict=True):
                if value is ABSENT:
                    self._look(place, keys, values)
                else:  # the written function shares the variable with the user's
                    self.terms.append(f"{self.variable(cell)} is {self.constant(value)}")
        elif isinstance(place, Fields):
            self._fields(place, values)
        elif isinstance(place, Items):
            self._items(place, keys, values, versions)
        elif isinstance(place, Members):
            self._members(place, keys, values)
        elif isinstance(place, Bytes):
            self.terms.append(f"{self.constant(place.contents)}() == {self.constant(values[0])}")
        elif not isinstance(place, Pinned):
            self._look(place, keys, values)

    def _names(self, scope: dict[str, Any], names: list[str], values: list[Any]) -> None:
        for name, value in zip(names, values, strict=True):
            if (id(scope), name) not in self._seen:
                self._seen.add((id(scope), name))
                where = self.constant(scope)
                self.terms.append(
                    f"{name!r} not in {where}" if value is ABSENT else f"{where}[{name!r}] is {self.constant(value)}"
                )

    def _fields(self, place: Fields, values: list[Any]) -> None:
        owner = self.constant(place.owner)
        for (name, read), value in zip(place.fields, values, strict=True):
            known = self.constant(value)
            if name == "class":
                self.terms.append(f"type({owner}) is {known}")
            elif value is not ABSENT and isinstance(read, functools.partial):
                self.terms.append(f"{self.constant(read.args[0].__get__)}({owner}) is {known}")
            elif name in _FIELDS:
                self.terms.append(f"{owner}.{_FIELDS[name]} is {known}")
            else:
                self.terms.append(f"{self.constant(read)}({owner}) is {known}")

    def _items(self, place: Items, keys: list[Any], values: list[Any], versions: dict[int, int]) -> None:
        owner = place.owner
        if not dict.__len__(owner) and type(owner) in (dict, OrderedDict):
            self.empty.append(owner)
        elif id(owner) not in versions:
            self._look(place, keys, values)
        else:
            self.dicts.append(owner)
            self.versions.append(versions[id(owner)])

    def _members(self, place: Members, keys: list[Any], values: list[Any]) -> None:
        kind = type(place.owner)
        if kind in (list, set, deque, OrderedDict):
            owner = self.constant(place.owner)
            self.terms.append(f"len({owner}) == {len(values)} and all(map(is_, {owner}, {self.constant(values)}))")
        elif not issubclass(kind, (tuple, frozenset)):
            self._look(place, keys, values)

    def _look(self, place: Place, keys: list[Any], values: list[Any]) -> None:
        self.terms.append(f"{self.constant(functools.partial(_same, place, keys, values))}()")

    def tensors(self, metadata: Metadata) -> None:
        tensors, again = self.constant(metadata.tensors), self.constant(metadata.same)
        if metadata.quick is not None:
            self.terms.append(f"({self.constant(metadata.quick)}(*{tensors}) or {again}())")
        else:
            self.terms.append(f"{again}()")
        handles = class_dict(torch.utils.hooks.RemovableHandle)
        count = types.CellType(handles.get("next_id"))
        hooked = functools.partial(_hooks_unchanged, metadata.tensors, metadata.hooked, handles, count)
        # counts all hooks ever made, so that tensors need no comparison unless there is one more
        self.terms.append(
            f"({self.constant(handles)}['next_id'] == {self.variable(count)} or {self.constant(hooked)}())"
        )

    def function(self) -> Callable[[], bool]:
        code = _compiled(tuple(self.terms), len(self._cells))
        cells = tuple(self._cells[int(name[1:])] for name in code.co_freevars)
        return types.FunctionType(code, {"__builtins__": _BUILTINS}, "unchanged", None, cells)


@functools.lru_cache(maxsize=256)
def _compiled(terms: tuple[str, ...], variables: int) -> types.CodeType:
    """Compile the function. Its code names no objects, so that it serves all lists of places of the same kinds."""
    names = ", ".join(f"v{number}" for number in range(variables))
    lines = [
        f"def outer({names}):",
        " def unchanged():",
        "  try:",
        f"   return {' and '.join(terms) or 'True'}",
        "  except UNREADABLE:",
        "   return False",
        " return unchanged",
    ]
    scope: dict[str, Any] = {}
    exec(compile("\n".join(lines), "<autojac guard>", "exec"), scope)
    (code,) = (const for const in scope["outer"].__code__.co_consts if isinstance(const, types.CodeType))
    return code


def _same(place: Place, keys: list[Any], values: list[Any]) -> bool:
    now, held = place.read()
    alike = len(now) == len(keys) and len(held) == len(values)
    return alike and all(map(operator.is_, now, keys)) and all(map(operator.is_, held, values))


def _hooks_unchanged(
    tensors: tuple[Tensor, ...], hooked: tuple[bool, ...], handles: dict[str, Any], count: types.CellType
) -> bool:
    made = handles.get("next_id")
    if tuple(bool(tensor._backward_hooks) for tensor in tensors) != hooked:
        return False
    count.cell_contents = made
    return True
