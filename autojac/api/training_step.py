"""A whole training step as one plan: derivatives of a model, a loss on them, and its gradients in the parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from autojac.api.autojacobian import AutoJacobian, require_function
from autojac.api.derivatives import Derivatives
from autojac.api.hessian import AutoHessian
from autojac.api.loss_of_derivatives import LossOfDerivatives, own_inputs
from autojac.autodiff.open_modes import hooked, transforming
from autojac.autodiff.pullback import accumulate_gradients, backward, pull_back
from autojac.core import pytree
from autojac.core.call import describe
from autojac.core.module_function import ModuleFunction
from autojac.core.options import OnMiss, Randomness, Verify
from autojac.core.plan import Effort, Plan
from autojac.core.ranks import several
from autojac.core.sandbox import without_hooks
from autojac.core.settable_arguments import find_settable_places, write_back_copies
from autojac.errors import InputError, SearchError, UnsupportedError, kind_of
from autojac.guards.captures import captures
from autojac.guards.compiled_functions import opaque_methods
from autojac.planning.fast_path import no_fast_path
from autojac.planning.prepared_plan import PreparedPlan
from autojac.problem.problem import record_pullback
from autojac.replay.replayer import Replayer


class StepOptions(TypedDict, total=False):
    """Options of a `TrainingStep`: those of `AutoJacobian` that say how to plan."""

    effort: Effort
    on_miss: OnMiss
    budget_s: float | None
    memory_limit: int | str | None
    randomness: Randomness
    verify: Verify
    store: Any
    version: str


@opaque_methods
class TrainingStep:
    """One training step on a loss of derivatives: value and gradients in one plan, as one program where that pays.

    `step(x, *rest)` computes what `y, J = jac.value_and_jacobian(x)`, `value = loss(y, J, *rest)` and
    `value.backward()` do, and leaves the gradients in `.grad` as these would: added to what is there, through tensor
    hooks, None where nothing leads. The optimizer is the caller's. Candidates are J with a backward, the whole step
    recorded as one flat program, and that program compiled; each is checked against plain autograd, timed, stored and
    watched as plans of `AutoJacobian` are. What can't be planned as a whole is computed as J and a backward.

        >>> import torch
        >>> from autojac import TrainingStep
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> step = TrainingStep(net, lambda y, J, target: (y - target).square().mean() + J.square().mean())
        >>> optimizer.zero_grad()
        >>> value = step(torch.rand(64, 3), torch.rand(64, 3))
        >>> optimizer.step()

    Args:
        model: a module or function, whose Jacobian is taken; or an `AutoJacobian`, `Derivatives` or `AutoHessian`, for
            their options.
        loss: a function `loss(y, J, *rest)` that returns one number; of `Derivatives` each is an argument,
            `loss(u, u_t, u_x, u_xx, *rest)`; of an `AutoHessian` H, `loss(H, *rest)`. Of `Derivatives` of several
            tensors the step takes these as a tuple, `step((t, x), *rest)`.
        options: how to plan: `effort`, `on_miss`, `budget_s`, `memory_limit`, `randomness`, `verify`, `store` and
            `version` of `AutoJacobian`, by default those of the wrapper given.

    Raises:
        InputError: if model or loss can't be called.
        OptionError: for an unknown option or a value that is not accepted.
    """

    def __init__(self, model: Any, loss: Callable[..., Any], **options: Unpack[StepOptions]) -> None:
        require_function(model)
        if not callable(loss):
            raise InputError(
                f"the loss was expected to be a function, got {kind_of(loss)}. Pass one that returns a number"
            )
        is_wrapper = isinstance(model, (AutoJacobian, Derivatives, AutoHessian))
        self.source = model if is_wrapper else AutoJacobian(model, **options)
        self.loss = loss
        inner = self.source if isinstance(self.source, AutoJacobian) else self.source.planned
        defaults = {name: getattr(inner.options, name) for name in StepOptions.__annotations__}
        self._options: StepOptions = {**defaults, **options}  # type: ignore[typeddict-item]
        # searches go on for the step as a whole, not for the derivatives inside
        self._inner = self.source._replace_on_miss("tune" if self._options["on_miss"] == "tune" else "estimate")
        self._settled: set[Any] = set()
        self._whole: AutoJacobian | None = None
        self._refused: dict[Any, str] = {}
        self._reached: dict[tuple[int, int], tuple[PreparedPlan, Sequence[bool]]] = {}
        self._served: tuple[Any, int] | None = None
        self._known: Sequence[tuple[str, Tensor]] = ()
        self._unhooked: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "loss": self.loss, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["source"], state["loss"], **state["options"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"TrainingStep({self.source!r})"

    def __call__(self, x: Any, *rest: Any) -> Tensor:
        """Compute the loss, and add its gradients to `.grad` of all parameters that require grad.

        Args:
            x: what the model takes; the batch.
            rest: what the loss takes besides derivatives, such as targets.

        Returns:
            The loss, a number without graph.

        Raises:
            OutputError: if the loss is not one number.
            InputError, MutationError, RandomnessError: where there are no such derivatives.
        """
        args = (x, *rest)
        if self._reason(args):
            return self._plain(args)
        whole = self._wrapper(x)
        try:
            # hooks see what arrives at a parameter, once
            unsqueezed = _lift(args)
            with torch.no_grad(), self._without_hooks(whole), write_back_copies(args, unsqueezed):
                value, gradients = whole.value_and_jacobian(*unsqueezed)
                targets = self._targets(whole, args)
        except (SearchError, UnsupportedError) as error:
            self._refused[_key(args)] = str(error)
            return self._plain(args)
        accumulate_gradients([(leaf, gradients[name].squeeze(0)) for name, leaf in targets])
        total: Tensor = value.squeeze(0)
        return total

    def plan(self, x: Any, *rest: Any) -> Plan:
        """Return the plan for such a step; made now if there is none.

        Raises:
            SearchError, UnsupportedError: if there is none for the step as a whole.
        """
        with torch.no_grad():
            return self._wrapper(x).plan(*_lift((x, *rest)))

    def tune(self, x: Any, *rest: Any, effort: Effort | None = None, budget_s: float | None = None) -> Plan:
        """Search for the best plan for such a step: first the method for the derivatives, then the step with it.

        Args:
            x, rest: a step.
            effort, budget_s: of each of the two searches, as of `AutoJacobian.tune`.
        """
        self._inner.tune(*own_inputs(self._inner, x), effort=effort, budget_s=budget_s)
        self._settle(x)
        self._refused.pop(_key((x, *rest)), None)
        with torch.no_grad():
            return self._wrapper(x).tune(*_lift((x, *rest)), effort=effort, budget_s=budget_s)

    def explain(self, x: Any, *rest: Any) -> str:
        """Explain the plan for such a step, or say why it is computed as derivatives and a backward."""
        reason = self._reason((x, *rest))
        if reason:
            return f"derivatives, then a backward: {reason}\n{self.source.explain(*own_inputs(self.source, x))}"
        with torch.no_grad():
            return self._wrapper(x).explain(*_lift((x, *rest)))

    def _reason(self, args: Sequence[Any]) -> str:
        """Return why a step can't be planned as a whole; empty if it can."""
        if several():
            return "several ranks reduce gradients in their own backward"
        if hooked() or transforming():
            return "a transform, or hooks on saved tensors, are to see the backward"
        if any(tensor.requires_grad for tensor in find_settable_places(args)[1]):
            return "an argument requires grad, which a backward would reach besides the parameters"
        if self._whole is None and self._stray():
            return "tensors outside of all modules require grad: make them parameters of a module to plan with them"
        return self._refused.get(_key(args), "") if self._refused else ""

    def _stray(self) -> bool:
        parts = [captures(self.source.func), captures(self.loss)]
        ids = {id(p) for captured in parts for module in captured.modules for p in module.parameters()}
        tensors = itertools.chain.from_iterable(captured.tensors for captured in parts)
        return any(t.requires_grad and id(t) not in ids for t in tensors)

    def _wrapper(self, x: Any) -> AutoJacobian:
        """Return what plans the step: a Jacobian of one number, in all parameters."""
        # a search of the derivatives comes before that of the step with them
        if self._whole is None or (self._options["on_miss"] == "tune" and _key((x,)) not in self._settled):
            self._settle(x)
        if self._whole is None:
            modules = [*captures(self.source.func).modules, *captures(self.loss).modules]
            step = LossOfDerivatives(self._inner, self.loss, modules)
            self._whole = AutoJacobian.of_parameters(step, in_dims=0, **self._options)
        return self._whole

    def _settle(self, x: Any) -> None:
        """Plan and check the derivatives before the first step, which is monitored and recorded without checks."""
        with torch.enable_grad():
            inputs = own_inputs(self._inner, x)
            if not self._inner.plan(*inputs).structure.effects:
                self._inner(*inputs)
        self._settled.add(_key((x,)))

    def _without_hooks(self, whole: AutoJacobian) -> AbstractContextManager[None]:
        """Keep tensor hooks from firing while the gradients are computed."""
        state = whole._plans.planner.function_state
        if self._unhooked == state.version and state.is_unchanged():
            return nullcontext()
        assert isinstance(whole.func, ModuleFunction)
        parameters = tuple(whole.func.parameters().values())
        is_hooked = any(parameter._backward_hooks for parameter in parameters)
        self._unhooked = None if is_hooked else state.version
        return without_hooks(parameters)

    def _targets(self, whole: AutoJacobian, args: Sequence[Any]) -> Sequence[tuple[str, Tensor]]:
        """Return the parameters that the loss leads back to, by name: a backward leaves the others without a gradient.

        A plain evaluation without side effects tells, once for each plan and state of what func reads.
        """
        plans = whole._plans
        served, version = plans.fast_path, plans.planner.function_state.version
        if served is not no_fast_path and self._served == (served, version):
            return self._known
        assert isinstance(whole.func, ModuleFunction)
        parameters = whole.func.parameters()
        plan, call = plans.look_up(whole._func_args(_lift(args), {}), {})
        is_searched = plan.exploration is None and plan.plan.effort != "estimate"
        if is_searched and not isinstance(plan.compute, Replayer):
            self._refused[_key(args)] = f"no program of the whole step was faster than {plan.plan}"
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

    def _plain(self, args: Sequence[Any]) -> Tensor:
        """Compute derivatives, loss and backward one after the other."""
        value = LossOfDerivatives(self.source, self.loss, ()).value(*args)
        backward(value)
        return value.detach()


def _lift(args: Sequence[Any]) -> Any:
    """Return the arguments with the batch as one sample."""
    if all(isinstance(x, Tensor) for x in args):
        return tuple(x.unsqueeze(0) for x in args)
    return pytree.tree_map_only(Tensor, lambda x: x.unsqueeze(0), tuple(args))


def _key(args: Sequence[Any]) -> Any:
    return tuple(map(str, map(describe, args)))
