"""A training step as one computation: the Jacobian of one number in all parameters that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autojac.api.autojacobian import AutoJacobian
from autojac.api.loss_of_derivatives import LossOfDerivatives
from autojac.autodiff.pullback import pull_back
from autojac.core import pytree
from autojac.core.module_function import ModuleFunction
from autojac.core.plan import Effort, Plan
from autojac.core.sandbox import without_hooks
from autojac.core.settable_arguments import write_back_copies
from autojac.guards.captures import captures
from autojac.guards.function_state import FunctionState
from autojac.planning.fast_path import no_fast_path
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.run_call import find_plan
from autojac.problem.problem import record_pullback
from autojac.replay.replayer import Replayer

STRAY = "tensors outside of all modules require grad: make them parameters of a module to plan with them"
MOST_PLANS = 64
"""Maximum number of plans for which the parameters that the loss depends on are remembered."""


class StepResult(NamedTuple):
    """The outcome of a step.

    Attributes:
        value: the loss.
        gradients: pairs of a parameter and its gradient, for the parameters that the loss depends on.
        plan: what has served it; None for the same as the last time.
    """

    value: Tensor
    gradients: list[tuple[Tensor, Tensor]]
    plan: PreparedPlan | None


class WholeStep:
    """The loss on derivatives and its gradients in the parameters, planned as one Jacobian.

    Args:
        derivatives: wrapper that computes the derivatives.
        loss: a function of these and of further arguments.
        options: how to plan, as of `AutoJacobian`.

    Attributes:
        wrapper: plans and computes it; the batch is one sample of it.
        why_not: why no step of model and loss can be computed as a whole; empty if it can.
    """

    def __init__(self, derivatives: Any, loss: Callable[..., Any], options: Any) -> None:
        self._parts = derivatives.func, loss
        self._modules, self.why_not = self._look_for_trained()
        self.wrapper = AutoJacobian.of_parameters(
            LossOfDerivatives(derivatives, loss, self._modules), in_dims=0, **options
        )
        self._version = self._function_state.version
        # of plans, whether the loss depends on each parameter; they are kept alive, so that no other gets their ids
        self._dependence: dict[int, tuple[PreparedPlan, Sequence[bool]]] = {}
        self._dependence_version = self._version
        self._last: tuple[Any, int, Sequence[tuple[str, Tensor]]] | None = None
        self._unhooked: int | None = None

    @property
    def _function_state(self) -> FunctionState:
        return self.wrapper._plans.planner.function_state

    def compute(self, args: Sequence[Any]) -> StepResult | None:
        """Compute a step; None, before anything is evaluated, if model and loss no longer train the same modules."""
        unsqueezed, plan = _lift(args), None
        with torch.no_grad(), write_back_copies(args, unsqueezed):
            fast_path = self.wrapper._plans.fast_path
            served = fast_path(unsqueezed)
            last, version = self._last, self._function_state.version
            if served is not None and last is not None and last[:2] == (fast_path, version):
                targets = last[2]
            else:
                # hooks see what arrives at a parameter, once. A program calls none, and another thread's backward may
                # be calling them: they are left alone wherever they can be
                with self._without_hooks():
                    if served is None:
                        if not self.is_up_to_date():
                            return None
                        fast_path, served = no_fast_path, self.wrapper.value_and_jacobian(*unsqueezed)
                    plan, targets = self._find_targets(unsqueezed)
                self._last = fast_path, self._function_state.version, targets
        value, gradients = served
        return StepResult(value.squeeze(0), [(leaf, gradients[name].squeeze(0)) for name, leaf in targets], plan)

    def is_up_to_date(self) -> bool:
        """Check whether model and loss still train the parameters of the same modules, and nothing else."""
        self.wrapper._plans.observe()
        version = self._function_state.version
        if version != self._version:
            modules, why_not = self._look_for_trained()
            if why_not != self.why_not or list(map(id, modules)) != list(map(id, self._modules)):
                return False
            self._version = version
        return True

    def _look_for_trained(self) -> tuple[list[nn.Module], str]:
        """Return the modules in model and loss, and why no step can be computed as a whole; empty if it can."""
        reached = [captures(part) for part in self._parts]
        modules = [module for each in reached for module in each.modules]
        ids = {id(parameter) for module in modules for parameter in module.parameters()}
        if any(t.requires_grad and id(t) not in ids for each in reached for t in each.tensors):
            return modules, STRAY
        return modules, ""

    def find_plan(self, args: Sequence[Any]) -> PreparedPlan:
        """Return the plan in use for a step without running it, after a piece of its search if one is due."""
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
        state = self._function_state
        if self._unhooked == state.version and state.is_unchanged():
            return nullcontext()
        parameters = tuple(self._parameters().values())
        is_hooked = any(parameter._backward_hooks for parameter in parameters)
        self._unhooked = None if is_hooked else state.version
        return without_hooks(parameters)

    def _find_targets(self, unsqueezed: Any) -> tuple[PreparedPlan, Sequence[tuple[str, Tensor]]]:
        """Return the plan in use, and the parameters that the loss depends on: a backward leaves the others alone.

        A plain evaluation without side effects tells, once for each plan and state of what func reads.
        """
        parameters, version = self._parameters(), self._function_state.version
        plan, call = self.wrapper._plans.look_up(self.wrapper._func_args(unsqueezed, {}), {})
        if version != self._dependence_version or len(self._dependence) >= MOST_PLANS:
            self._dependence.clear()
            self._dependence_version = version
        if id(plan) not in self._dependence:
            with plan.sandbox():
                pullback = record_pullback(plan.problem, call.leaves, call.keywords, False)
                gradients = pull_back(pullback.recorded, pullback.inputs, [torch.ones_like(pullback.recorded[0])])
            self._dependence[id(plan)] = plan, [gradient is not None for gradient in gradients]
        depends = self._dependence[id(plan)][1]
        return plan, [pair for pair, is_reached in zip(parameters.items(), depends, strict=True) if is_reached]


def is_program(plan: PreparedPlan) -> bool:
    """Check whether a plan computes the whole step by one recorded program."""
    return isinstance(plan.compute, Replayer)


def _lift(args: Sequence[Any]) -> Any:
    """Return the arguments with the batch as one sample."""
    if all(isinstance(x, Tensor) for x in args):
        return tuple([x.unsqueeze(0) for x in args])
    return pytree.tree_map_only(Tensor, lambda x: x.unsqueeze(0), tuple(args))
