"""Notice that Python has changed what a function reads: variables, attributes, items of containers, code and hooks."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autojac.guards.provenance import code_names, is_library
from autojac.guards.walker import HOOKS, Walk

MOST_CHANGES = 4
"""A place that changes more often than this, such as a counter of calls, is not looked at any more."""


@dataclass
class _Place:
    """One object that holds what is read, and what it held: kept, so that no other object gets its identity."""

    look: Callable[[], Iterable[Any]]
    held: list[Any]
    identities: list[int]
    changes: int = 0


class Reads:
    """What a callable reaches, held against what it reached at the last look.

    Objects are compared by identity, so that nothing of theirs runs. What is behind a name computed as the function
    runs (`getattr`, `eval`, files, a generator's state) is not seen.

    Args:
        func: the callable.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        walk = _Places()
        walk.visit(func)
        self._places = []
        for look in walk.looks:
            held = list(look())
            self._places.append(_Place(look, held, list(map(id, held))))

    def changed(self) -> Literal["", "tensors", "objects"]:
        """What is another object than at the last look: nothing, tensors in place of others alone, or more.

        Tensors are free to be exchanged: their contents decide, which are compared elsewhere.
        """
        found: Literal["", "tensors", "objects"] = ""
        for place in self._places:
            try:
                held = list(place.look())
            except RuntimeError:  # another thread is writing there
                found = "objects"
                continue
            identities = list(map(id, held))
            if identities == place.identities:
                continue
            if _exchanged(place.held, held):
                found = found or "tensors"
            else:
                found = "objects"
                place.changes += 1
            place.held, place.identities = held, identities
        if found == "objects":
            self._places = [place for place in self._places if place.changes <= MOST_CHANGES]
        return found


def _exchanged(before: list[Any], after: list[Any]) -> bool:
    """Whether all that differs is a tensor that stands for another one."""
    return len(before) == len(after) and all(
        one is other or (type(one) is type(other) and isinstance(one, Tensor))
        for one, other in zip(before, after, strict=True)
    )


class _Places(Walk):
    """A walk that notes how to look again at each object that holds others."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[Callable[[], Iterable[Any]]] = []

    def _module(self, module: torch.nn.Module) -> None:
        # parameters count by shape, and torch sees to it that these are parameters
        kept = vars(module)
        self.looks += [kept.values, module._modules.values, module._buffers.values]
        self.looks += [hooks.values for name in HOOKS if (hooks := kept.get(name)) is not None]
        super()._module(module)

    def _function(self, function: types.FunctionType) -> None:
        self.looks.append(lambda: (function.__code__, function.__defaults__, function.__kwdefaults__))
        if function.__closure__:
            self.looks.append(_contents(function.__closure__))
        scope = function.__globals__
        if not is_library(scope.get("__name__")):
            names = sorted(name for name in code_names(function.__code__) if name in scope)
            if names:
                self.looks.append(lambda: map(scope.get, names))
            self.looks += [vars(scope[name]).values for name in names if _own_module(scope[name])]
        super()._function(function)

    def _class(self, kind: type) -> None:
        if not is_library(kind.__module__):
            self.looks.append(vars(kind).values)
        super()._class(kind)

    def _container(self, obj: Any, kind: type) -> None:
        if isinstance(obj, dict):
            self.looks.append(obj.values)
        elif not isinstance(obj, (tuple, frozenset, types.MappingProxyType)):
            self.looks.append(obj.__iter__)
        super()._container(obj, kind)

    def _instance(self, obj: Any, kind: type) -> None:
        state = getattr(obj, "__dict__", None)
        if state is not None:
            self.looks.append(state.values)
        super()._instance(obj, kind)


def _contents(cells: Iterable[types.CellType]) -> Callable[[], Iterable[Any]]:
    def look() -> list[Any]:
        found = []
        for cell in cells:
            try:
                found.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                found.append(None)
        return found

    return look


def _own_module(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and not is_library(value.__name__)
