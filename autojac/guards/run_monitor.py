"""Watch a function run, and say whether it read anything that no guard can compare."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Collection
from typing import Any, Self

from torch import Tensor

from autojac.guards.escapes import ESCAPES
from autojac.guards.provenance import is_library
from autojac.guards.purity import c_reason, frame_reason, is_foreign, package, seeds, sets_random_state
from autojac.torch_internals import TENSOR_HOME


class RunMonitor:
    """A context in which every call of the thread is checked against what guards can compare.

    It sees the frames of Python functions and the calls of C functions from the user's code. What C calls by
    itself (`map(time.time, ...)`) shows no frame: guards look at functions that are passed as values.

    Args:
        codes: the user's code that a guard knows of.

    Attributes:
        reason: why the run read something that no guard can list; empty if it did not.
        repeated: whether torch has set the state of random numbers, so that some are drawn again; a replay of
            operators that draw would draw others.
    """

    def __init__(self, codes: Collection[types.CodeType]) -> None:
        self.reason = ""
        self.repeated = False
        self._codes = tuple(codes)
        self._known = {id(code) for code in codes}
        self._frames: dict[int, tuple[types.CodeType, _Callers, str]] = {}
        self._calls: dict[tuple[Any, ...], str] = {}
        self._before: Any = None
        self._outside: types.FrameType | None = None

    def __enter__(self) -> Self:
        self._outside = sys._getframe(1)
        self._before = sys.getprofile()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        self._outside = None
        if hasattr(self._before, "enable"):  # cProfile's, which is no function
            self._before.enable()
        elif self._before is not None:
            sys.setprofile(self._before)

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if self.reason:
            return
        if event == "call":
            self._frame(frame)
        elif event == "c_call":
            self._c_call(frame, arg)

    def _frame(self, frame: types.FrameType) -> None:
        code = frame.f_code
        if id(code) in self._known:
            return
        kept = self._frames.get(id(code))
        if kept is None:
            kept = self._frames[id(code)] = (code, *_verdict(frame))
        _, callers, reason = kept
        if reason and callers(self, frame.f_back):
            self.reason = reason

    def _c_call(self, frame: types.FrameType, function: Any) -> None:
        owner = getattr(function, "__self__", None)
        name = function.__name__
        if id(frame.f_code) not in self._known:
            # whoever calls them, the code of torch included; `item` is an operator
            if name in ESCAPES and name != "item" and isinstance(owner, Tensor) and package(_home(frame)) != "autojac":
                self.reason = f"it reads values of a tensor ({name})"
            return
        key = (type(owner), owner if isinstance(owner, type) else None, getattr(function, "__module__", None), name)
        reason = self._calls.get(key)
        if reason is None:
            reason = self._calls[key] = c_reason(function)
        self.reason = reason

    def by_user(self, caller: types.FrameType | None) -> bool:
        """Check whether a frame runs the user's code."""
        return caller is not None and id(caller.f_code) in self._known

    def by_others(self, caller: types.FrameType | None) -> bool:
        """Check whether a frame belongs to neither torch nor autojac, which see to it themselves."""
        return caller is not None and _counts(caller)

    def by_any(self, caller: types.FrameType | None) -> bool:
        """Whoever called."""
        return True

    def repeats(self, caller: types.FrameType | None) -> bool:
        """Check whether the user's code sets random numbers; torch's own only makes them repeat."""
        self.repeated = True
        return self.by_user(caller)

    def unless_imported(self, caller: types.FrameType | None) -> bool:
        """Check whether a frame is not part of what a library imports at its first use."""
        while caller is not None and not _home(caller).startswith("importlib."):
            if caller is self._outside or id(caller.f_code) in self._known:
                return True
            caller = caller.f_back
        while caller is not None and _home(caller).startswith("importlib."):
            caller = caller.f_back
        return caller is None or not is_library(_home(caller))


_Callers = Callable[[RunMonitor, types.FrameType | None], bool]


def _verdict(frame: types.FrameType) -> tuple[_Callers, str]:
    """Return which callers make a frame a reason, and the reason."""
    code, home = frame.f_code, _home(frame)
    if home.startswith("namedtuple_") and "_tuple_new" in frame.f_globals:  # made by collections, from names
        return RunMonitor.by_user, ""
    if is_library(home):
        if sets_random_state(home, code.co_name):
            return RunMonitor.repeats, frame_reason(home, code.co_name)
        if seeds(home, code.co_name):
            return RunMonitor.by_any, frame_reason(home, code.co_name)
        if is_foreign(home):
            return RunMonitor.unless_imported, frame_reason(home, code.co_name)
        own = home == TENSOR_HOME and code.co_name in ESCAPES
        return RunMonitor.by_others if own else RunMonitor.by_user, frame_reason(home, code.co_name)
    name = f"{code.co_qualname} of {home or code.co_filename}"
    return (
        RunMonitor.unless_imported,
        f"it calls {name}, which is not reachable from func's closures, globals or attributes",
    )


def _home(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__") or "")


def _counts(frame: types.FrameType) -> bool:
    return package(_home(frame)) not in ("torch", "autojac")
