"""What a function sets in each call and never reads: no replay has to set it, and no guard has to compare it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from autojac.errors import UnsupportedError
from autojac.guards.assignments import Snapshot
from autojac.guards.guard import Guard
from autojac.guards.places import Spot
from autojac.probe.kept_state import unlike


class WriteOnly:
    """What a function sets in each call and never reads, such as its last result or a counter of its calls.

    That is found out by putting in its place what can't be read, and then nothing at all.

    Args:
        evaluate: calls the function; what it sets is left as it is.
        places: where it may set something.
        guard: names what it reads.

    Raises:
        UnsupportedError: if it reads something that it has set in an earlier call, or keeps in a container.
    """

    def __init__(self, evaluate: Callable[[], Sequence[Tensor]], places: Sequence[Any], guard: Guard) -> None:
        held = Snapshot(places)
        expected = evaluate()
        self._set: list[tuple[Any, Any, Any]] = []
        self.spots: set[Spot] = set()
        self._names: list[str] = []
        for place, key in held.differences():
            if key is None:
                raise UnsupportedError(f"func changes a {type(place).__name__} that it keeps from call to call")
            named = guard.spots_of(place, key)
            self._set.append((place, key, _Unreadable(type(place.get(key)) in (int, float))))
            self.spots |= named.keys()
            self._names += list(named.values())[:1] or [str(key)]
        for absent in (False, True):
            held.restore()
            try:
                with self.unreadable(absent):
                    values = evaluate()
            except Exception as error:  # such as torch's, of what is no tensor
                raise self._refusal(error) from error
            if unlike(expected, values):
                raise UnsupportedError(f"func computes with {self._named}, which it sets itself")
        held.restore()

    @property
    def _named(self) -> str:
        return " or ".join(self._names)

    @contextmanager
    def unreadable(self, absent: bool = False) -> Iterator[None]:
        """Put what can't be read in the place of all that the function sets; or leave it out, but for counters."""
        for place, key, unreadable in self._set:
            if absent and not unreadable.is_number:
                place.pop(key, None)
            else:
                place[key] = unreadable
        try:
            yield
        except _Read as error:
            raise self._refusal(error) from error

    def _refusal(self, error: BaseException) -> UnsupportedError:
        if isinstance(error, UnsupportedError):
            return error
        frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename != __file__]
        where = f"{os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}" if frames else "unknown"
        return UnsupportedError(
            f"func reads {self._named} ({where}), which it has set in an earlier call: a replay would not set it"
        )


class _Read(BaseException):
    """A value was read that must not be; no function catches this."""


class _Unreadable:
    """Stands for a value that must not be read; from a number's, a function may count on."""

    def __init__(self, is_number: bool) -> None:
        self.is_number = is_number

    def _counted(self, other: Any) -> _Unreadable:
        if self.is_number and isinstance(other, (int, float)):
            return self
        raise _Read

    __add__ = __radd__ = __iadd__ = __sub__ = __isub__ = __mul__ = __imul__ = _counted


def _refuse(self: _Unreadable, *args: Any, **kwargs: Any) -> Any:
    raise _Read


for _name in (
    *("bool", "len", "iter", "getitem", "setitem", "contains", "eq", "ne", "lt", "le", "gt", "ge", "hash", "index"),
    *("int", "float", "str", "repr", "format", "enter", "call", "getattr", "truediv", "pow", "matmul", "neg", "abs"),
    *("mod", "floordiv", "rtruediv", "rmul", "rsub", "torch_function", "round"),
):
    setattr(_Unreadable, f"__{_name}__", _refuse)
