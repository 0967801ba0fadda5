"""A whole training step as one plan: derivatives of a model, a loss on them, and its gradients in the parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from autojac.api.autojacobian import AutoJacobian, require_function
from autojac.api.derivatives import Derivatives
from autojac.api.hessian import AutoHessian
from autojac.api.loss_of_derivatives import LossOfDerivatives, own_inputs, planned_call
from autojac.api.whole_step import WholeStep, is_program
from autojac.autodiff.open_modes import hooked, transforming
from autojac.autodiff.pullback import accumulate_gradients, backward
from autojac.core.call import describe, outside_inference_mode
from autojac.core.options import OnMiss, Randomness, Verify
from autojac.core.plan import Effort, Plan
from autojac.core.ranks import several
from autojac.core.settable_arguments import find_settable_places
from autojac.core.signature import Signature
from autojac.errors import InputError, SearchError, UnsupportedError, kind_of
from autojac.guards.captures import captures
from autojac.guards.compiled_functions import opaque_methods
from autojac.guards.function_state import FunctionState
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.run_call import crediting


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


MOST_SIGNATURES = 256
"""How many kinds of steps are remembered."""


@dataclass
class _Progress:
    """How far planning has come for steps of one signature.

    Attributes:
        is_whole: the step is computed as a whole, by one program or, where nothing is planned, by a backward.
        refused: why there will be no program of the whole step; empty if there may be one.
        refused_in: the state of what func reads, and its version, for which it was refused; None where it is for good.
        signature: of the plan for the whole step, which depends on the model's flags as well.
        apart_s: seconds of the fastest step by derivatives and a backward since there is such a plan.
    """

    is_whole: bool = False
    refused: str = ""
    refused_in: tuple[FunctionState, int] | None = None
    signature: Signature | None = None
    apart_s: float = math.inf


@opaque_methods
class TrainingStep:
    """One training step on a loss of derivatives: value and gradients in one plan, as one program where that pays.

    `step(x, *rest)` computes what `y, J = jac.value_and_jacobian(x)`, `value = loss(y, J, *rest)` and
    `value.backward()` do, and leaves the gradients in `.grad` as these would: added to what is there, through tensor
    hooks, None where nothing leads. The optimizer is the caller's. Candidates are J with a backward, the whole step
    recorded as one flat program, and that program compiled; each is checked against plain autograd, timed, stored and
    watched as plans of `AutoJacobian` are. A step is J and a backward until a program of the whole is found to be
    faster, and where there is none: the search for J comes first, then that for the step with it.

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
        on_miss = self._options["on_miss"]
        self._inner = self.source if inner.options.on_miss == on_miss else self.source._replace_on_miss(on_miss)
        self._whole: WholeStep | None = None
        self._progress: dict[Any, _Progress] = {}
        self._settled: set[Any] = set()

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
        if torch.is_inference_mode_enabled():
            with outside_inference_mode((x, *rest), {}) as (args, _):
                return self(*args)
        args = (x, *rest)
        progress = self._progress_of(args)
        if self._reason(args):
            return self._plain(args)
        try:
            searched = None if progress.is_whole else self._advance(progress, args)
            if not progress.is_whole or self._whole is None:
                return self._step_apart(progress, args, searched)
            value, gradients = self._whole.compute(args)
        except (SearchError, UnsupportedError) as error:
            progress.is_whole, progress.refused = False, str(error)
            return self._plain(args)
        progress.is_whole = self._whole.was_program
        accumulate_gradients(gradients)
        return value

    def plan(self, x: Any, *rest: Any) -> Plan:
        """Return the plan for such a step; made now if there is none.

        Raises:
            SearchError, UnsupportedError: if there is none for the step as a whole.
        """
        return self._settle(x).plan((x, *rest))

    def tune(self, x: Any, *rest: Any, effort: Effort | None = None, budget_s: float | None = None) -> Plan:
        """Search for the best plan for such a step: first the method for the derivatives, then the step with it.

        Args:
            x, rest: a step.
            effort, budget_s: of each of the two searches, as of `AutoJacobian.tune`.
        """
        self._inner.tune(*own_inputs(self._inner, x), effort=effort, budget_s=budget_s)
        self._settled.discard(_key((x,)))
        plan = self._settle(x).tune((x, *rest), effort, budget_s)
        self._progress.pop(_key((x, *rest)), None)
        return plan

    def explain(self, x: Any, *rest: Any) -> str:
        """Explain the plan for such a step, or say why it is computed as derivatives and a backward."""
        progress = self._progress_of((x, *rest))
        reason = self._reason((x, *rest)) or progress.refused
        if not reason and self._plan_to_improve(x) is not None:
            reason = "the search for the derivatives comes first, and goes on as steps are taken"
        reason = reason or self._stray()
        if reason:
            return f"derivatives, then a backward: {reason}\n{self._inner.explain(*own_inputs(self._inner, x))}"
        return self._settle(x).explain((x, *rest))

    def _reason(self, args: Sequence[Any]) -> str:
        """Return why this call can't be computed as a whole; empty if it can."""
        if several():
            return "several ranks reduce gradients in their own backward"
        if hooked() or transforming():
            return "a transform, or hooks on saved tensors, are to see the backward"
        if any(tensor.requires_grad for tensor in find_settable_places(args)[1]):
            return "an argument requires grad, which a backward would reach besides the parameters"
        return ""

    def _stray(self) -> str:
        """Return why no step of the model and loss can be computed as a whole; empty if it can."""
        if self._whole is not None:
            return ""
        parts = [captures(self.source.func), captures(self.loss)]
        ids = {id(p) for captured in parts for module in captured.modules for p in module.parameters()}
        tensors = itertools.chain.from_iterable(captured.tensors for captured in parts)
        if any(t.requires_grad and id(t) not in ids for t in tensors):
            return "tensors outside of all modules require grad: make them parameters of a module to plan with them"
        return ""

    def _progress_of(self, args: Sequence[Any]) -> _Progress:
        if len(self._progress) > MOST_SIGNATURES:  # as by a counter among the arguments
            self._progress.clear()
            self._settled.clear()
        return self._progress.setdefault(_key(args), _Progress())

    def _plan_to_improve(self, x: Any) -> PreparedPlan | None:
        """Return the plan for the derivatives while the search for a better one comes before that of the whole step."""
        if self._options["on_miss"] != "online":
            return None
        with torch.enable_grad():
            plan = planned_call(self._inner, x).prepare()
        # a compiler has more to gain from the whole step
        return None if plan.exploration is None or plan.exploration.compiles_next else plan

    def _settle(self, x: Any) -> WholeStep:
        """Plan and check the derivatives before the step with them, which is monitored and recorded without checks."""
        if (key := _key((x,))) not in self._settled:
            with torch.enable_grad():
                inputs = own_inputs(self._inner, x)
                if not self._inner.plan(*inputs).structure.effects:
                    self._inner(*inputs)
            self._settled.add(key)
        if self._whole is None:
            self._whole = WholeStep(self._inner, self.loss, self._options)
        return self._whole

    def _advance(self, progress: _Progress, args: Sequence[Any]) -> PreparedPlan | None:
        """Go on with planning; return the plan whose search the next step pays for, if it is computed apart."""
        if progress.refused and progress.refused_in is not None:
            state, version = progress.refused_in
            if state.version != version:
                progress.refused = ""
        if progress.refused or self._stray():
            return None
        plan = self._plan_to_improve(args[0])
        if plan is not None:
            return plan
        plan = self._settle(args[0]).find_plan(args)
        if progress.signature != plan.signature:
            progress.signature, progress.apart_s = plan.signature, math.inf
        is_faster = is_program(plan) and (plan.plan.seconds or 0.0) <= progress.apart_s
        progress.is_whole = is_faster or plan.is_provisional
        if progress.is_whole or plan.exploration is not None:
            return plan
        what = "is known" if plan.plan.effort == "estimate" else "was faster"
        progress.refused = f"no program of the whole step {what}"
        state = planned_call(self._inner, args[0]).wrapper._plans.planner.function_state
        progress.refused_in = state, state.version
        return None

    def _step_apart(self, progress: _Progress, args: Sequence[Any], searched: PreparedPlan | None) -> Tensor:
        """Compute derivatives, loss and backward one after the other, and credit a search with what they take."""
        exploration = None if searched is None else searched.exploration
        if searched is None or exploration is None:
            return self._plain(args)
        with crediting(searched):
            value = self._plain(args)
        if progress.signature == searched.signature and value.device.type == "cpu":  # elsewhere it has only begun
            progress.apart_s = min(progress.apart_s, exploration.fastest_s)
        return value

    def _plain(self, args: Sequence[Any]) -> Tensor:
        value = LossOfDerivatives(self._inner, self.loss, ()).value(*args)
        backward(value)
        return value.detach()


def _key(args: Sequence[Any]) -> Any:
    if all(isinstance(x, Tensor) for x in args):
        return tuple([(x.shape, x.dtype, x.device) for x in args])
    return tuple(map(str, map(describe, args)))
