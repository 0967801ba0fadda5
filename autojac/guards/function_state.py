"""What a function reads beside its arguments, watched once for all that was traced of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.guards.guard import Guard

MOST_LINES = 8
MOST_STATES = 4
"""States that are told apart: train and eval mode, say."""
MOST_CHANGES = 8
CALLS_A_CHANGE = 200
"""Past `MOST_CHANGES` one more for so many calls: what changes all the time is left to scheduled checks."""

_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack


@dataclass
class State:
    """One state of what a function reads.

    Attributes:
        guard: holds it.
        number: tells it from others.
        tensors: what the function holds in it; they may be exchanged for others like them.
    """

    guard: Guard
    number: int
    tensors: list[Tensor]


class Surroundings:
    """The state of everything a function reads, with a number for each state that it was seen in.

    Args:
        func: the function.

    Attributes:
        lock: held while something is traced or compared.
        version: counts the changes that were noticed, exchanged tensors included.
        traces: a line for each of the last traces that were made, for people.
        fresh: the present state is new, so that the function may have brought it about itself.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.lock = threading.RLock()
        self.version = 0
        self.traces: deque[str] = deque(maxlen=MOST_LINES)
        self._states: deque[State] = deque(maxlen=MOST_STATES)
        self._numbers = 0
        self._calls = self._changes = 0
        self._observed = -1
        self.fresh = True

    def __autojac_reach__(self) -> dict[str, Any]:
        """What is watched is no part of what watches."""
        return {}

    @property
    def present(self) -> State:
        """The state as it was when last looked at."""
        if not self._states:
            with self.lock:
                if not self._states:
                    self._enter()
        return self._states[-1]

    def settled(self) -> State:
        """The state as it is now."""
        with self.lock:
            if not self.steady():
                self.look()
            return self.present

    def steady(self) -> bool:
        """Whether everything is as it was when last looked at: asked in every call."""
        return bool(self._states) and self._states[-1].guard.holds()

    def observe(self) -> tuple[int | None, bool]:
        """Look at the state before a call.

        Returns:
            Its number, None where nothing is looked at; and whether anything is other than at the last call.
        """
        self._calls += 1
        if self._changes > MOST_CHANGES + self._calls // CALLS_A_CHANGE or _function_modes() or _dispatch_modes():
            return None, False
        if self._observed == self.version and self.steady():
            return self._states[-1].number, False
        self._changes += self._observed >= 0
        number = self.settled().number
        self._observed, self.fresh = self.version, True
        return number, True

    def absorb(self) -> int | None:
        """Take what a call of the function has itself changed, such as a counter of its calls, for no change.

        Returns:
            The number of the state after the call; None if that is not known.
        """
        if self._changes > MOST_CHANGES + self._calls // CALLS_A_CHANGE or _function_modes() or _dispatch_modes():
            return None
        # before the first look nothing is known of what a call changes
        self.fresh = not self._states or not self.steady()
        self._changes += self.fresh and self._observed >= 0
        number = self.settled().number
        self._observed = self.version
        return number

    def look(self) -> str:
        """Find out what has changed, and take it as it is now.

        Returns:
            What is other than before, in a word or two; empty if nothing is but perhaps some tensors, exchanged for
            others like them.
        """
        with self.lock:
            what = self._settled(self.present)
            if what:
                earlier = next((state for state in self._states if not self._settled(state)), None)
                if earlier is None:
                    self._enter()
                else:
                    self._states.remove(earlier)
                    self._states.append(earlier)
                self.version += 1
            return what

    @property
    def reason(self) -> str:
        """Why not all that the function reads can be listed; empty if it can, or where nobody has looked."""
        return self._states[-1].guard.reason if self._states else ""

    def lines(self) -> list[str]:
        """What of the function was traced, or why nothing can be."""
        reason = self.reason
        return [f"replay: not possible, {reason}"] if reason else list(self.traces)

    def _settled(self, state: State) -> str:
        """Take a state for the present one, but for tensors; else what speaks against that."""
        change = state.guard.compare()
        if not change.what:
            if change.tensors:
                state.tensors = [change.tensors.get(id(tensor), tensor) for tensor in state.tensors]
                self.version += 1
            state.guard.renew()
        return change.what

    def _enter(self) -> None:
        guard = Guard(self.func)
        self._numbers += 1
        self._states.append(State(guard, self._numbers, list(guard.tensors)))
