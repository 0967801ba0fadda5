"""The states of everything that a function reads besides its arguments, for all plans of that function."""

from __future__ import annotations

import os
import threading
import types
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autojac.guards.guard import Change, Guard
from autojac.guards.names_read import ANY, lines_read, own_code
from autojac.guards.places import Spot
from autojac.torch_internals import DisableTorchFunction

MOST_LINES = 8
MOST_STATES = 4
"""States that are told apart: train and eval mode, say."""
MOST_CHANGES = 8
CALLS_A_CHANGE = 200
"""Past `MOST_CHANGES` one more for so many calls: a place that changes all the time is left to scheduled checks."""


MOST_SPOTS = 256
"""Changes are counted of the places that changed last: what else they keep alive would grow for ever."""


@dataclass
class KnownState:
    """One state of what a function reads.

    Attributes:
        guard: checks whether the function is in it.
        number: identifies it.
        kind: the number of the first state that differs from it in nothing but what changes all the time.
        tensors: what the function holds in it; they may be exchanged for others like them.
    """

    guard: Guard
    number: int
    kind: int
    tensors: list[Tensor]


class FunctionState:
    """The state of everything a function reads, with a number for each state that it was seen in.

    Args:
        func: the function.

    Attributes:
        lock: held while something is traced or compared.
        version: counts the changes that were noticed, exchanged tensors included.
        traces: a human-readable line for each of the last traces that were made.
        is_complete: `observe` notices everything that Python can change.
        is_new: the present state is new, so that the function may have brought it about itself.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.lock = threading.RLock()
        self.version = 0
        self.traces: deque[str] = deque(maxlen=MOST_LINES)
        self.is_new = True
        self.is_complete = False
        self._states: deque[KnownState] = deque(maxlen=MOST_STATES)
        self._numbers = 0
        self._calls = 0
        self._changes: dict[Spot, tuple[int, Any]] = {}
        self._ignored: frozenset[Spot] = frozenset()
        self._reconsidered = 0
        self._tensors_matter = False
        self._observed: Callable[[], bool] | None = None
        self._ran: list[types.CodeType] = []
        self._all_ran: dict[int, types.CodeType] = {}
        self._unread: set[str] = set()
        self._write_only: frozenset[Spot] = frozenset()

    def __autojac_reach__(self) -> dict[str, Any]:
        """Let no walk enter: what is watched is no part of what watches it."""
        return {}

    @property
    def present(self) -> KnownState:
        """The state as of the last comparison."""
        if not self._states:
            with self.lock:
                if not self._states:
                    self._enter(None)
        return self._states[-1]

    def cover(self, ran: Collection[types.CodeType]) -> bool:
        """Follow all code that ran in a call, that of installed packages too; return whether any was new."""
        with self.lock:
            fresh = any(id(code) not in self._all_ran for code in ran)
            self._note(ran)
            present = self.present
            known = {id(code) for code in present.guard.codes}
            new = [code for code in ran if id(code) not in known]
            if not new and not (fresh and present.guard.reason):
                return False
            guard = self._make_guard(new)
            reached = {id(code) for code in guard.codes}
            new = [code for code in new if id(code) in reached]
            if not new and bool(guard.reason) == bool(present.guard.reason):
                return False
            self._ran += new
            self._replace(guard)
            return True

    def leave_unwatched(self, names: Collection[str], spots: Collection[Spot]) -> None:
        """Compare no more what calls of the function set and none reads, such as the last result."""
        with self.lock:
            self._unread |= set(names)
            if not self._write_only.issuperset(spots):
                self._write_only |= frozenset(spots)
                self._replace(self._make_guard())

    def where_read(self, name: str, kind: type | None = None) -> str:
        """Return where a variable or attribute is read; empty if nowhere.

        Args:
            name: of the variable or attribute.
            kind: the class of the object. Besides the code that has run in some call, torch's and Python's own code of
                its base classes may read the attribute.
        """
        own = list(own_code(kind)) if kind is not None else []
        for code in (*self._all_ran.values(), *self.present.guard.backwards, *own):
            lines = lines_read(code)
            # torch's own code computes names only for who asks for an attribute by its name
            line = lines.get(name, None if code in own else lines.get(ANY))
            if line is not None:
                return f"{os.path.basename(code.co_filename)}, line {line}"
        return ""

    def _note(self, ran: Collection[types.CodeType]) -> None:
        """Watch everything again where code runs for the first time that reads what nothing has read so far."""
        self._all_ran |= {id(code): code for code in ran}
        if self._write_only and any(self.where_read(name) for name in self._unread):
            self._write_only = frozenset()
            self._replace(self._make_guard())

    def _make_guard(self, new: Collection[types.CodeType] = ()) -> Guard:
        return Guard(self.func, (*self._ran, *new), self._write_only, tuple(self._all_ran.values()))

    def _replace(self, guard: Guard) -> None:
        """Compare other places from now on; what other states compare is not that."""
        present = self.present
        # what was traced was compared with less, or with more
        self._numbers += 1
        present.guard, present.tensors, present.number = guard, list(guard.tensors), self._numbers
        self._states = deque([present], maxlen=MOST_STATES)
        self._observed = None
        self.version += 1

    def why_uncovered(self, ran: Collection[types.CodeType]) -> str:
        """Return why not all code that ran in a call is known to the guard; empty if it is."""
        known = {id(code) for code in self.present.guard.codes}
        return next((_unreachable(code) for code in ran if id(code) not in known), "")

    def settle(self) -> KnownState:
        """Return the state as it is now."""
        with self.lock:
            if not self.is_unchanged():
                self.refresh()
            return self.present

    def is_unchanged(self) -> bool:
        """Check whether everything is as it was at the last comparison; quick."""
        return bool(self._states) and self._states[-1].guard.is_unchanged()

    def observe(self) -> tuple[int, bool]:
        """Look before a call whether the function has changed, but for what changes all the time.

        Returns:
            The kind of the state, and whether anything differs from the last call.
        """
        self._calls += 1
        if self._observed is not None and self._calls != self._reconsidered and self._observed():
            return self._states[-1].kind, False
        self.is_new = True
        return self._observe(), True

    def absorb(self) -> int:
        """Take what a call of the function has itself changed, such as a counter of its calls, for no change.

        Returns:
            The kind of the state after the call.
        """
        self.is_new = self._observed is None or not self._observed()
        return self._observe() if self.is_new else self._states[-1].kind

    def refresh(self) -> str:
        """Find out what has changed, and compare from now on with the state as it is now.

        Returns:
            A human-readable name of what differs; empty if nothing does but perhaps some tensors, exchanged for others
            like them.
        """
        with self.lock:
            change = self._settle(self.present)
            if change.what:
                earlier = next((state for state in self._states if not self._settle(state).what), None)
                if earlier is None:
                    self._enter(change)
                else:
                    self._states.remove(earlier)
                    self._states.append(earlier)
                self.version += 1
            elif change.tensors and not self._tensors_matter:
                self._count(change.exchanged)
            return change.what

    def watch_tensors(self) -> None:
        """Notice every tensor that is exchanged from now on, however often: the values of some decide."""
        with self.lock:
            if not self._tensors_matter:
                self._tensors_matter, self._observed = True, None
                self._changes.clear()

    @property
    def ignores_some(self) -> bool:
        """Whether `observe` leaves out places that change all the time, such as parameters that others stand in for."""
        return bool(self._ignored)

    @property
    def reason(self) -> str:
        """Why not everything the function reads can be listed; empty if it can, or where nothing was listed yet."""
        return self._states[-1].guard.reason if self._states else ""

    def lines(self) -> list[str]:
        """Say what of the function was traced, or why nothing can be."""
        reason = self.reason
        return [f"replay: not possible, {reason}"] if reason else list(self.traces)

    def _observe(self) -> int:
        # a mode of the caller's, such as another default device, would see what is read of tensors
        with self.lock, DisableTorchFunction():
            state = self.settle()
            changes = {spot: count for spot, (count, _) in self._changes.items() if count > self._most_changes}
            self._ignored = frozenset(changes)
            self._reconsidered = CALLS_A_CHANGE * (min(changes.values(), default=0) - MOST_CHANGES)
            self._observed = state.guard.is_unchanged_besides(self._ignored)
            self.is_complete = not state.guard.reason and not self._ignored
            return state.kind

    @property
    def _most_changes(self) -> int:
        return MOST_CHANGES + self._calls // CALLS_A_CHANGE

    def _settle(self, state: KnownState) -> Change:
        """Take a state for the present one, but for tensors; else return what speaks against that."""
        change = state.guard.diff()
        if not change.what:
            if change.tensors:
                state.tensors = [change.tensors.get(id(tensor), tensor) for tensor in state.tensors]
                self.version += 1
            state.guard.rebase()
        return change

    def _enter(self, change: Change | None) -> None:
        guard = self._make_guard()
        self._numbers += 1
        kind = self._numbers if change is None else self._kind(change)
        self._states.append(KnownState(guard, self._numbers, kind, list(guard.tensors)))

    def _kind(self, change: Change) -> int:
        for state, spots in ((state, state.guard.diff().spots) for state in reversed(self._states)):
            if spots and all(map(self._is_ignored, spots)):
                return state.kind
        self._count(change.spots)
        return self._numbers

    def _is_ignored(self, spot: Spot) -> bool:
        return spot in self._ignored or (*spot[:2], None) in self._ignored

    def _count(self, spots: Mapping[Spot, Any]) -> None:
        for spot, owner in spots.items():
            count, _ = self._changes.pop(spot, (0, owner))
            # with the owner, so that no other object gets its id
            self._changes[spot] = count + 1, owner
        for spot in list(self._changes)[:-MOST_SPOTS]:
            del self._changes[spot]


def _unreachable(code: types.CodeType) -> str:
    place = f"{os.path.basename(code.co_filename)}, line {code.co_firstlineno}"
    return f"it calls {code.co_qualname} ({place}), which is not reachable from func's closures, globals or attributes"
