"""From a call to a prepared plan: known from the store or a neighbouring shape, or searched and stored."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from autojac.core.autocast import outside_autocast
from autojac.core.options import Options
from autojac.core.plan import Effort, Plan, effort_rank
from autojac.core.ranks import several, silent
from autojac.core.structure import Structure
from autojac.errors import SearchError, StructureChangedWarning, warn
from autojac.guards.process_state import restore_process_state
from autojac.methods.base import Method, build, build_if_known, registry
from autojac.methods.pull import Pull
from autojac.methods.support.costs import largest_move
from autojac.planning import progress
from autojac.planning.call import Call, not_overwritten
from autojac.planning.check_schedule import CheckSchedule
from autojac.planning.contents_watch import ContentsWatch
from autojac.planning.exploration import Exploration
from autojac.planning.first_call import FirstCallReport
from autojac.planning.isolation import isolate_planning, mark_planning
from autojac.planning.known_plans import KnownPlans
from autojac.planning.pinned_plans import pinned_store
from autojac.planning.prepare_compute import leave_no_graph, prepare_compute
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.problem_builder import ProblemBuilder
from autojac.planning.room import require_room
from autojac.planning.search import measure, optimize
from autojac.planning.search.optimize import PriorKnowledge, SearchResult
from autojac.planning.search.point import SearchPoint
from autojac.probe import ProbeResult
from autojac.problem.empty_events import without_empty_parts
from autojac.problem.problem import Problem
from autojac.replay.tracer import find_unfixed_argument

registry()  # fill it when autojac is imported, so that no first Jacobian waits for it


class ProbedCall(NamedTuple):
    """A call, the results of its first evaluation and of the probe, and when planning began, by the search's clock."""

    call: Call
    report: FirstCallReport
    probe: ProbeResult
    start: float


