"""Generate a function that checks in a few microseconds that a list of places holds the objects it held before.

A dict costs one comparison, of the version that Python (3.11) or torch (its watchers, from 3.12) counts for it. What
words in memory show, most of all that a model holds, is compared in one pass, and so are tensors. Everything else is
compared by identity, in code generated for these places. None of the user's code runs.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from autojac.guards.dict_versions import versions_of
from autojac.guards.memory_words import CONTENT, LENGTH, NAMES, SIZES, VERSION, MemoryWords
from autojac.guards.places import (
    ABSENT,
    FUNCTION_FIELDS,
    Bytes,
    Cells,
    Fields,
    FixedTensor,
    Items,
    Members,
    Names,
    Place,
    class_dict,
)
from autojac.guards.provenance import is_core
from autojac.guards.tensor_metadata import Metadata
from autojac.torch_internals import dict_version

Reading = tuple[Place, list[Any], list[Any]]
"""A place with the keys and the values that it held."""

_FIELDS: Final = FUNCTION_FIELDS | {"default dtype": "get_default_dtype()"}
# gone, or another thread is writing there
_UNREADABLE: Final = (LookupError, NameError, AttributeError, RuntimeError, TypeError)
# the user may have changed Python's own
_BUILTINS: Final = {function.__name__: function for function in (all, any, len, list, map, operator.is_, type)} | {
    "UNREADABLE": _UNREADABLE
}


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
    # before reading: a race fails
    versions, words = versions_of(places, restless), words_of(places, restless)
    draft = _Draft(words)
    for place, keys, values in read():
        draft.place(place, keys, values, versions)
    if words:
        draft.memory_words()
    if draft.empty:
        draft.terms.append(f"not any({draft.constant(tuple(draft.empty))})")
    if draft.dicts:
        names = [draft.constant(part) for part in (dict_version, draft.dicts, draft.versions)]
        draft.terms.append("list(map({}, {})) == {}".format(*names))
    if metadata.tensors:
        draft.tensors(metadata)
    return draft.function()


def words_of(places: Sequence[Place], restless: Collection[int] = ()) -> MemoryWords:
    """Return the words that show changes of places, as far as there are such."""
    words = MemoryWords()
    for place in places:
        owner = place.owner
        if isinstance(place, Items):
            if _is_empty(owner):
                words.add(owner, LENGTH)
            elif id(owner) not in restless:
                words.add(owner, VERSION)
        elif isinstance(place, Names):
            # the user's variables may be set in each turn of a loop
            if owner is sys.modules or is_core(owner.get("__name__")):
                words.add(owner, NAMES)
        elif isinstance(place, Members):
            if type(owner) in SIZES and not owner:
                words.add(owner, SIZES[type(owner)])
        elif isinstance(place, Cells):
            for cell in owner:
                words.add(cell, CONTENT)
        elif isinstance(place, Fields):
            for name, read in place.fields:
                if (name in _FIELDS and type(owner) is types.FunctionType) or read is type:
                    words.add(owner, name)
    words.note()
    return words


def _is_empty(owner: Any) -> bool:
    return type(owner) in (dict, OrderedDict) and not dict.__len__(owner)


class _Draft:
    """The terms of the function and the objects that they name.

    Args:
        words: what needs no term.
    """

    def __init__(self, words: MemoryWords) -> None:
        self.words = words
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
                if (cell, CONTENT) in self.words:
                    continue
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
        elif not isinstance(place, FixedTensor):
            self._look(place, keys, values)

    def _names(self, scope: dict[str, Any], names: list[str], values: list[Any]) -> None:
        for name, value in zip(names, values, strict=True):
            if (id(scope), name) not in self._seen:
                self._seen.add((id(scope), name))
                if (scope, NAMES) in self.words:
                    self.words.expect(scope, name, value)
                    continue
                where = self.constant(scope)
                self.terms.append(
                    f"{name!r} not in {where}" if value is ABSENT else f"{where}[{name!r}] is {self.constant(value)}"
                )

    def _fields(self, place: Fields, values: list[Any]) -> None:
        owner = self.constant(place.owner)
        for (name, read), value in zip(place.fields, values, strict=True):
            if (place.owner, name) in self.words:
                continue
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
        if (owner, VERSION) in self.words or (not keys and (owner, LENGTH) in self.words):
            pass
        elif _is_empty(owner):
            self.empty.append(owner)
        elif id(owner) not in versions:
            self._look(place, keys, values)
        else:
            self.dicts.append(owner)
            self.versions.append(versions[id(owner)])

    def _members(self, place: Members, keys: list[Any], values: list[Any]) -> None:
        kind = type(place.owner)
        if not values and (place.owner, SIZES.get(kind, "")) in self.words:
            pass
        elif kind in (list, set, deque, OrderedDict):
            owner = self.constant(place.owner)
            self.terms.append(f"len({owner}) == {len(values)} and all(map(is_, {owner}, {self.constant(values)}))")
        elif not issubclass(kind, (tuple, frozenset)):
            self._look(place, keys, values)

    def _look(self, place: Place, keys: list[Any], values: list[Any]) -> None:
        self.terms.append(f"{self.constant(functools.partial(_same, place, keys, values))}()")

    def memory_words(self) -> None:
        words = self.words
        parts = self.constant(words.memory), self.constant(words.where), self.variable(words.known)
        self.terms.append("({}[{}].tobytes() == {} or ".format(*parts) + f"{self.constant(words.only_other_names)}())")

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
        code = _compile(tuple(self.terms), len(self._cells))
        cells = tuple(self._cells[int(name[1:])] for name in code.co_freevars)
        # by its module it is known for autojac's own, where a wrapper differentiates what another wrapper gives
        scope = {"__builtins__": _BUILTINS, "__name__": __name__}
        return types.FunctionType(code, scope, "unchanged", None, cells)


@functools.lru_cache(maxsize=256)
def _compile(terms: tuple[str, ...], variables: int) -> types.CodeType:
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
    # a wrapper inside of another one may compile its guard while that watches: it is known by its module
    scope: dict[str, Any] = {"__name__": __name__}
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
