"""Find the names that code looks up: globals, attributes, and modules that it imports as it runs."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from autojac.guards.escapes import ESCAPES, HISTORY

_GLOBAL: Final = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "STORE_GLOBAL", "DELETE_GLOBAL"})
_VALUE: Final = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "LOAD_ATTR", "IMPORT_FROM"})
_STATE: Final = ESCAPES | HISTORY
# functions and attributes that look up names which are computed as the code runs
_DYNAMIC: Final = frozenset({"getattr", "hasattr", "vars", "__dict__", "__getattribute__", "attrgetter"})


@dataclass(frozen=True)
class NamesUsed:
    """The names that a code object and those nested in it look up.

    Attributes:
        codes: these code objects.
        scope: names looked up in the globals, then among the builtins.
        attributes: names that may be looked up in objects: attributes and strings that could be names.
        imported: modules imported inside the code: how many packages up from the code's own (0 for absolute names), the
            name, and what is taken from it.
        dynamic: whether it may compute names of attributes.
        values: names of globals and attributes that it looks up other than to call them immediately.
        state: an attribute of tensors that it looks up other than to call it immediately, and that shows their values
            or what else was done with them; empty if there is none.
    """

    codes: tuple[types.CodeType, ...]
    scope: tuple[str, ...]
    attributes: frozenset[str]
    imported: tuple[tuple[int, str, tuple[str, ...]], ...]
    dynamic: bool
    values: frozenset[str]
    state: str


class CodeKey:
    """A code object as a key by identity: equal code is not the same code, and hashing code takes long."""

    def __init__(self, code: types.CodeType) -> None:
        self.code = code

    def __hash__(self) -> int:
        return id(self.code)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodeKey) and other.code is self.code


def names_used(code: types.CodeType) -> NamesUsed:
    """Return the names that a code object looks up."""
    return _names_used(CodeKey(code))


@functools.lru_cache(maxsize=4096)
def _names_used(key: CodeKey) -> NamesUsed:
    codes = tuple(_nested_code(key.code))
    scope: set[str] = set()
    attributes: set[str] = set()
    imported: set[tuple[int, str, tuple[str, ...]]] = set()
    values: set[str] = set()
    state = ""
    for code in codes:
        attributes.update(code.co_names, strings_in(code.co_consts))
        constants: list[Any] = []
        for step in dis.get_instructions(code):
            if step.opname in _VALUE and not _is_called(step):
                values.add(step.argval)
            if step.opname in _GLOBAL:
                scope.add(step.argval)
            elif step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
                constants.append(step.argval)
            elif step.opname == "LOAD_ATTR" and step.argval in _STATE and not _is_called(step):
                state = step.argval
            elif step.opname == "IMPORT_NAME":
                imported.add((constants[-2], step.argval, constants[-1] or ()))
    return NamesUsed(
        codes,
        tuple(sorted(scope)),
        frozenset(attributes),
        tuple(sorted(imported)),
        bool(attributes & _DYNAMIC),
        frozenset(values),
        state,
    )


def _is_called(step: dis.Instruction) -> bool:
    """Check whether what is looked up is called next: the lowest bit says so, for attributes from Python 3.12."""
    has_flag = step.opname == "LOAD_GLOBAL" or (step.opname == "LOAD_ATTR" and sys.version_info >= (3, 12))
    return has_flag and bool((step.arg or 0) & 1)


def _nested_code(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _nested_code(const)


def strings_in(consts: tuple[Any, ...]) -> Iterator[str]:
    """Yield the strings among constants that could be names."""
    for const in consts:
        if isinstance(const, str) and const.isidentifier():
            yield const
        elif isinstance(const, (tuple, frozenset)):
            yield from strings_in(tuple(const))
