"""A call of a wrapper that has a plan: methods compute by such calls, tune and explain them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from autojac.core.call import outside_inference_mode
from autojac.core.plan import Effort, Plan
from autojac.guards.function_state import FunctionState
from autojac.planning.explain import explanation
from autojac.planning.prepared_plan import PreparedPlan
from autojac.problem.problem import Result


class PlannedCall(NamedTuple):
    """A call of a wrapper that has a plan.

    Attributes:
        wrapper: whose Jacobian is computed; a product is the Jacobian of another function.
        args, kwargs: as the wrapper's function gets them.
    """

    wrapper: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def function_state(self) -> FunctionState:
        """The state of what the wrapper's function reads."""
        state: FunctionState = self.wrapper._plans.planner.function_state
        return state

    def run(self) -> tuple[PreparedPlan, Result]:
        """Compute."""
        outcome: tuple[PreparedPlan, Result] = self.wrapper._run(self.args, self.kwargs)
        return outcome

    def prepare(self) -> PreparedPlan:
        """Return the plan; made now if there is none."""
        with outside_inference_mode(self.args, self.kwargs) as call:
            plan: PreparedPlan = self.wrapper._plans.look_up(*call)[0]
            return plan

    def tune(self, effort: Effort, budget_s: float | None) -> Plan:
        """Search for the best plan, and remember it."""
        plans = self.wrapper._plans
        with plans.lock, outside_inference_mode(self.args, self.kwargs) as call:
            plan: Plan = plans.tune(*call, effort, budget_s).plan
            return plan

    def explain(self) -> str:
        """Explain the plan."""
        return explanation(self.prepare(), self.wrapper._plans.planner.repository)
