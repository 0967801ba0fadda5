"""What variables, classes and containers of packages held before code ran that may set them.

Where a package keeps something, such as a count of its calls, is only known once its code has run and has set it.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from autojac.guards.assignments import CONTAINERS, AttributeMapping, Snapshot, VariableMapping
from autojac.guards.bytecode import names_used
from autojac.guards.provenance import is_installed, own_names


class EarlierValues:
    """Values as they were when code that could set them was about to run for the first time."""

    def __init__(self) -> None:
        self._classes: set[type] = set()
        self._snapshots: list[Snapshot] = []

    def note(self, frame: types.FrameType) -> None:
        """Save what a frame that starts may set in its module, and in the classes of its first argument."""
        scope, code = frame.f_globals, frame.f_code
        places: list[Any] = []
        if is_installed(scope.get("__name__")) and (names := names_used(code).scope):
            places.append(VariableMapping(scope, names))
            places += [value for name in names if type(value := scope.get(name)) in CONTAINERS]
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            for kind in type.mro(first) if isinstance(first, type) else type(first).__mro__:
                if kind not in self._classes and is_installed(kind.__module__):
                    self._classes.add(kind)
                    places.append(AttributeMapping(kind, functools.partial(own_names, kind)))
                    places += [value for value in vars(kind).values() if type(value) in CONTAINERS]
        if places:
            self._snapshots.append(Snapshot(places))

    def restore(self) -> None:
        """Restore everything; the oldest snapshot last."""
        for snapshot in reversed(self._snapshots):
            snapshot.restore()