class Planner:
    """Finds or makes the plan for a call of one function.

    Args:
        func: the user's function.
        options: the options of its `AutoJacobian`.

    Attributes:
        builder: describes its calls, probes them and states their problems.
        repository, function_state: as of the builder.
        known: the plans that need no search.
    """

    def __init__(self, func: Callable[..., Any], options: Options) -> None:
        self.options = options
        self.builder = ProblemBuilder(func, options)
        self.repository, self.function_state = self.builder.repository, self.builder.function_state
        self.known = KnownPlans(self.repository, options)

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
        trained, call = call.trained, call.detach()
        with isolate_planning(call, trained) as inside:
            report = self.builder.inspect(call)
            if report.is_empty:
                return self._empty(call, report)
            if inside or several():
                # within the search of an AutoJacobian whose func calls this one, times say nothing; on several ranks
                # they differ, and the ranks would evaluate func unequally often
                effort = "estimate"
            start = measure.clock.now()
            wanted = effort or ("estimate" if self.options.on_miss == "estimate" else self.options.effort)
            before = self.known.plan(report, force)
            if before is not None and not force and not self.known.is_too_poor(before, wanted):
                prepared = self._apply(call, report, before)
                if prepared is not None:
                    return self._explore(prepared, before, wanted)
                before = None
            self.known.require_allowed(report, force)
            online = self.options.on_miss == "online" and effort is None and wanted != "estimate"
            result = self.builder.probe(call, report, "estimate" if online else wanted)
            probed = ProbedCall(call, report, result, start)
            if not online:
                return self._search(probed, wanted, budget_s, before)
            estimated = self._search(probed, "estimate", budget_s, before, goal=wanted)
            return self._explore(estimated, estimated.plan, wanted)

    def recover(self, plan: PreparedPlan, call: Call, reason: str, structure: bool = True) -> PreparedPlan:
        """Return a plan in place of one that a check has refuted.

        The structure is probed again at this input. Where that still sees no coupling the check is believed, unless it
        found J right and the gradient through it wrong, which says nothing of the `structure`.
        """
        with mark_planning(), restore_process_state(), silent(call.captured.modules), outside_autocast():
            start, call = measure.clock.now(), call.detach()
            if plan.keys is not None:
                self.repository.refute(plan.keys, reason)
            self.known.clear()
            report = self.builder.inspect(call)
            result = self.builder.probe(call, report)
            same = result.structure.sparsity == plan.problem.structure.sparsity is not None
            if structure and (result.structure.independent or same):
                result = dataclasses.replace(result, structure=result.structure.refute(f"guard: {reason}"))
            prepared = self._search(ProbedCall(call, report, result, start), "estimate")
            return self._explore(prepared, prepared.plan, self.options.effort)

    def _explore(self, prepared: PreparedPlan, plan: Plan, wanted: Effort) -> PreparedPlan:
        """Let the search behind a plan that may not be the best go on while it is used."""
        is_unfinished = not plan.finished or effort_rank(plan.effort) < effort_rank(wanted)
        explores = self.options.on_miss == "online" and wanted != "estimate" and pinned_store() is None
        if explores and is_unfinished and not prepared.is_provisional:
            trials = self.known.trials(prepared.keys, plan)
            prior_trials = [trial for trial in trials if trial.seconds is not None or trial.state != "complete"]
            prior = PriorKnowledge(self.known.hints(prepared.keys), build(plan.method), prior_trials)
            prepared.exploration = Exploration(prior, wanted, self.options.budget_s)
        return prepared

    def _apply(self, call: Call, report: FirstCallReport, plan: Plan) -> PreparedPlan | None:
        """Prepare a known plan for this call; None if its method does not apply here."""
        if len(plan.batched) != len(report.signature.leaves):
            return None
        analysis = self.builder.analyze(call, report, plan.batched)
        if plan.structure.branches:
            report.sandbox.widen()
        if not set(report.first.effects) <= set(plan.structure.effects):
            return None  # it was chosen when func had fewer side effects
        problem = self.builder.problem(call, report, plan.structure, plan.batched, analysis)
        if not plan.structure.fits(problem.batch, problem.out_size, problem.in_size):
            return None
        method = build_if_known(plan.method)
        if method is None or method.unsupported(without_empty_parts(problem)) is not None:
            return None
        self.known.remember(report.signature, plan)
        return self.make(call, report, problem, plan, method)

    def _search(
        self,
        probed: ProbedCall,
        effort: Effort,
        budget_s: float | None = None,
        before: Plan | None = None,
        goal: Effort | None = None,
    ) -> PreparedPlan:
        """Make a plan, and store it.

        Args:
            probed: the call, and what is known about it.
            effort, budget_s: of the search.
            before: the plan so far. Only a faster one replaces it, and a search that was not finished goes on.
            goal: effort of the search that will go on from here.
        """
        call, report, result, start = probed
        structure, device = result.structure, str(call.leaves[0].device)
        problem = self.builder.problem(call, report, structure, result.batched, result.analysis)
        require_room(problem)
        if not several():  # ranks must decide alike, whatever their machines
            largest = None if effort == "estimate" else largest_move(problem)
            problem = dataclasses.replace(problem, machine=self.repository.machine(report.keys[1], device, largest))
        search = functools.partial(
            optimize.search,
            point=self.point(call, report),
            effort=effort,
            budget_s=self.options.budget_s if budget_s is None else budget_s,
            prior=PriorKnowledge(self.known.hints(report.keys), *self.known.so_far(report.keys, before)),
            begun=start,
        )
        with progress.reporter(effort) as show, _explaining(self.options):
            try:
                outcome = search(without_empty_parts(problem), progress=show)
            except SearchError as error:
                if structure.sparsity is None:
                    raise
                # no method can be right where the pattern of a sparse matrix misses an entry
                structure = structure.without_patterns(f"patterns: they miss entries ({error.reasons})")
                machine = problem.machine
                problem = self.builder.problem(call, report, structure, result.batched, result.analysis, machine)
                outcome = search(without_empty_parts(problem), progress=show)
                self._tell_of_missed_entries(structure)
        plan = _plan_of(outcome, structure, result, effort, goal, measure.clock.now() - start)
        if outcome.verified:
            self.repository.save(report.keys, plan)
            self.known.remember(report.signature, plan)
        prepared = self.make(call, report, problem, plan, outcome.method)
        prepared.is_fresh, prepared.is_provisional = outcome.verified, not outcome.verified
        return prepared

    @staticmethod
    def point(call: Call, report: FirstCallReport) -> SearchPoint:
        """Return where candidates are checked and timed."""
        trained = not_overwritten(call.trained, report.sandbox.written)
        return SearchPoint(call.leaves, call.keywords, trained, report.sandbox)

    def _tell_of_missed_entries(self, structure: Structure) -> None:
        if structure.assurance == "declared":
            message = (
                "the declared pattern misses entries and was left aside. This Jacobian is right. Correct the "
                "pattern, or leave it out of coupling= to have it probed"
            )
            warn(f"{self.repository.function_name}: {message}", StructureChangedWarning)

    def make(
        self, call: Call, report: FirstCallReport | PreparedPlan, problem: Problem, plan: Plan, method: Method
    ) -> PreparedPlan:
        """Prepare a plan for calls like this one, with the signature and sandbox of a report or of another plan."""
        compute = prepare_compute(call.layout, problem, method)
        if problem.analysis is not None:
            problem.analysis.close()
        compute = leave_no_graph(compute, problem, report.sandbox)
        prepared = PreparedPlan(call.layout, problem, plan, compute, report.signature, report.sandbox, report.keys)
        prepared.pushes = problem.differentiable and method.pushes
        structure = problem.structure
        reads_pattern = structure.sparsity is not None and (method.trusts_zeros or problem.layout == "sparse")
        if structure.assumes and (structure.depends_on_arguments or reads_pattern):
            prepared.contents = ContentsWatch(problem, call.captured)
        # ranks must evaluate func equally often, whatever their guards see
        is_fixed = not (find_unfixed_argument(call.keywords) or prepared.contents or prepared.pushes or several())
        prepared.is_proved = is_fixed and structure.assurance == "proved"
        if structure.assumes and find_unfixed_argument(call.keywords):
            prepared.schedule.numbers = set()
        return prepared

    def _empty(self, call: Call, report: FirstCallReport) -> PreparedPlan:
        """Return the plan for a Jacobian without elements."""
        structure = Structure("independent", evidence=("empty: there is nothing to probe",))
        problem = self.builder.problem(call, report, structure, report.guess)
        method = Pull.suiting(problem, "vmap")
        plan = Plan(method.spec(), structure, report.guess, "estimate", source="estimate")
        compute = prepare_compute(call.layout, problem, method)
        schedule = CheckSchedule(next_check=math.inf)
        return PreparedPlan(call.layout, problem, plan, compute, report.signature, report.sandbox, schedule=schedule)


def _plan_of(
    outcome: SearchResult, structure: Structure, probe: ProbeResult, effort: Effort, goal: Effort | None, seconds: float
) -> Plan:
    """Return the plan for a search's result; with a `goal` its search goes on with that effort."""
    return Plan(
        outcome.method.spec(),
        structure,
        probe.batched,
        goal or effort,
        outcome.seconds,
        outcome.default_seconds,
        outcome.memory_bytes,
        seconds,
        "estimate" if effort == "estimate" else "search",
        outcome.trials,
        outcome.finished and goal is None,
        outcome.jitter,
    )


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
