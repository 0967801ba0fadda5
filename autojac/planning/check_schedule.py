"""When a plan is checked: often at first, then ever more rarely, and never again where it assumes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autojac.core.keywords import passed_values
from autojac.core.settable_arguments import contents_of

EARLY_CHECKS = 10
"""Checks come at calls 1, 2, 4, ... up to 2 to this power, then at every multiple of `CHECK_EVERY`."""
CHECK_EVERY = 1000
MOST_NUMBERS = 32
"""How many calls with new Python floats are checked."""


@dataclass
class CheckSchedule:
    """The calls that a plan has served, and which one is checked next.

    Attributes:
        calls: how many it has served.
        last_check, next_check: calls by their number; 0 where none was checked yet.
        next_step: the call before which a search takes its next step; infinite where there is none.
        is_off: no call is ever checked.
        numbers: the Python floats of calls that were checked, which signatures leave out; None where none may decide.
        contents: hashes of what objects among the arguments of these calls held, as `contents_of` returns them.
    """

    calls: int = 0
    last_check: int = 0
    next_check: float = 1
    next_step: float = math.inf
    is_off: bool = False
    numbers: set[tuple[float, ...]] | None = None
    contents: set[int] = field(default_factory=set)

    def is_due(self, keywords: Mapping[str, Any]) -> bool:
        """Check whether the current call is to be checked."""
        return self.calls >= self.next_check or (bool(keywords) and self._has_new_contents(keywords))

    def turn_off(self) -> None:
        """Stop checking calls."""
        self.next_check, self.is_off, self.numbers = math.inf, True, None

    def check_next_call(self) -> None:
        """Check the next call, as the current one gave no verdict."""
        self.next_check = min(self.next_check, self.calls + 1)

    def schedule_next_check(self, every_call: bool, may_fail: bool) -> None:
        """Set when to check next, after a check that has passed.

        Args:
            every_call: check the next call already.
            may_fail: another call may refute what the plan assumes.
        """
        calls = self.last_check = self.calls
        if every_call:
            self.next_check = calls + 1
        elif not may_fail:
            self.next_check = math.inf
        elif calls < 2**EARLY_CHECKS:
            self.next_check = 2 * calls
        else:
            self.next_check = (calls // CHECK_EVERY + 1) * CHECK_EVERY

    def _has_new_contents(self, keywords: Mapping[str, Any]) -> bool:
        """Check whether a call's objects and floats differ from those of any call checked: a branch may depend on them.

        Past `MOST_NUMBERS` floats are taken for a quantity that changes all the time.
        """
        if self.numbers is None:
            return False
        contents, numbers = contents_of(passed_values(keywords))
        if contents not in self.contents:
            if len(self.contents) >= MOST_NUMBERS:
                self.contents.clear()
            self.contents.add(contents)
            self.numbers.add(numbers)
            return True
        if numbers in self.numbers or len(self.numbers) >= MOST_NUMBERS:
            return False
        self.numbers.add(numbers)
        return True
