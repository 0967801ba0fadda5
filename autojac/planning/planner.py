"""The way from a call to a prepared plan: known from the store or a neighbouring shape, or searched and stored."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

from autojac.autodiff.open_modes import saved_tensors_apart
from autojac.core.autocast import outside_autocast
from autojac.core.options import Options
from autojac.core.plan import Effort, Plan, effort_rank
from autojac.core.ranks import several, silent
from autojac.core.sandbox import without_hooks
from autojac.core.signature import Signature, bucket
from autojac.core.structure import Structure
from autojac.core.time_limit import end_watch
from autojac.errors import PlanMissError, SearchError, StoreError, StructureChangedWarning, warn
from autojac.guards.process_state import as_found
from autojac.methods.base import Method, build, registry
from autojac.methods.pull import Pull
from autojac.planning.call import Call, not_overwritten
from autojac.planning.check_schedule import CheckSchedule
from autojac.planning.contents_watch import ContentsWatch
from autojac.planning.first_call import FirstCallReport
from autojac.planning.plan_repository import Keys
from autojac.planning.prepare_compute import leave_no_graph, prepare_compute
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.problem_builder import ProblemBuilder
from autojac.planning.room import require_room
from autojac.probe import ProbeResult
from autojac.problem.empty_events import solid
from autojac.problem.problem import Problem
from autojac.replay.tracer import unfixed
from autojac.torch_internals import pytree

registry()  # found when autojac is imported, so that no first Jacobian waits for it

_planning: ContextVar[bool] = ContextVar("planning", default=False)


@contextmanager
def nested() -> Iterator[bool]:
    """Mark that a plan is being made; tell whether another one was already."""
    token = _planning.set(True)
    inside = bool(token.old_value is not Token.MISSING and token.old_value)
    try:
        yield inside
    finally:
        _planning.reset(token)
        if not inside:
            end_watch()


class Planner(ProblemBuilder):
    """Finds or makes the plan for a call of one function.

    Args:
        func: the user's function.
        options: the options of its `AutoJacobian`.
    """

    def __init__(self, func: Callable[..., Any], options: Options) -> None:
        super().__init__(func, options)
        self._neighbours: dict[Signature, tuple[int, Plan]] = {}

    def prepare(
        self, call: Call, effort: Effort | None = None, budget_s: float | None = None, force: bool = False
    ) -> PreparedPlan:
        """Return the plan for a call, from the store, a neighbouring shape, or a search.

        Args:
            call: the call.
            effort: of a search; the options' own by default.
            budget_s: seconds for a search; the options' own by default.
            force: search even if a plan is known.
        """
        trained, call = call.trained, call.detached()
        with (
            outside_autocast(),
            without_hooks(trained),
            saved_tensors_apart(),
            as_found(),
            silent(call.captured.modules),
            nested() as inside,
        ):
            report = self.inspect(call)
            if report.is_empty:
                return self._empty(call, report)
            if inside or several():
                # func calls another AutoJacobian, and this is its turn within the other's search: times would say
                # nothing; to several ranks they would say different things, and these would evaluate func unequally
                # often
                effort = "estimate"
            wanted = effort or ("estimate" if self.options.on_miss == "estimate" else self.options.effort)
            known = None if force else self._known(call, report, wanted)
            if known is not None:
                return known
            start = time.perf_counter()
            return self._search(call, report, self.probe(call, report, wanted), wanted, budget_s, start)

    def recover(self, plan: PreparedPlan, call: Call, reason: str, structure: bool = True) -> PreparedPlan:
        """Return a plan in place of one that was just caught being wrong.

        The structure is probed again at this input. Where that still sees no coupling the guard is believed, unless it
        found J right and the gradient through it wrong, which says nothing of the `structure`.
        """
        with nested(), as_found(), silent(call.captured.modules), outside_autocast():
            start, call = time.perf_counter(), call.detached()
            if plan.keys is not None:
                self.repository.refute(plan.keys, reason)
            self._neighbours.clear()
            report = self.inspect(call)
            found = self.probe(call, report)
            same = found.structure.sparsity == plan.problem.structure.sparsity is not None
            if structure and (found.structure.independent or same):
                found = dataclasses.replace(found, structure=found.structure.refuted(f"guard: {reason}"))
            return self._search(call, report, found, "estimate", None, start)

    def _known(self, call: Call, report: FirstCallReport, wanted: Effort) -> PreparedPlan | None:
        """Return a plan that needs no search; None if there is none."""
        known = self._neighbour(report.signature) or self._stored(report.keys, wanted)
        plan = None if known is None else self._apply(call, report, known)
        if plan is None and self.options.on_miss == "error":
            shapes = ", ".join(f"{leaf.shape} {leaf.dtype}" for leaf in report.signature.leaves)
            raise PlanMissError(
                f"no plan is stored for arguments {shapes} in {self.repository.description}, and on_miss='error' "
                "forbids making one. Tune ahead with jac.tune(x) or the command `autojac tune`"
            )
        return plan

    def _neighbour(self, signature: Signature) -> Plan | None:
        """Return the plan of a batch of the same bucket or a larger one: the last partial batch never searches."""
        known = self._neighbours.get(signature.without_batch())
        if known is None or bucket(signature.batch) > bucket(known[0]):
            return None
        if known[1].structure.samples is not None and signature.batch != known[0]:
            return None  # a graph of samples belongs to its batch
        return dataclasses.replace(known[1], source="neighbour")

    def _stored(self, keys: Keys, wanted: Effort) -> Plan | None:
        plan = self.repository.find(keys)
        if plan is None or (self.options.on_miss != "error" and effort_rank(plan.effort) < effort_rank(wanted)):
            return None
        return plan

    def _apply(self, call: Call, report: FirstCallReport, plan: Plan) -> PreparedPlan | None:
        """Prepare a known plan for this call; None if its method does not apply here."""
        if len(plan.batched) != len(report.signature.leaves):
            return None
        analysis = self.analyze(call, report, plan.batched)
        if not set(report.first.effects) <= set(plan.structure.effects):
            return None  # it may have been chosen for what func then did not do
        problem = self.problem(call, report, plan.structure, plan.batched, analysis)
        if not plan.structure.fits(problem.batch, problem.out_size, problem.in_size):
            return None
        try:
            method = build(plan.method)
        except StoreError:
            return None  # made by another version of autojac
        if method.unsupported(solid(problem)) is not None:
            return None
        self._remember(report.signature, plan)
        return self._make(call, report, problem, plan, method)

    def _search(
        self,
        call: Call,
        report: FirstCallReport,
        found: ProbeResult,
        effort: Effort,
        budget_s: float | None,
        start: float,
    ) -> PreparedPlan:
        # rich and Optuna load only when something is tuned
        from autojac.planning.progress import reporter
        from autojac.planning.search.optimize import search
        from autojac.planning.search.trial import SearchPoint

        structure = found.structure
        problem = self.problem(call, report, structure, found.batched, found.analysis)
        require_room(problem)
        hints = self.repository.hints(report.keys)
        budget = self.options.budget_s if budget_s is None else budget_s
        trained = not_overwritten(call.trained, report.sandbox.captured)
        point = SearchPoint(call.leaves, call.keywords, trained, report.sandbox)
        with reporter(effort) as progress, _explaining(self.options):
            try:
                won = search(solid(problem), point, effort, budget, hints, progress)
            except SearchError as error:
                if structure.sparsity is None:
                    raise
                # a sparse matrix holds what its pattern has: where that misses an entry no method can be right
                structure = structure.without_patterns(f"patterns: they miss entries ({error.reasons})")
                problem = self.problem(call, report, structure, found.batched, found.analysis)
                won = search(solid(problem), point, effort, budget, hints, progress)
                if structure.assurance == "declared":
                    message = (
                        "the declared pattern misses entries and was left aside. This Jacobian is right. Correct the "
                        "pattern, or leave it out of coupling= to have it probed"
                    )
                    warn(f"{self.repository.function_name}: {message}", StructureChangedWarning)
        plan = Plan(
            won.method.spec(),
            structure,
            found.batched,
            effort,
            won.seconds,
            won.default_seconds,
            won.memory_bytes,
            time.perf_counter() - start,
            "estimate" if effort == "estimate" else "search",
            won.trials,
        )
        if won.verified:
            self.repository.save(report.keys, plan)
            self._remember(report.signature, plan)
        made = self._make(call, report, problem, plan, won.method)
        made.is_fresh, made.is_provisional = won.verified, not won.verified
        return made

    def _make(self, call: Call, report: FirstCallReport, problem: Problem, plan: Plan, method: Method) -> PreparedPlan:
        """Prepare a plan for calls like this one."""
        compute = prepare_compute(call.layout, problem, method)
        if problem.analysis is not None:
            problem.analysis.close()
        compute = leave_no_graph(compute, problem, report.sandbox)
        made = PreparedPlan(call.layout, problem, plan, compute, report.signature, report.sandbox, report.keys)
        made.pushes = problem.differentiable and method.pushes
        structure = problem.structure
        reads_pattern = structure.sparsity is not None and (method.trusts_zeros or problem.layout == "sparse")
        if structure.assumes and (structure.depends_on_arguments or reads_pattern):
            made.contents = ContentsWatch(problem, call.captured)
        # ranks must evaluate func equally often, whatever their guards see
        fixed = not (unfixed(call.keywords) or made.contents or made.pushes or several())
        made.is_proved = fixed and structure.assurance == "proved"
        if structure.assumes and any(isinstance(value, float) for value in pytree.tree_leaves(call.keywords)):
            made.schedule.numbers = set()
        return made

    def _remember(self, signature: Signature, plan: Plan) -> None:
        key = signature.without_batch()
        if key not in self._neighbours or self._neighbours[key][0] <= signature.batch:
            self._neighbours[key] = (signature.batch, plan)

    def _empty(self, call: Call, report: FirstCallReport) -> PreparedPlan:
        """Return the plan for a Jacobian without elements."""
        structure = Structure("independent", evidence=("empty: there is nothing to probe",))
        problem = self.problem(call, report, structure, report.guess)
        method = Pull.suiting(problem, "vmap")
        plan = Plan(method.spec(), structure, report.guess, "estimate", source="estimate")
        compute = prepare_compute(call.layout, problem, method)
        schedule = CheckSchedule(next_check=math.inf)
        return PreparedPlan(call.layout, problem, plan, compute, report.signature, report.sandbox, schedule=schedule)


@contextmanager
def _explaining(options: Options) -> Iterator[None]:
    """Name the declared coupling, if there is one, where no method gives the right Jacobian."""
    try:
        yield
    except SearchError as error:
        if options.declared is None:
            raise
        kind = repr(options.coupling) if isinstance(options.coupling, str) else "Structure(...)"
        raise SearchError(
            f"coupling={kind} was declared for func, and no method that relies on it gives the right Jacobian here "
            f"({error.reasons}). Let autojac find out by coupling='auto', or declare what holds for every input"
        ) from error
