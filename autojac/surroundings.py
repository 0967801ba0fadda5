"""What a function reads beside its arguments, watched once for all that was traced of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from autojac.guards import Guard

MOST_LINES = 8


class Surroundings:
    """The state of everything a function reads, with a number for each state that it was seen in.

    Args:
        func: the function.

    Attributes:
        lock: held while something is traced or compared.
        version: counts the changes that were noticed, exchanged tensors included.
        state: counts those among them after which other operators may run.
        traces: a line for each of the last traces that were made, for people.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.lock = threading.RLock()
        self.version = 0
        self.state = 0
        self.traces: deque[str] = deque(maxlen=MOST_LINES)
        self._guard: Guard | None = None
        self.tensors: list[Tensor] = []

    @property
    def guard(self) -> Guard:
        """The guard of the function as it is now, made when first asked for."""
        if self._guard is None:
            with self.lock:
                self._walk()
        assert self._guard is not None
        return self._guard

    def steady(self) -> bool:
        """Whether everything is as it was when last looked at: asked in every call."""
        return self._guard is not None and self._guard.holds()

    def look(self) -> str:
        """Find out what has changed, and take it as it is now.

        Returns:
            What is other than before, in a word or two; empty if nothing is but perhaps some tensors, exchanged for
            others like them.
        """
        with self.lock:
            change = self.guard.compare()
            if change.what:
                self._walk()
                self.state += 1
                self.version += 1
            else:
                if change.tensors:
                    self.tensors = [change.tensors.get(id(tensor), tensor) for tensor in self.tensors]
                    self.version += 1
                self.guard.renew()
            return change.what

    def lines(self) -> list[str]:
        """What of the function was traced, or why nothing can be."""
        return [f"replay: not offered, {self.guard.reason}"] if self.guard.reason else list(self.traces)

    def _walk(self) -> None:
        self._guard = Guard(self.func)
        self.tensors = list(self._guard.tensors)
