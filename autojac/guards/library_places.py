"""List the places of what Python's own library and NumPy keep: loggers, caches, context variables, arrays."""

from __future__ import annotations

import contextvars
import functools
import gc
import logging
import operator
import os
import threading
from typing import Any, Final

from torch import Tensor

from autojac.guards.function_places import FunctionPlaces
from autojac.guards.places import ABSENT, Bytes, Fields, FixedTensor, Items
from autojac.guards.provenance import is_core

_LOGGERS: Final = (("disabled level", operator.attrgetter("disable")),)
MOST_BYTES: Final = 4096
"""Size up to which a NumPy array is copied and compared in every call."""
_PLAIN_NUMPY: Final = ("ufunc", "_ArrayFunctionDispatcher")


class LibraryPlaces(FunctionPlaces):
    """What functions hold and look up, and objects of Python's library whose state is not in attributes."""

    def _of_python(self, obj: Any, kind: type) -> bool:
        """List an object of Python's library; return whether it is one."""
        if isinstance(obj, contextvars.ContextVar):
            self._place(Fields(obj, f"{{}} of {obj.name}", (("value", _in_context),)))
            self.visit(_in_context(obj))
        elif isinstance(obj, threading.local):
            self._thread_local(obj, kind)
        elif obj is os.environ:
            self._environment()
        elif isinstance(obj, logging.Logger):
            self._logger(obj)
        elif kind.__module__ == "pybind11_builtins":
            pass  # behind functions made in C++, without other state
        elif isinstance(obj, functools._lru_cache_wrapper):
            self._list_cache(obj)
        else:
            return False
        return True

    def _of_numpy(self, obj: Any, kind: type) -> None:
        if kind.__name__ != "ndarray" and any(base.__name__ == "ndarray" for base in kind.__mro__):
            self._give_up(kind)
        elif kind.__name__ == "ndarray":
            if obj.dtype.hasobject:
                self._give_up(kind)
            elif obj.nbytes > MOST_BYTES:
                self.refuse(f"it holds an array of numpy's of {obj.nbytes} bytes; make it a tensor")
            else:
                self._place(Bytes(obj, self.labels.get(id(obj), "array")))
        elif kind.__name__ not in _PLAIN_NUMPY and not hasattr(kind, "dtype") and "dtypes" not in kind.__module__:
            self._instance(obj, kind)

    def _thread_local(self, obj: threading.local, kind: type) -> None:
        """List what an object holds for this thread; another thread sees another dict, which is a change."""
        state = _of_thread(obj)
        self._place(Fields(obj, "{} of a thread-local object", (("class", type), ("state", _of_thread))))
        self._place(Items(state, f"attribute {{}} of {kind.__name__}"))
        self._walk_named("thread-local", kind=kind, state=dict(state))

    def _logger(self, logger: logging.Logger) -> None:
        """List what decides whether a logger writes a line; where lines go affects no result."""
        self._place(Fields(logger.manager, "{} of all loggers", _LOGGERS))
        self._class(type(logger))
        above: Any = logger
        while above is not None:
            self._place(Items(vars(above), "{} of a logger"))
            above = above.parent

    def _list_cache(self, function: Any) -> None:
        """List what an `lru_cache` keeps: results that were computed earlier, perhaps of other globals."""
        self._walk_named("cached", function=function.__wrapped__)
        if is_core(function.__wrapped__.__module__):
            return
        todo, known = [function], {id(vars(function)), id(function.__wrapped__)}
        while todo:
            for part in gc.get_referents(todo.pop()):
                if id(part) in known or isinstance(part, type):
                    continue
                known.add(id(part))
                if type(part) is dict:
                    self._place(Items(part, f"result kept by {function.__name__}"))
                if type(part) is dict or type(part).__name__ == "_lru_list_elem":
                    todo.append(part)
                else:
                    if isinstance(part, Tensor):
                        self._place(FixedTensor(None, f"result kept by {function.__name__}", part))
                    self.visit(part)


def _in_context(variable: contextvars.ContextVar[Any]) -> Any:
    """Return the value of a context variable, its default included."""
    try:
        return variable.get()
    except LookupError:
        return ABSENT


def _of_thread(local: Any) -> dict[str, Any]:
    """Return what an object that differs from thread to thread holds in this one."""
    state: dict[str, Any] = threading.local.__getattribute__(local, "__dict__")
    return state
