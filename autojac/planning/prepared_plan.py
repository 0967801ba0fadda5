"""A plan in use: ready to compute, and able to tell when it has to be checked."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from autojac.autodiff.open_modes import hooked
from autojac.core.autocast import outside_autocast
from autojac.core.call import CallLayout
from autojac.core.options import Verify
from autojac.core.plan import Plan
from autojac.core.sandbox import Sandbox
from autojac.core.signature import Signature
from autojac.methods.pull import Pull
from autojac.planning.call import Call
from autojac.planning.check_schedule import CheckSchedule
from autojac.planning.contents_watch import ContentsWatch
from autojac.planning.exploration import Exploration
from autojac.planning.plan_repository import Keys
from autojac.planning.prepare_compute import prepare_compute
from autojac.problem.problem import Compute, Problem, Result
from autojac.replay.replayer import Replayer

FastPath = Callable[[tuple[Any, ...]], tuple[Any, Any] | None]
"""From a call's positional arguments to the value and the Jacobian; None where it can't serve the call."""


class Difference(NamedTuple):
    """What differs from the calls checked so far, and a digest of the contents that decide."""

    what: Literal["", "function", "arguments"]
    contents: bytes = b""


UNCHANGED = Difference("")


class AstrayError(RuntimeError):
    """Func reads values that lead to another branch than the recorded one, so the call must be checked."""


@dataclass
class PreparedPlan:
    """A plan made ready for one signature in this process.

    Attributes:
        layout, problem, signature, sandbox: of the calls that it serves.
        plan, keys: what was chosen, and its keys in the store; None where it is not stored.
        compute: computes the Jacobian.
        schedule: when to check it.
        contents: the values that its structure was read from; None where none decide.
        checked_states: the states of func that it was checked in.
        pushes: the Jacobian is differentiable and made by forward mode, whose derivative depends on the operators.
        is_proved: it holds for all calls of this signature as long as what func reads is unchanged.
        needs_no_check: no check is due: the plan is proved, and the guard compares everything that func reads.
        is_fresh: a search in this process has just found the plan.
        is_provisional: it was made where no derivative is finite, so that nothing could be verified.
        is_doubtful: what decides the structure has changed, and no check since could tell whether it still holds.
        fast_path: serves calls like one that was served; None before it was asked for.
        factors: computes the Jacobian as factors, once that was asked for.
        exploration: the search that goes on while the plan is used.
    """

    layout: CallLayout
    problem: Problem
    plan: Plan
    compute: Compute
    signature: Signature
    sandbox: Sandbox
    keys: Keys | None = None
    schedule: CheckSchedule = dataclasses.field(default_factory=CheckSchedule)
    contents: ContentsWatch | None = None
    checked_states: set[int] = dataclasses.field(default_factory=set)
    pushes: bool = False
    is_proved: bool = False
    needs_no_check: bool = False
    is_fresh: bool = False
    is_provisional: bool = False
    is_doubtful: bool = False
    fast_path: FastPath | None = None
    factors: Any = None
    exploration: Exploration | None = None
    _loop: Compute | None = None

    @property
    def written(self) -> tuple[Tensor, ...]:
        """The tensors that func writes into."""
        return tuple(self.sandbox.written)

    def jacobian(self, result: Result) -> Any:
        """Return the Jacobians as the user gets them: nested, and entries as matrices."""
        problem, rows = self.problem, result.jacobians
        if problem.layout != "sparse":
            return self.layout.jacobian(rows)
        matrices = [
            [problem.entries(output, p).matrix(values) for p, values in zip(problem.inputs, row, strict=True)]
            for output, row in enumerate(rows)
        ]
        return self.layout.jacobian(matrices)

    def fits(self, result: Result) -> bool:
        """Check whether func has returned the planned shapes: they may follow from values that it reads."""
        return [value.shape for value in result.values] == self._shapes

    @functools.cached_property
    def _shapes(self) -> list[torch.Size]:
        return [torch.Size((self.problem.batch, *event)) for event in self.problem.outputs]

    def run(self, leaves: Sequence[Tensor], keywords: Mapping[str, Any], unless_astray: bool = False) -> Result:
        """Compute, outside the caller's autocast but for func.

        Under a caller's hooks on saved tensors by a loop of plain VJPs: torch.func refuses such hooks, and
        checkpointing's compute func again at every backward, even under vmap.

        Raises:
            AstrayError: with `unless_astray`, before func runs, if func would take a branch that no check has seen.
        """
        compute = self.run_plainly if hooked() else self.compute
        with outside_autocast():
            if unless_astray and isinstance(compute, Replayer):
                result = compute.replay(leaves, keywords)
                if result is not None:
                    return result
                if compute.has_strayed() and self.problem.structure.assumes:
                    raise AstrayError
                compute = compute.eager
            return compute(leaves, keywords)

    def run_plainly(self, leaves: Sequence[Tensor], keywords: Mapping[str, Any]) -> Result:
        """Compute by a loop of plain VJPs."""
        if self._loop is None:
            self._loop = prepare_compute(self.layout, self.problem, Pull.suiting(self.problem, "loop"))
        return self._loop(leaves, keywords)

    def assuming_nothing(self) -> PreparedPlan:
        """Return a plan for a call whose structure is in doubt: a loop of one plain VJP per row."""
        structure = self.problem.structure.refute("in doubt: derivatives here are as small as rounding")
        problem = dataclasses.replace(self.problem, structure=structure)
        compute = prepare_compute(self.layout, problem, Pull.suiting(problem, "loop"))
        return dataclasses.replace(self, problem=problem, compute=compute, _loop=None)

    def schedule_next_check(self, verify: Verify, is_listed: bool) -> None:
        """Set when to check next: observations at some points are never trusted forever.

        A proof covers all inputs, and the guard notices a flag, a layer or a hook that Python changes later.

        Args:
            verify: how often the user wants checks.
            is_listed: func was seen to read nothing but what the guard compares.
        """
        structure = self.problem.structure
        self.needs_no_check = is_listed and self.is_covered_by_guard
        may_fail = not self.needs_no_check and (structure.assumes or self.pushes)
        self.schedule.schedule_next_check(verify == "always" or structure.needs_every_check, may_fail)

    def pause_search(self) -> None:
        """Take no step of the search behind the plan until it is resumed."""
        if self.exploration is not None:
            self.exploration.is_paused, self.schedule.next_step = True, math.inf

    def resume_search(self) -> None:
        """Continue a search that was paused."""
        if self.exploration is not None:
            self.exploration.is_paused = False
            self.schedule.next_step = self.exploration.next_call()

    @property
    def is_covered_by_guard(self) -> bool:
        """Whether the plan needs no further check while the guard, which compares everything, sees no change."""
        return self.is_proved and self._guard_is_complete

    @property
    def _guard_is_complete(self) -> bool:
        function_state = self.problem.function_state
        return function_state is not None and function_state.is_complete

    def diff(self, call: Call, state: int | None) -> Difference:
        """Return which of the plan's assumptions differ from the calls checked so far.

        Args:
            call: the current call.
            state: the kind of the state of what func reads; None if it was not compared.
        """
        changed = False
        if self.schedule.last_check:  # the first use is checked in any case
            changed = state is not None and state not in self.checked_states
            if isinstance(self.compute, Replayer):
                changed = self.compute.needs_retrace() or changed
            changed = changed or (self.needs_no_check and not self._guard_is_complete)
        contents = self.contents
        if contents is None:
            return Difference("function") if changed else UNCHANGED
        if contents.refresh(call.captured):
            self.fast_path = None  # there may be constants now
        digest = contents.digest(call)
        if changed:
            return Difference("function", digest)
        return Difference("arguments" if contents.is_new(digest) else "", digest)
