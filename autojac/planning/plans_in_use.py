"""The prepared plans of one function in this process, each for one kind of call."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from autojac.autodiff.open_modes import is_observed
from autojac.core.module_function import ModuleFunction
from autojac.core.options import Options
from autojac.core.plan import Effort
from autojac.core.product_functions import ComposedFunction
from autojac.core.structure import UPDATES_BUFFERS
from autojac.guards.captures import Captures, captures, survey
from autojac.methods.base import build
from autojac.planning.call import Call, CallKey
from autojac.planning.fast_path import no_fast_path
from autojac.planning.online import explore
from autojac.planning.pinned_plans import pinned_store
from autojac.planning.planner import Planner
from autojac.planning.prepared_plan import FastPath, PreparedPlan
from autojac.planning.same_code import note_plan
from autojac.replay.replayer import Replayer


class PlansInUse:
    """The prepared plans of one function, made when they are first needed.

    Args:
        func: the function.
        options: the options of its `AutoJacobian`.

    Attributes:
        planner: makes plans.
        fast_path: serves calls like the last one.
        alone: held during a call: no other thread calls or inspects a module while its parameters are replaced.
        lock: held while a plan is made.
        has_warned_untrained: the user knows already that the Jacobian trains nothing.
    """

    def __init__(self, func: Callable[..., Any], options: Options) -> None:
        self.func = func
        self.options = options
        self.planner = Planner(func, options)
        self.fast_path: FastPath = no_fast_path
        module_lock = func.lock if isinstance(func, (ModuleFunction, ComposedFunction)) else None
        self.alone: AbstractContextManager[Any] = nullcontext() if module_lock is None else module_lock
        self.lock: AbstractContextManager[Any] = threading.RLock() if module_lock is None else module_lock
        self._exploring = threading.Lock()
        self.has_warned_untrained = False
        self._plans: dict[CallKey, PreparedPlan] = {}
        self._captured: Captures | None = None
        self._version = 0
        self._observes = options.verify != "never"
        self._replays = self._differs = False

    def __len__(self) -> int:
        return len(self._plans)

    def items(self) -> Iterable[tuple[CallKey, PreparedPlan]]:
        """Return the plans by the keys of their calls."""
        return self._plans.items()

    def observe(self) -> int | None:
        """Notice before a call whether the function has changed; return the kind of its state if that is known."""
        function_state = self.planner.function_state
        state, may_differ = function_state.observe() if self._observes else (None, False)
        # a call may have changed the function itself, which `absorb` has accepted
        may_differ = may_differ or self._version != function_state.version
        differed, self._differs = self._differs, False
        if self._replays or function_state.ignores_some:
            # others may stand in for tensors for the length of some calls, which the state does not follow
            self._differs = not function_state.is_unchanged()
        if may_differ or differed or self._differs:
            # it may hold other tensors now, which require grad
            self._captured, self._version = None, function_state.version
        return state

    def absorb(self, plan: PreparedPlan) -> None:
        """Accept what a call has changed in the function itself, until a call changes nothing."""
        function_state = self.planner.function_state
        if function_state.is_new and not plan.schedule.is_off:
            plan.checked_states.add(function_state.absorb())

    @property
    def captured(self) -> Captures:
        """What the function reaches, as far as is known."""
        with self.alone:
            if self._captured is None:
                self._captured = captures(self.func)
            return self._captured

    def current_captures(self) -> Captures:
        """Return what the function reaches now, without a walk if the guard has seen all unchanged in this call."""
        is_listed = self._observes and self.planner.function_state.is_complete
        return self.captured if is_listed else captures(self.func)

    def recapture(self) -> Captures:
        """Remember what the function reaches now for the next call, and return it."""
        self._captured = self.current_captures()
        return self._captured

    def look_up(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[PreparedPlan, Call]:
        """Return the plan for a call, made now if there is none, and the call's description."""
        if not self._plans:
            return self._make(args, kwargs)
        captured = self._captured or self.captured
        key = CallKey.of(args, kwargs, captured)
        plan = self._plans.get(key)
        if plan is None:
            return self._make(args, kwargs)
        layout = plan.layout
        keywords = layout.keywords(args, kwargs) if kwargs or not layout.plain else kwargs
        return plan, Call(args, kwargs, key, layout, layout.leaves(args), keywords, captured)

    def tune(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], effort: Effort, budget_s: float | None
    ) -> PreparedPlan:
        """Search for the plan for a call, whatever is known, and use it."""
        with self.lock:
            call = self.describe(args, kwargs)
            return self.keep(call, self.planner.prepare(call, effort, budget_s, force=True))

    def plan_again(self, call: Call) -> PreparedPlan:
        """Replace the plan for a call by one that is made now."""
        with self.lock:
            return self.keep(call, self.planner.prepare(self.describe(call.args, call.kwargs)))

    def describe(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Describe a call, whatever plans there are."""
        return self.planner.builder.describe(self.captured, args, kwargs)

    def keep(self, call: Call, plan: PreparedPlan) -> PreparedPlan:
        """Use a plan for calls like this one from now on, and return it."""
        if self.options.verify == "never" and not plan.is_provisional:
            plan.schedule.turn_off()
        before = self._plans.get(call.key)
        if before is not None:
            # a thread that still uses it checks its next call, and so arrives at the plan that is in use now
            before.schedule.next_check = 0
        self._plans[call.key] = plan
        self.fast_path = no_fast_path
        self._replays = self._replays or isinstance(plan.compute, Replayer)
        self._observes = self._observes or not plan.schedule.is_off
        return plan

    def explore(self, plan: PreparedPlan, call: Call) -> bool:
        """Take a step of the search behind a plan, unless another thread does; return whether it found a better one."""
        if is_observed() or pinned_store() is not None or not self._exploring.acquire(blocking=False):
            return False
        try:
            with self.lock:
                updates = UPDATES_BUFFERS in plan.problem.structure.effects
                better = explore(self.planner, plan, call, self.buffers() if updates else ())
                if better is not None:
                    self.keep(call, better)
                return better is not None
        finally:
            self._exploring.release()

    def buffers(self) -> list[Tensor]:
        """Return the tensors that the function may write into now, replaced buffers included."""
        return [tensor for tensor in self.current_captures().tensors if not tensor.requires_grad]

    def _make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[PreparedPlan, Call]:
        with self.lock:
            # the function may have changed since the key was computed
            captured = survey(self.func, self.options.version)
            self._captured = dataclasses.replace(captured, digest="")  # which may be another at the next call
            call = self.planner.builder.describe(captured, args, kwargs)
            plan = self._plans.get(call.key)
            if plan is None:
                is_first = not self._plans
                plan = self.keep(call, self.planner.prepare(call))
                if is_first:
                    repository = self.planner.repository
                    note_plan(self.func, repository.function_name, build(plan.plan.method))
            return plan, call
