"""Watch a function run, and say whether it read anything that no guard can compare."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

from autojac.guards.compiled_functions import runs_eagerly
from autojac.guards.earlier_values import EarlierValues
from autojac.guards.escapes import AS_OPERATORS, ESCAPES
from autojac.guards.provenance import is_core, is_installed
from autojac.guards.purity import (
    c_reason,
    frame_reason,
    is_inside,
    package,
    seeds,
    serves_torch,
    sets_random_state,
    tells_compilers,
)
from autojac.torch_internals import COMPILER, PYTREE_HOME, TENSOR_HOME, TRANSFORMS_HOME


class RunMonitor:
    """A context in which every call of the thread is checked against what guards can compare.

    It sees the frames of Python functions, and the calls of C functions from code that is neither Python's nor torch's:
    the function's own code, below. What C calls by itself (`map(time.time, ...)`) has no frame: guards inspect
    functions that are passed as values.

    Args:
        earlier: saves what the function's code may set, before it runs.

    Attributes:
        reason: why the run read something that no guard can list; empty if it did not.
        ran: the function's own code that ran, what it imported left out. `FunctionState.cover` has to know it.
        repeated: whether torch has set the state of random numbers, so that some are drawn again; a replay of
            operators that draw would draw others.
    """

    def __init__(self, earlier: EarlierValues | None = None) -> None:
        self.reason = ""
        self._earlier = earlier
        self.repeated = False
        self._own: dict[int, types.CodeType] = {}
        self._logging: dict[int, types.CodeType] = {}
        self._patches: dict[int, types.CodeType] = {}
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

    @property
    def ran(self) -> tuple[types.CodeType, ...]:
        return tuple(self._own.values())

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            self._frame(frame)
        elif event == "c_call" and not self.reason:
            self._c_call(frame, arg)

    def _frame(self, frame: types.FrameType) -> None:
        code = frame.f_code
        if id(code) in self._own:
            return
        verdict = self._frames.get(id(code))
        if verdict is None:
            home = _home(frame)
            if self._is_own(home, frame):
                if self._is_logged(frame):
                    self._logging[id(code)] = code
                elif not self._is_imported(frame):
                    self._own[id(code)] = code
                    if self._earlier is not None:
                        self._earlier.note(frame)
                return
            if not is_core(home):  # torch's, this time
                return
            verdict = self._frames[id(code)] = (code, *_verdict(home, code))
        _, callers, reason = verdict
        if reason and not self.reason and callers(self, frame.f_back):
            self.reason = reason

    def _is_own(self, home: str, frame: types.FrameType) -> bool:
        """Check whether a frame runs the function's own code, and not Python's or torch's."""
        if home.startswith("namedtuple_") and "_tuple_new" in frame.f_globals:  # made by collections, from names
            return False
        if is_installed(home) and self._is_patch(frame):
            self._patches[id(frame.f_code)] = frame.f_code
            return False
        return not is_core(home) and (not serves_torch(home) or self.by_user(frame.f_back))

    def _c_call(self, frame: types.FrameType, function: Any) -> None:
        owner = getattr(function, "__self__", None)
        name = function.__name__
        if id(frame.f_code) not in self._own:
            # whoever calls these, torch included
            if name in ESCAPES - AS_OPERATORS and isinstance(owner, Tensor) and package(_home(frame)) != "autojac":
                self.reason = f"it reads values of a tensor ({name})"
            return
        if name == "_getframe":
            # a package looks for who called it, to read annotations or to say where an error is
            self.reason = "" if is_installed(_home(frame)) else "it calls _getframe of sys"
            return
        key = (type(owner), owner if isinstance(owner, type) else None, getattr(function, "__module__", None), name)
        reason = self._calls.get(key)
        if reason is None:
            reason = self._calls[key] = c_reason(function)
        self.reason = reason

    def by_user(self, caller: types.FrameType | None) -> bool:
        """Check whether a frame runs the function's own code."""
        return caller is not None and id(caller.f_code) in self._own

    def by_others(self, caller: types.FrameType | None) -> bool:
        """Check whether a frame belongs to neither torch nor autojac, which are trusted here."""
        return caller is not None and _counts(caller)

    def by_any(self, caller: types.FrameType | None) -> bool:
        """Count calls by anyone."""
        return True

    def repeats(self, caller: types.FrameType | None) -> bool:
        """Check whether the user's code sets random numbers; torch's own only makes them repeat."""
        self.repeated = True
        return self.by_user(caller)

    def _is_patch(self, frame: types.FrameType) -> bool:
        """Check whether a package has replaced a function of torch's transforms by the one that runs."""
        caller, code = frame.f_back, frame.f_code
        while caller is not None and _home(caller) == PYTREE_HOME:
            caller = caller.f_back
        if caller is None or id(caller.f_code) in self._patches:
            return caller is not None
        original = caller.f_globals.get(code.co_name) if is_inside(_home(caller), (TRANSFORMS_HOME,)) else None
        return isinstance(original, types.FunctionType) and original.__code__ is code

    def _is_logged(self, frame: types.FrameType) -> bool:
        """Check whether a frame handles a line that is logged, which no result depends on."""
        caller = frame.f_back
        return caller is not None and (package(_home(caller)) == "logging" or id(caller.f_code) in self._logging)

    def _is_imported(self, caller: types.FrameType | None) -> bool:
        """Check whether a frame is part of an import."""
        while caller is not None and caller is not self._outside:
            if _home(caller).startswith("importlib."):
                return True
            if id(caller.f_code) in self._own:
                return False
            caller = caller.f_back
        return False


_Callers = Callable[[RunMonitor, types.FrameType | None], bool]


def _verdict(home: str, code: types.CodeType) -> tuple[_Callers, str]:
    """Return which callers make a frame of Python's or torch's code a reason, and the reason."""
    if is_inside(home, (COMPILER,)) and not tells_compilers(code.co_name):
        # without the compiler, what was compiled runs as it was written
        return RunMonitor.by_user, "" if runs_eagerly() else "it calls what torch.compile has compiled"
    reason = frame_reason(home, code.co_name)
    if sets_random_state(home, code.co_name):
        return RunMonitor.repeats, reason
    if seeds(home, code.co_name):
        return RunMonitor.by_any, reason
    own = home == TENSOR_HOME and code.co_name in ESCAPES
    return RunMonitor.by_others if own else RunMonitor.by_user, reason


def _home(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__") or "")


def _counts(frame: types.FrameType) -> bool:
    return package(_home(frame)) not in ("torch", "autojac")
