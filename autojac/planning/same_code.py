"""Functions of the same code with other constants, such as a lambda made again in each step of a loop.

Each is another function, probed and planned on its own. They start from each other's plans, and the user is told which
value should rather be an argument.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from autojac.errors import PerformanceWarning, warn
from autojac.methods.base import Method

TOLD_AT = 5
"""A warning comes when so many functions of the same code have needed a plan, each with another value."""
MOST_CODES = 256
PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Kinds of values that would do as arguments."""


@dataclass
class SameCode:
    """What is known of the functions of one code.

    Attributes:
        values: what the last one held: variables of its closure, defaults, arguments of a partial.
        changes: how often another value was met, by name.
        method: what the last one was computed by.
        is_told: the user was told.
    """

    values: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    method: Method | None = None
    is_told: bool = False


_codes: OrderedDict[types.CodeType, SameCode] = OrderedDict()


def hint_for(func: Callable[..., Any]) -> list[Method]:
    """Return what the last function of the same code was computed by."""
    code, _ = _code_and_values(func)
    known = None if code is None else _codes.get(code)
    return [] if known is None or known.method is None else [known.method]


def note_plan(func: Callable[..., Any], name: str, method: Method) -> None:
    """Remember a function that needed a plan, and warn where many of the same code have differed in a plain value.

    Args:
        func: the function.
        name: human-readable.
        method: what it is computed by.
    """
    code, values = _code_and_values(func)
    if code is None:
        return
    known = _codes.setdefault(code, SameCode())
    _codes.move_to_end(code)
    while len(_codes) > MOST_CODES:
        _codes.popitem(last=False)
    differing = [key for key, value in values.items() if key in known.values and _differs(known.values[key], value)]
    known.values, known.method = values, method
    for key in differing:
        known.changes[key] = known.changes.get(key, 1) + 1
    often = [key for key, count in known.changes.items() if count >= TOLD_AT]
    if often and not known.is_told:
        known.is_told = True
        listed = " and ".join(f"`{key}`" for key in often)
        warn(
            f"{name}: {TOLD_AT} functions of this code were wrapped, each with another value of {listed}, and each is "
            f"probed and planned again. Wrap the function once, outside of the loop, and pass {listed} as an argument: "
            "jac(x, value)",
            PerformanceWarning,
        )


def _differs(one: Any, other: Any) -> bool:
    return type(one) in PLAIN and type(other) in PLAIN and (type(one), one) != (type(other), other)


def _code_and_values(func: Callable[..., Any]) -> tuple[types.CodeType | None, dict[str, Any]]:
    """Return a function's code, and the plain values that it holds by name."""
    values: dict[str, Any] = {}
    while isinstance(func, functools.partial):
        values |= {f"argument {place}": value for place, value in enumerate(func.args)} | func.keywords
        func = func.func
    if not isinstance(func, types.FunctionType):
        return None, {}
    code = func.__code__
    for name, cell in zip(code.co_freevars, func.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # it is empty so far
            continue
    names = code.co_varnames[: code.co_argcount]
    defaults = func.__defaults__ or ()
    values |= dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | (func.__kwdefaults__ or {})
    return code, {name: value for name, value in values.items() if type(value) in PLAIN}
