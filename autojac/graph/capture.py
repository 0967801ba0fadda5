"""What every recording of a run shares: it sees each operator, and makes the checks that decide what may be recorded.

Two formats are written from it. `recorder.Recorder` writes values, each made once and never changed, as dataclasses: in
every call of a method that cuts, for graphs that autograd follows when they run again. `replay.tape.Tape` writes what
ran verbatim, in-place operators and views as they are, as nodes that passes change: once, for a program that serves all
later calls. What the first takes for a constant of its call, such as random numbers or a tensor that nobody knows, the
second must refuse or run again; neither format can be derived from the other without running the operators once more,
since a decomposition, a draw and a tensor that is written into show what they are only in the midst of the run.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from autojac.core.tensor_kinds import PLAIN
from autojac.graph.operators import LITERALS, call, certain, traits
from autojac.guards.escapes import MonitoredMode, home

_open = threading.local()


def open_capture() -> Capture | None:
    """Return what records in this thread now, the innermost; None if nothing does."""
    captures: list[Capture] = getattr(_open, "captures", [])
    return captures[-1] if captures else None


class Capture(MonitoredMode):
    """Hands each operator that runs under it to `write`, unless there is a reason why nothing comes of it.

    Args:
        most: operators, of which `written_operators` tells how many there are; loops are unrolled.
        watched: as of `MonitoredMode`.

    Attributes:
        reason: the first thing that makes what is written worthless; empty if it holds.
        homes: for each tensor met, by its identity, what stood behind its object; see `home`.
        sharing: for each storage, the tensors met that share it, in order.
    """

    def __init__(self, most: int, watched: bool = True) -> None:
        super().__init__(watched)
        self.most = most
        self.reason = ""
        self.homes: dict[int, tuple[Any, ...]] = {}
        self.sharing: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Self:
        _open.captures = [*getattr(_open, "captures", []), self]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _open.captures = _open.captures[:-1]
        super().__exit__(*error)

    @property
    def written_operators(self) -> int:
        """How many operators were written."""
        raise NotImplementedError

    def write(
        self, func: Any, name: str, written: Sequence[int | str], draws: bool, args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """Run an operator and write it down.

        Args:
            func, args, kwargs: the operator and what it is given.
            name: of the operator, without its namespace and overload.
            written: the arguments that it writes into.
            draws: whether it takes random numbers.

        Returns:
            what the operator returns.
        """
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not PLAIN.issuperset(types):
            self.refuse("func uses a subclass of torch.Tensor that runs operators its own way")
        if not self.reason and self.written_operators > self.most:
            self.exceed(f"func runs more than {self.most} operators")
        if self.reason:
            return call(func, args, kwargs)
        name, written, draws = traits(func)
        return self.write(func, name, written, draws and not certain(func, args, kwargs), args, kwargs)

    def refuse(self, reason: str) -> None:
        """Note why nothing comes of this; the first reason counts."""
        self.reason = self.reason or reason

    def exceed(self, reason: str) -> None:
        """Note that what is written outgrows a limit."""
        self.refuse(reason)

    def literal_of_tensors(self, name: str) -> str:
        """Return the function that makes a literal, now, of values of tensors; empty if none does."""
        return self.monitor.literal if name in LITERALS else ""

    def settle(self, tensor: Tensor) -> None:
        """Note where a tensor lives that was met, made or changed."""
        self.homes[id(tensor)] = place = home(tensor)
        if len(place) > 1:
            self.sharing.setdefault(place[1], []).append(tensor)

    def require_home(self, tensor: Tensor) -> None:
        """Refuse a tensor whose object was given other memory, which no operator shows."""
        known = self.homes.get(id(tensor))
        if known is not None and known != home(tensor):
            self.refuse("func gives a tensor the memory of another")
