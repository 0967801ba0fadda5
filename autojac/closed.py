"""Watch a function run, and say whether all that it read is what a guard can hold it to."""

from __future__ import annotations

import sys
import types
from collections.abc import Collection
from typing import Any, Self

from torch import Tensor

from autojac.origin import is_library
from autojac.outside import c_reason, frame_reason

_HANDED = frozenset({"tolist", "numpy"})  # no operator shows in a trace, whoever calls them

_MADE_BY_COLLECTIONS = "namedtuple_"  # the module of a named tuple's constructor


class Watched:
    """While it is entered, every call of the thread is looked at.

    Watched are the frames of Python functions and the calls of C functions from the user's code. What C calls by
    itself (`map(time.time, ...)`) shows no frame: guards look at functions that are passed as values.

    Args:
        codes: the user's code that a guard knows of.

    Attributes:
        reason: why the run read something that no guard can list; empty if it did not.
    """

    def __init__(self, codes: Collection[types.CodeType]) -> None:
        self.reason = ""
        self._codes = tuple(codes)
        self._known = {id(code) for code in codes}
        self._frames: dict[int, tuple[types.CodeType, bool, str]] = {}
        self._calls: dict[tuple[Any, ...], str] = {}
        self._before: Any = None
        self._import: types.FrameType | None = None

    def __enter__(self) -> Self:
        self._before = sys.getprofile()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        if hasattr(self._before, "enable"):  # cProfile's, which is no function
            self._before.enable()
        elif self._before is not None:
            sys.setprofile(self._before)

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if self._import is not None:
            if frame is self._import and event == "return":
                self._import = None
            return
        if self.reason:
            return
        if event == "call":
            self._frame(frame)
        elif event == "c_call":
            self._c_call(frame, arg)

    def _frame(self, frame: types.FrameType) -> None:
        code = frame.f_code
        if id(code) in self._known or frame.f_globals.get("__name__", "").startswith(_MADE_BY_COLLECTIONS):
            return
        if code.co_name == "_find_and_load" and not self._of_user(frame.f_back):
            self._import = frame  # a library loads what it needs, once
            return
        kept = self._frames.get(id(code))
        if kept is None:
            home = str(frame.f_globals.get("__name__") or "")
            if is_library(home):
                kept = code, True, frame_reason(home, code.co_name)
            else:
                found = f"it runs {code.co_qualname} of {home or code.co_filename}, which can't be found by looking "
                kept = code, False, f"{found}through what func holds"
            self._frames[id(code)] = kept
        _, library, reason = kept
        if reason and (not library or self._of_user(frame.f_back)):
            self.reason = reason

    def _c_call(self, frame: types.FrameType, function: Any) -> None:
        owner = getattr(function, "__self__", None)
        name = function.__name__
        if id(frame.f_code) not in self._known:
            if name in _HANDED and isinstance(owner, Tensor) and _counts(frame):
                self.reason = f"it reads values of a tensor ({name})"
            return
        key = (type(owner), owner if isinstance(owner, type) else None, getattr(function, "__module__", None), name)
        reason = self._calls.get(key)
        if reason is None:
            reason = self._calls[key] = c_reason(function)
        self.reason = reason

    def _of_user(self, frame: types.FrameType | None) -> bool:
        return frame is not None and id(frame.f_code) in self._known


def _counts(frame: types.FrameType) -> bool:
    return not str(frame.f_globals.get("__name__")).startswith("autojac.")
