"""A whole training step as one plan: derivatives of a model, a loss on them, and its gradients in the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from autojac.api.autojacobian import AutoJacobian, require_function
from autojac.api.derivatives import Derivatives
from autojac.api.hessian import AutoHessian
from autojac.api.loss_of_derivatives import LossOfDerivatives, own_inputs, planned_call
from autojac.api.planned_call import PlannedCall
from autojac.api.step_progress import Duel, Program, Progress, ProgressByKind
from autojac.api.whole_step import WholeStep, is_program
from autojac.autodiff.open_modes import hooked, transforming
from autojac.autodiff.pullback import accumulate_gradients, backward
from autojac.core.call import outside_inference_mode
from autojac.core.options import OnMiss, Randomness, Verify
from autojac.core.plan import Effort, Plan, expression
from autojac.core.ranks import several
from autojac.core.settable_arguments import find_settable_places
from autojac.errors import AutojacError, InputError, PlanMissError, kind_of
from autojac.guards.compiled_functions import opaque_methods
from autojac.planning.pinned_plans import pinned_store
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.run_call import crediting

COMPARING = "steps are computed in both ways by turns, until it is known which is faster\n"


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
    watched as plans of `AutoJacobian` are. By default steps are J and a backward until a program of the whole step is
    found. The search for J comes first, then the search for the step with it. The first twelve steps with a program are
    taken in both ways by turns, and the faster one is kept.

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
        # where steps make no plans, tuning still needs some for the derivatives as they are evaluated inside the step
        self._nested = self._inner._replace_on_miss("estimate") if on_miss == "error" else self._inner
        self._whole: WholeStep | None = None
        self._progress = ProgressByKind()

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
        if self._why_not_whole(args):
            return self._step_separately(args)
        progress, searched, duel = self._progress.of(args), None, None
        if not progress.is_whole:
            searched, duel = self._advance(progress, args)
        whole = self._whole
        if whole is None or not (progress.is_whole or duel):
            return self._step_separately(args, progress, searched)
        if duel is None or searched is None:
            return self._step_as_whole(whole, progress, args)
        by_program = partial(self._step_as_whole, whole, progress, args)
        value = duel.take(by_program, partial(self._step_separately, args, progress, searched), searched.problem.device)
        if duel.is_over:
            progress.end(duel)
        return value

    def _step_as_whole(self, whole: WholeStep, progress: Progress, args: Sequence[Any]) -> Tensor:
        """Compute a step by the plan for all of it, or separately where that turns out not to serve."""
        try:
            result = whole.compute(args)
        except PlanMissError:
            raise
        except AutojacError as error:
            # in another mode of the model it may draw, or have no plan
            progress.refuse(str(error))
            return self._step_separately(args, progress)
        if result is None:
            # what was planned leaves out what is trained now
            self._whole = None
            self._progress.clear()
            return self._step_separately(args)
        if result.plan is not None:
            progress.is_whole = self._serves(progress, result.plan)
        accumulate_gradients(result.gradients)
        return result.value

    def plan(self, x: Any, *rest: Any) -> Plan:
        """Return the plan for such a step; made now if there is none.

        Raises:
            SearchError, UnsupportedError: if there is none for the step as a whole.
        """
        with torch.enable_grad():
            return self._settle(planned_call(self._inner, x)).plan((x, *rest))

    def tune(self, x: Any, *rest: Any, effort: Effort | None = None, budget_s: float | None = None) -> Plan:
        """Search for the best plan for such a step: first the method for the derivatives, then the step with it.

        Args:
            x, rest: a step.
            effort, budget_s: of each of the two searches, as of `AutoJacobian.tune`.
        """
        with torch.enable_grad():
            self._inner.tune(*own_inputs(self._inner, x), effort=effort, budget_s=budget_s)
            plan = self._settle(planned_call(self._inner, x)).tune((x, *rest), effort, budget_s)
        self._progress.forget((x, *rest))
        return plan

    def explain(self, x: Any, *rest: Any) -> str:
        """Explain the plan for such a step, or say why it is computed as derivatives and a backward."""
        progress, derivatives = self._progress.of((x, *rest)), planned_call(self._inner, x)
        with torch.enable_grad():
            reason = self._why_not_whole((x, *rest)) or progress.refused
            if not reason and self._is_sought(derivatives.prepare()):
                reason = "the search for the derivatives comes first, and goes on as steps are taken"
            whole = None if reason else self._settle(derivatives)
            reason = reason if whole is None else whole.why_not
            comparing = ""
            if whole is not None and (progress.duels or progress.verdicts):
                program = _program_of(whole.find_plan((x, *rest)))
                reason = reason or progress.verdicts.get(program, "")
                comparing = COMPARING * (program in progress.duels)
            if whole is not None and not reason:
                return comparing + whole.explain((x, *rest))
            return f"derivatives, then a backward: {reason}\n{derivatives.explain()}"

    def _why_not_whole(self, args: Sequence[Any]) -> str:
        """Return why this call can't be computed as a whole; empty if it can."""
        if several():
            return "several ranks reduce gradients in their own backward"
        if hooked() or transforming():
            return "a transform, or hooks on saved tensors, are to see the backward"
        if any(tensor.requires_grad for tensor in find_settable_places(args)[1]):
            return "an argument requires grad, which a backward would reach besides the parameters"
        return ""

    def _is_sought(self, plan: PreparedPlan) -> bool:
        """Check whether the search for a better plan for the derivatives comes before that for the whole step."""
        exploration = plan.exploration if self._options["on_miss"] == "online" else None
        # a compiler has more to gain from the whole step
        return exploration is not None and not exploration.is_left_to_compile

    def _settle(self, derivatives: PlannedCall) -> WholeStep:
        """Plan and check the derivatives first: inside the whole step they are recorded unchecked."""
        with torch.enable_grad():
            plan = derivatives.prepare()
            if not (plan.schedule.last_check or plan.schedule.is_off or plan.problem.structure.effects):
                derivatives.run()
        if self._whole is None or not self._whole.is_up_to_date():
            self._whole = WholeStep(self._nested, self.loss, self._options)
        return self._whole

    def _advance(self, progress: Progress, args: Sequence[Any]) -> tuple[PreparedPlan | None, Duel | None]:
        """Continue planning, unless steps are computed as a whole from now on.

        Returns:
            The plan whose search this step pays for if it is computed separately, and the duel that it is a part of.
        """
        derivatives = planned_call(self._inner, args[0])
        if not progress.reconsider(derivatives.function_state.version):
            return None, None
        with torch.enable_grad():
            plan = derivatives.prepare()
        if self._is_sought(plan):
            return plan, None
        progress.steps += 1
        if progress.steps == 1 and self._options["on_miss"] in ("online", "estimate"):
            return None, None  # there may be no other step like it
        plan.pause_search()
        try:
            return self._plan_whole(progress, derivatives, args)
        except PlanMissError:
            raise
        except AutojacError as error:
            progress.refuse(str(error))
            return None, None
        finally:
            if progress.refused:
                plan.resume_search()

    def _plan_whole(
        self, progress: Progress, derivatives: PlannedCall, args: Sequence[Any]
    ) -> tuple[PreparedPlan | None, Duel | None]:
        """Look the plan for the whole step up, and decide whether it computes steps from now on; see `_advance`."""
        whole = self._settle(derivatives)
        if whole.why_not:
            progress.refuse(whole.why_not)
            return None, None
        plan = whole.find_plan(args)
        progress.is_whole = self._serves(progress, plan)
        if progress.is_whole:
            return None, None
        duel = progress.duel_of(_program_of(plan)) if is_program(plan) else None
        if duel is None and plan.exploration is None:
            what = "is known" if plan.plan.effort == "estimate" else "was faster"
            verdict = progress.verdicts.get(_program_of(plan))
            progress.refuse(verdict or f"no program of the whole step {what}")
        return plan, duel

    def _serves(self, progress: Progress, plan: PreparedPlan) -> bool:
        """Check whether a plan for the whole computes steps: a program that has won its duel, where time counts."""
        is_timed = self._options["on_miss"] in ("online", "tune") and pinned_store() is None
        has_won = not is_timed or progress.verdicts.get(_program_of(plan)) == ""
        return plan.is_provisional or (is_program(plan) and has_won)

    def _step_separately(
        self, args: Sequence[Any], progress: Progress | None = None, searched: PreparedPlan | None = None
    ) -> Tensor:
        """Compute derivatives, loss and backward one after the other, and credit a search with what they take."""
        with nullcontext() if searched is None else crediting(searched):
            value = LossOfDerivatives(self._inner, self.loss, ()).value(*args)
            backward(value)
        if progress is not None and progress.refused and progress.refused_at is None:
            progress.refused_at = planned_call(self._inner, args[0]).function_state.version
        return value.detach()


def _program_of(plan: PreparedPlan) -> Program:
    return plan.signature, expression(plan.plan.method)
