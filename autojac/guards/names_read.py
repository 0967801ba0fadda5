"""Where code reads a name: an attribute or variable that code sets and never reads does not affect later calls."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch

from autojac.guards.bytecode import CodeKey, names_used, strings_in
from autojac.guards.provenance import is_core

_READS: Final = (
    *("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_GLOBAL", "LOAD_NAME", "IMPORT_FROM", "LOAD_DEREF"),
    *("LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR", "DELETE_ATTR", "DELETE_GLOBAL", "DELETE_NAME"),
)
# functions and attributes that may read any name
_ALL: Final = frozenset(
    {"vars", "__dict__", "attrgetter", "__getattribute__", "globals", "locals", "eval", "exec", "methodcaller"}
)
_BY_NAME: Final = ("getattr", "hasattr")
ANY: Final = ""
"""Stands for every name, where a name is computed."""


def lines_read(code: types.CodeType) -> Mapping[str, int]:
    """Return the lines in which a code object reads names, by name; strings that could be names count as such.

    Not counted: what a counter reads to be incremented, as in `self.calls += 1`.
    """
    return _lines_read(CodeKey(code))


def own_code(kind: type) -> Iterator[types.CodeType]:
    """Yield the code of torch's and Python's own classes among a class and its bases.

    Left out is that of `torch.nn.Module`, which reads nothing but the fields that each module has, `MODULE_FIELDS`.
    """
    for base in kind.__mro__:
        if is_core(base.__module__) and base is not torch.nn.Module:
            yield from (value.__code__ for value in vars(base).values() if isinstance(value, types.FunctionType))


@functools.lru_cache(maxsize=4096)
def _lines_read(key: CodeKey) -> Mapping[str, int]:
    lines: dict[str, int] = {}
    uses = names_used(key.code)
    for code in uses.codes:
        steps, line = list(dis.get_instructions(code)), code.co_firstlineno
        for at, step in enumerate(steps):
            position = step.positions
            line = (position.lineno if position is not None else None) or line
            if not step.opname.startswith(_READS) or not isinstance(step.argval, str):
                continue
            if step.argval in _ALL or (step.argval in _BY_NAME and not _is_constant(steps[at + 1 :])):
                lines.setdefault(ANY, line)
            elif not _counts(steps, at):
                lines.setdefault(step.argval, line)
        for name in strings_in(code.co_consts):
            lines.setdefault(name, code.co_firstlineno)
    return MappingProxyType(lines)


def _is_constant(steps: Sequence[dis.Instruction]) -> bool:
    """Check whether a name that getattr or hasattr is called with is written out."""
    for step in steps:
        if step.opname.startswith("CALL"):
            return False
        if step.opname == "LOAD_CONST" and isinstance(step.argval, str):
            return True
    return False


def _counts(steps: Sequence[dis.Instruction], at: int) -> bool:
    """Check whether what is read is a number that is incremented and stored where it was: `name += 1`."""
    name, after = steps[at].argval, [step for step in steps[at + 1 : at + 5] if step.opname != "NOP"]
    if len(after) < 3 or after[0].opname not in ("LOAD_CONST", "LOAD_SMALL_INT"):
        return False
    if type(after[0].argval) not in (int, float) or after[1].opname != "BINARY_OP" or "=" not in after[1].argrepr:
        return False
    if steps[at].opname == "LOAD_ATTR":
        is_copied = at > 0 and steps[at - 1].opname == "COPY" and steps[at - 1].arg == 1
        is_stored = len(after) > 3 and after[2].opname == "SWAP" and after[3].opname == "STORE_ATTR"
        return is_copied and is_stored and after[3].argval == name
    return after[2].opname == "STORE_GLOBAL" and after[2].argval == name
