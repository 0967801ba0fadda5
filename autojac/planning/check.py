"""A check of one call: its Jacobian against a VJP of func itself, and a new plan where they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

from autojac.autodiff.open_modes import hooked, isolate_saved_tensors
from autojac.core.garbage import gc_disabled
from autojac.core.ranks import silent
from autojac.core.sandbox import GENERATORS, Sandbox, restore_random_state, without_hooks
from autojac.core.structure import KEEPS, UPDATES_BUFFERS
from autojac.errors import NoGraphWarning, StructureChangedWarning, warn
from autojac.graph.operators import custom_functions
from autojac.guards.run_monitor import RunMonitor
from autojac.planning.call import Call, detach_leaves, find_trained_tensors, not_overwritten
from autojac.planning.plans_in_use import PlansInUse
from autojac.planning.prepared_plan import UNCHANGED, Difference, PreparedPlan
from autojac.planning.search.memory import is_out_of_memory
from autojac.probe.kept_state import observe_kept_state
from autojac.probe.side_effects import evaluate_once
from autojac.problem.compared_parts import Extent
from autojac.problem.derivative_reference import AnyReference, reference_for
from autojac.problem.problem import Result


class CheckOutcome(NamedTuple):
    """The result of a plan, why it is wrong (if it is), and whether only the gradient through it is."""

    result: Result | None
    wrong: str | None
    only_gradient: bool = False


class Check:
    """Computes one call and compares the result with func; a safe method computes it again if it is wrong.

    Args:
        plans: of the function.
        plan: computes the call.
        call: the call.
        difference: what was seen to have changed; a change of arguments causes no warning.
    """

    def __init__(self, plans: PlansInUse, plan: PreparedPlan, call: Call, difference: Difference = UNCHANGED) -> None:
        self.plans = plans
        self.plan = plan
        self.call = call
        self.difference = difference
        self.own_leaves = detach_leaves(call.leaves)
        self.updates_buffers = UPDATES_BUFFERS in plan.problem.structure.effects
        # the search that has just found the plan checked its gradient too
        first_use = plan.is_fresh and plan.schedule.calls == 1
        self.trains = plan.problem.differentiable and not hooked() and not first_use
        self.modules = plans.captured.modules

    def run(self) -> tuple[PreparedPlan, Result]:
        """Return the call's result, and the plan that gave it."""
        plan, call = self.plan, self.call
        sandbox = self._sandbox()
        restore = sandbox.save()

        def undo() -> None:
            restore()
            restore_random_state(sandbox.state)

        reference, is_listed = self._reference(sandbox)
        if plan.is_provisional and reference.says:
            return self._plan_again()
        if self.difference.what == "function" and (keeps := self._keeps(sandbox)):
            return self._replace(f"func {' and '.join(keeps)} now", False, undo)
        result, wrong, only_gradient = self._compare(reference, sandbox)
        if not reference.says:
            # no verdict: check the next call instead of this one
            plan.schedule.check_next_call()
            if result is None:
                undo()
                result = plan.run_plainly(call.leaves, call.keywords)
            return plan, result
        if wrong is None and result is not None:
            self._accept(reference, result, is_listed)
            if not plan.is_doubtful:
                return plan, result
            with silent(self.modules):
                undo()
                whole = plan.assuming_nothing()
                return whole, whole.run(call.leaves, call.keywords)
        return self._replace(str(wrong), only_gradient, undo)

    def _sandbox(self) -> Sandbox:
        """Return a sandbox that evaluates func from the state in which this call found it."""
        buffers = self.plans.buffers() if self.updates_buffers else ()
        if self.difference.what != "function":
            return self.plan.sandbox.now(None, buffers)
        # a changed func may draw now, and may set something, such as a flag that it sets and resets
        sandbox = self.plan.sandbox.now(GENERATORS, buffers)
        settable = self.plans.planner.function_state.present.guard.settable
        return Sandbox(sandbox.captured, sandbox.state, (*self.call.captured.places, *settable), sandbox.trained)

    def _keeps(self, sandbox: Sandbox) -> tuple[str, ...]:
        """Return the side effects that a changed func has now, by what an evaluation has set.

        Raises:
            RandomnessError: if its outputs depend on what it keeps.
        """
        if not sandbox.kept or KEEPS in self.plan.problem.structure.effects:
            return ()
        fn, keywords, positions = self.call.layout.fn, self.call.keywords, self.call.layout.differentiated
        with silent(self.modules), gc_disabled():
            effects, _ = observe_kept_state(lambda: evaluate_once(fn, self.own_leaves, keywords, positions)[0], sandbox)
        return tuple(effect for effect in effects if effect not in self.plan.problem.structure.effects)

    def _reference(self, sandbox: Sandbox) -> tuple[AnyReference, bool]:
        """Evaluate func; return also whether it was seen to read nothing but what the guard compares."""
        plan, keywords = self.plan, self.call.keywords
        problem = dataclasses.replace(plan.problem, differentiable=self.trains)
        trained = find_trained_tensors(self.plans.current_captures(), keywords) if self.trains else ()
        # what no guard can list, such as a clock, is seen while func runs
        monitor = RunMonitor() if plan.is_covered_by_guard else None
        # func must not be blamed for finalizers of what happens to be collected meanwhile
        with silent(self.modules), gc_disabled(), monitor or nullcontext():
            reference = reference_for(
                problem,
                self.own_leaves,
                keywords,
                sandbox,
                extent=Extent(rows=1, seed=plan.schedule.calls, thorough=bool(self.difference.what)),
                trained=not_overwritten(trained, plan.written),
            )
        function_state = self.plans.planner.function_state
        is_listed = monitor is not None and not (
            monitor.reason or function_state.cover(monitor.ran) or function_state.why_uncovered(monitor.ran)
        )
        return reference, is_listed and self._wrappers_need_no_check()

    def _wrappers_need_no_check(self) -> bool:
        """Check whether wrappers inside func need no checks either: a recording of func would run none of them."""
        return all(wrapper.__autojac_needs_no_check__() for wrapper in self.plans.current_captures().wrappers)

    def _compare(self, reference: AnyReference, sandbox: Sandbox) -> CheckOutcome:
        """Compute the call, and compare the result and its gradient with the reference."""
        result: Result | None = None
        only_gradient = False
        # no evaluation may follow the one that is returned: its graph may hold what func writes into
        gradient_first = bool(self.plan.written or self.updates_buffers)
        try:
            with isolate_saved_tensors():
                early = self._gradient_error(reference, sandbox) if self.trains and gradient_first else None
            result = self.plan.run(self.call.leaves, self.call.keywords)
            with isolate_saved_tensors():
                wrong = reference.check(result)
                only_gradient = wrong is None and self.trains
                if only_gradient:
                    wrong = early if gradient_first else self._gradient_error(reference, sandbox)
        except Exception as error:  # func itself has just run: memory, a compiler or a transform failed the plan
            if type(error).__module__ == "torch.utils.checkpoint":
                raise  # it stops a recomputation that has saved what it needs
            if is_out_of_memory(error) and not self.plan.problem.structure.effects:
                raise  # nothing is wrong with the plan but its size
            wrong = f"it raises {type(error).__name__}: {error}"
        return CheckOutcome(result, wrong, only_gradient)

    def _gradient_error(self, reference: AnyReference, sandbox: Sandbox) -> str | None:
        """Return why the gradient through J is wrong, by another run: the graph that the caller gets stays unused."""
        with sandbox(), without_hooks(reference.trained), silent(self.plans.captured.modules):
            return reference.check_gradient(self.plan.run(self.own_leaves, self.call.keywords))

    def _accept(self, reference: AnyReference, result: Result, is_listed: bool) -> None:
        """Note that the plan was right."""
        plan, difference = self.plan, self.difference
        if difference.what == "function":
            captured = self.plans.recapture()
            if plan.contents is not None:
                plan.contents.hold(captured)
                plan.fast_path = None
        if not plan.schedule.last_check and plan.problem.differentiable:
            self._warn_untrained(reference, result)
        plan.schedule_next_check(self.plans.options.verify, is_listed)
        if reference.decides:
            if plan.contents is not None:
                plan.contents.accept(difference.contents)
            plan.is_doubtful = False
        elif plan.problem.structure.assumes:
            # derivatives as small as rounding confirm no pattern: the next call is checked as well
            plan.schedule.check_next_call()
            plan.is_doubtful = plan.is_doubtful or bool(difference.what)

    def _replace(self, wrong: str, only_gradient: bool, undo: Callable[[], None]) -> tuple[PreparedPlan, Result]:
        """Replace a plan that was wrong by one that holds, and compute the call again."""
        call, plans, last = self.call, self.plans, self.plan.schedule.last_check
        # the wrong run does not count. Its writes are undone now, so that what the graph of the next run saves stays;
        # what the forward of data-parallel modules has sent to other ranks can't be undone
        with silent(self.modules):
            undo()
            with plans.lock:
                described = plans.describe(call.args, call.kwargs)
                plan = plans.planner.recover(self.plan, described, wrong, structure=not only_gradient)
                plans.keep(call, plan)
                if plan.contents is not None:
                    plan.contents.accept(plan.contents.digest(call))
            if self.difference.what != "arguments":
                since = f"calls since call {last} went unchecked" if last else "it was its first use in this process"
                since = "func has changed, which was noticed immediately" if self.difference.what else since
                warn(
                    f"the plan for {plans.planner.repository.function_name} does not hold ({since}): {wrong}. This "
                    f"Jacobian was computed again and is right. Now in use: {plan.plan}",
                    StructureChangedWarning,
                )
            with silent(self.modules):  # again: planning has lifted the silence
                return plan, plan.run(call.leaves, call.keywords)

    def _plan_again(self) -> tuple[PreparedPlan, Result]:
        """Replace a plan that was made where nothing could be verified, as something can be now."""
        plan = self.plans.plan_again(self.call)
        plan.schedule.calls = 1
        if plan.is_provisional:
            return plan, plan.run(self.call.leaves, self.call.keywords)
        return Check(self.plans, plan, self.call).run()

    def _warn_untrained(self, reference: AnyReference, result: Result) -> None:
        """Warn once where parameters train and the Jacobian has no graph, as a backward of func's records none."""
        plans = self.plans
        if plans.has_warned_untrained or any(J.requires_grad for row in result.jacobians for J in row):
            return
        functions = sorted(custom_functions(reference.pullback.recorded))
        if functions and find_trained_tensors(plans.current_captures(), self.call.keywords):
            plans.has_warned_untrained = True
            warn(
                f"{plans.planner.repository.function_name}: the Jacobian carries no graph, so a loss on it trains no "
                f"parameter: the backward of {', '.join(functions)} can't be differentiated. Write that backward in "
                "differentiable operators, without once_differentiable, detach or no_grad; call jac under "
                "torch.no_grad() if J is not to be trained",
                NoGraphWarning,
            )
