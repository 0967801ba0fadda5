"""How good stored plans are: fresh interleaved races with their rivals, on the machine at hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autojac.core.plan import Effort, Plan, Trial, expression
from autojac.core.signature import bucket
from autojac.errors import PlanMissError
from autojac.methods.base import Method, build, build_if_known
from autojac.planning.call import Call
from autojac.planning.explain import rank_correlation
from autojac.planning.isolation import isolate_planning
from autojac.planning.planner import Planner
from autojac.planning.search import measure
from autojac.planning.search.finals import Comparison
from autojac.planning.search.point import SearchPoint
from autojac.planning.search.space import default_methods
from autojac.planning.search.trial import SearchSession
from autojac.problem.empty_events import without_empty_parts

RIVALS = 6
"""How many of the fastest candidates of a plan's search are raced with it."""
RACES = {"estimate": 3, "quick": 5, "measure": 9, "exhaustive": 15}
ROUNDS = 5
"""Rounds of each race: another method hardly wins all of them by chance."""


@dataclass(frozen=True)
class RaceResult:
    """The result of fresh races of a plan and its rivals.

    Attributes:
        batch: number of samples.
        regret: the plan's time over that of the fastest, 1 where it is the fastest; None where it did not run.
        flips: share of the races that another method won by more than noise.
        fastest: the fastest method, human-readable.
        seconds: of one call by each method, human-readable, the fastest first.
        races: how many there were.
    """

    batch: int
    regret: float | None
    flips: float
    fastest: str
    seconds: dict[str, float]
    races: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Audit:
    """A stored plan, raced at the call's batch and at the smallest one that shares it, where samples can be sliced."""

    plan: Plan
    own: RaceResult
    shared: RaceResult | None


def audit_call(planner: Planner, call: Call, effort: Effort, budget_s: float | None = None) -> Audit:
    """Race the stored plan for a call with the fastest candidates of its search, and with torch's default.

    Args:
        planner: of the function.
        call: the call.
        effort: decides how many races there are.
        budget_s: seconds after which no race is started; each batch gets one at least.

    Raises:
        PlanMissError: no plan is stored for the call.
    """
    trained, call = call.trained, call.detach()
    with isolate_planning(call, trained):
        report = planner.builder.inspect(call)
        plan = planner.repository.find(report.keys)
        if plan is None:
            raise PlanMissError(
                f"no plan is stored for this call in {planner.repository.description}, so there is nothing to audit. "
                "Make one with `autojac tune`"
            )
        analysis = planner.builder.analyze(call, report, plan.batched)
        problem = without_empty_parts(planner.builder.problem(call, report, plan.structure, plan.batched, analysis))
        session = SearchSession(problem, effort).at(planner.point(call, report))
        method = build(plan.method)
        rivals = _rivals(planner.repository.trials(report.keys), method)
        rivals = list(dict.fromkeys([method, *rivals, *default_methods(problem)[:1]]))
        end = None if budget_s is None else measure.clock.now() + budget_s
        result = _race(session, rivals, method, end)
        return Audit(plan, result, _at_smallest(session, rivals, method, end))


def _rivals(trials: Iterable[Trial], method: Method) -> list[Method]:
    """Return the fastest candidates of a search; what a compiler makes takes part only where it is the plan."""
    timed = sorted((t for t in trials if t.state == "complete" and t.seconds), key=lambda t: t.seconds or 0.0)
    rivals: list[Method] = []
    for trial in timed:
        rival = build_if_known(trial.method)
        if rival is not None and (not rival.compiles or rival == method):
            rivals.append(rival)
    return rivals[:RIVALS]


def _race(session: SearchSession, rivals: Sequence[Method], method: Method, end: float | None) -> RaceResult:
    """Race some methods several times."""
    flips = races = 0
    seconds: dict[Method, list[float]] = {}
    usable = [rival for rival in rivals if rival.unsupported(session.problem) is None]
    for _ in range(RACES[session.effort]):
        race = Comparison()
        for _ in range(ROUNDS):
            race.run_round(session, usable)
        if not race.samples:
            break
        for rival, timing in race.timings().items():
            seconds.setdefault(rival, []).append(timing.seconds)
        races += 1
        if method in race.samples:
            flips += any(race.is_faster(rival, method) for rival in race.samples if rival != method)
        if end is not None and measure.clock.now() > end:
            break
    times = {rival: statistics.median(samples) for rival, samples in seconds.items()}
    ranked = sorted(times, key=lambda rival: (times[rival], repr(rival)))
    return RaceResult(
        session.problem.batch,
        times[method] / times[ranked[0]] if method in times else None,
        flips / races if races else 0.0,
        expression(ranked[0].spec()) if ranked else "",
        {expression(rival.spec()): times[rival] for rival in ranked},
        races,
    )


def _at_smallest(
    session: SearchSession, rivals: Sequence[Method], method: Method, end: float | None
) -> RaceResult | None:
    """Race the same methods on the fewest samples that share the plan; None where samples can't be sliced."""
    problem, point = session.problem, session.point
    size, structure = bucket(problem.batch) // 2 + 1, problem.structure
    if size >= problem.batch or not (structure.independent and structure.sliceable) or structure.effects:
        return None
    leaves = [x[:size] if leaf.batched else x for x, leaf in zip(point.leaves, problem.leaves, strict=True)]
    smaller = SearchSession(problem.resize(size), session.effort)
    smaller.at(SearchPoint(leaves, point.kwargs, point.captured, point.sandbox))
    return _race(smaller, rivals, method, end)


def rank_accuracy(searches: Iterable[Sequence[Trial]]) -> tuple[float | None, int]:
    """Return the median rank correlation of predicted and measured times over searches, and how many have one."""
    correlations = [value for trials in searches if (value := rank_correlation(trials)) is not None]
    return (statistics.median(correlations) if correlations else None), len(correlations)
