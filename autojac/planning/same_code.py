"""Functions of the same code with other constants, such as a lambda that each step of a loop creates again.

Each is another function, probed and planned separately. They start from each other's plans, and the user is told which
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
from autojac.guards.places import cell_contents
from autojac.methods.base import Method

TOLD_AT = 5
"""How many functions of the same code, each with another value, need a plan before the user is warned."""
MOST_CODES = 256
PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Types of values that could be arguments."""


@dataclass
class SameCode:
    """What is known of the functions of one code.

    Attributes:
        values: what the last one held: variables of its closure, defaults, arguments of a partial.
        changes: how often another value was met, by name.
        method: by which the last one was computed.
        is_told: the user was told.
    """

    values: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    method: Method | None = None
    is_told: bool = False


_codes: OrderedDict[types.CodeType, SameCode] = OrderedDict()


def hint_for(func: Callable[..., Any]) -> list[Method]:
    """Return the method by which the last function of the same code was computed."""
    code, _ = _code_and_values(func)
    same = None if code is None else _codes.get(code)
    return [] if same is None or same.method is None else [same.method]


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
    same = _codes.setdefault(code, SameCode())
    _codes.move_to_end(code)
    while len(_codes) > MOST_CODES:
        _codes.popitem(last=False)
    differing = [key for key, value in values.items() if key in same.values and _differs(same.values[key], value)]
    same.values, same.method = values, method
    for key in differing:
        same.changes[key] = same.changes.get(key, 1) + 1
    frequent = [key for key, count in same.changes.items() if count >= TOLD_AT]
    if frequent and not same.is_told:
        same.is_told = True
        names = " and ".join(f"`{key}`" for key in frequent)
        warn(
            f"{name}: {TOLD_AT} functions of this code were wrapped, each with another value of {names}, and each is "
            f"probed and planned again. Wrap the function once, outside of the loop, and pass {names} as an argument: "
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
    values |= dict(zip(code.co_freevars, cell_contents(func), strict=True))
    names = code.co_varnames[: code.co_argcount]
    defaults = func.__defaults__ or ()
    values |= dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | (func.__kwdefaults__ or {})
    return code, {name: value for name, value in values.items() if type(value) in PLAIN}
