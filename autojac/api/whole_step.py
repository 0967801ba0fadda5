"""A training step as one computation: the Jacobian of one number in all parameters that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from autojac.api.autojacobian import AutoJacobian
from autojac.api.loss_of_derivatives import LossOfDerivatives
from autojac.autodiff.pullback import pull_back
from autojac.core import pytree
from autojac.core.module_function import ModuleFunction
from autojac.core.plan import Effort, Plan
from autojac.core.sandbox import without_hooks
from autojac.core.settable_arguments import write_back_copies
from autojac.guards.captures import captures
from autojac.planning.fast_path import no_fast_path
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.run_call import find_plan
from autojac.problem.problem import record_pullback
from autojac.replay.replayer import Replayer


class WholeStep:
    """The loss on derivatives and its gradients in the parameters, planned as one Jacobian.

    Args:
        derivatives: a wrapper that gives derivatives.
        loss: a function of these and of further arguments.
        options: how to plan, as of `AutoJacobian`.

    Attributes:
        wrapper: plans and computes it; the batch is one sample of it.
        was_program: one program for the whole step has served the last one.
    """

    def __init__(self, derivatives: Any, loss: Callable[..., Any], options: Any) -> None:
        modules = [*captures(derivatives.func).modules, *captures(loss).modules]
        self.wrapper = AutoJacobian.of_parameters(LossOfDerivatives(derivatives, loss, modules), in_dims=0, **options)
        self.was_program = False
        self._reached: dict[tuple[int, int], tuple[PreparedPlan, Sequence[bool]]] = {}
        self._served: tuple[Any, int] | None = None
        self._known: Sequence[tuple[str, Tensor]] = ()
        self._unhooked: int | None = None

    def compute(self, args: Sequence[Any]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the loss, and for each parameter that it leads back to its gradient."""
        unsqueezed = _lift(args)
        # hooks see what arrives at a parameter, once
        with torch.no_grad(), self._without_hooks(), write_back_copies(args, unsqueezed):
            value, gradients = self.wrapper.value_and_jacobian(*unsqueezed)
            targets = self._targets(unsqueezed)
        return value.squeeze(0), [(leaf, gradients[name].squeeze(0)) for name, leaf in targets]

    def find_plan(self, args: Sequence[Any]) -> PreparedPlan:
        """Return the plan in use for a step, after a piece of its search where one is due."""
        with torch.no_grad(), self._without_hooks():
            return find_plan(self.wrapper._plans, self.wrapper._func_args(_lift(args), {}), {})

    def plan(self, args: Sequence[Any]) -> Plan:
        """Return the plan for a step; made now if there is none."""
        with torch.no_grad():
            return self.wrapper.plan(*_lift(args))

    def tune(self, args: Sequence[Any], effort: Effort | None, budget_s: float | None) -> Plan:
        """Search for the best plan for a step."""
        with torch.no_grad():
            return self.wrapper.tune(*_lift(args), effort=effort, budget_s=budget_s)

    def explain(self, args: Sequence[Any]) -> str:
        """Explain the plan for a step."""
        with torch.no_grad():
            return self.wrapper.explain(*_lift(args))

    def _parameters(self) -> dict[str, Tensor]:
        function = self.wrapper.func
        assert isinstance(function, ModuleFunction)
        return function.parameters()

    def _without_hooks(self) -> AbstractContextManager[None]:
        """Keep tensor hooks from firing while the gradients are computed."""
        state = self.wrapper._plans.planner.function_state
        if self._unhooked == state.version and state.is_unchanged():
            return nullcontext()
        parameters = tuple(self._parameters().values())
        is_hooked = any(parameter._backward_hooks for parameter in parameters)
        self._unhooked = None if is_hooked else state.version
        return without_hooks(parameters)

    def _targets(self, unsqueezed: Any) -> Sequence[tuple[str, Tensor]]:
        """Return the parameters that the loss leads back to, by name: a backward leaves the others without a gradient.

        A plain evaluation without side effects tells, once for each plan and state of what func reads.
        """
        plans = self.wrapper._plans
        served, version = plans.fast_path, plans.planner.function_state.version
        if served is not no_fast_path and self._served == (served, version):
            return self._known
        parameters = self._parameters()
        plan, call = plans.look_up(self.wrapper._func_args(unsqueezed, {}), {})
        self.was_program = is_program(plan)
        at = id(plan), version
        if at not in self._reached:
            with plan.sandbox():
                pullback = record_pullback(plan.problem, call.leaves, call.keywords, False)
                gradients = pull_back(pullback.recorded, pullback.inputs, [torch.ones_like(pullback.recorded[0])])
            # keep the plan alive, so that no other gets its id
            self._reached = {at: (plan, [gradient is not None for gradient in gradients])}
        self._known = [pair for pair, has in zip(parameters.items(), self._reached[at][1], strict=True) if has]
        self._served = served, version
        return self._known


def is_program(plan: PreparedPlan) -> bool:
    """Check whether a plan for a whole step is one program, and not a backward of what func evaluates."""
    return isinstance(plan.compute, Replayer)


def _lift(args: Sequence[Any]) -> Any:
    """Return the arguments with the batch as one sample."""
    if all(isinstance(x, Tensor) for x in args):
        return tuple([x.unsqueeze(0) for x in args])
    return pytree.tree_map_only(Tensor, lambda x: x.unsqueeze(0), tuple(args))
