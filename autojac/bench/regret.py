"""How much faster the best fixed candidate is than the plan that a search chose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from autojac.bench.baselines import reference
from autojac.bench.jacobians import wrap
from autojac.bench.results import BenchResult, Facts, Figure, Outcome
from autojac.bench.run import Entrant, Settings, admit, at_rest, first_line, race_entrants
from autojac.bench.workloads import Workload, of_kind
from autojac.core.plan import Effort, expression
from autojac.methods.base import Method
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.search.space import DEPTHS, candidates

EFFORTS: dict[Effort, float] = {"quick": 1.15, "measure": 1.05}
"""Efforts whose plans are raced, and what each plan is to take at most over the fastest candidate."""
CANDIDATES_FAR = 3.0
DEFAULT_CASES = ("sin", "mlp-6-64-64-6", "pooled-context")


def regret_of(effort: Effort) -> str:
    return f"regret of {effort}"


def race_candidates(workload: Workload, settings: Settings) -> BenchResult:
    """Race the bare methods of each effort's plan against every fixed candidate, compilers among them.

    The fastest of many timings owes some of it to luck, so it is raced with the plans once more, and that race counts.
    """
    with at_rest():
        func, x = workload.make(settings.device)
        truth = reference(workload, func, x)
        chosen: dict[Effort, PreparedPlan] = {}
        efforts: tuple[Effort, ...] = ("quick",) if settings.quick else tuple(EFFORTS)
        for effort in efforts:
            jac = wrap(func, dataclasses.replace(settings, effort=effort, store=None))
            chosen[effort] = jac._run((x,), {})[0]
        entry = chosen["quick"]
        depth = DEPTHS["quick" if settings.quick else "measure"]
        methods = {expression(method.spec()): method for method in candidates(entry.problem, depth)}
        plans = {str(found.plan): found for found in chosen.values()}
        entrants = [_entrant(name, found, x, truth) for name, found in plans.items()]
        entrants += [_candidate(n, m, entry, x, truth) for n, m in methods.items() if n not in plans]
        timed = race_entrants(entrants, x.device, settings, CANDIDATES_FAR, always=list(plans), left_out="slow")
        outcomes = {entrant.outcome.name: entrant.outcome for entrant in timed}
        fastest = min((o for o in outcomes.values() if o.samples), key=lambda o: o.seconds or math.inf)
        last = [entrant for entrant in timed if entrant.outcome.name in {*plans, fastest.name}]
        again = race_entrants(last, x.device, settings, math.inf)
        outcomes |= {entrant.outcome.name: entrant.outcome for entrant in again}
    best = min((entrant.outcome.seconds or math.inf) for entrant in again)
    figures = tuple(
        Figure(regret_of(effort), (outcomes[str(found.plan)].seconds or math.inf) / best, EFFORTS[effort])
        for effort, found in chosen.items()
    )
    facts: Facts = {f"plan of {effort}": str(found.plan) for effort, found in chosen.items()}
    facts |= {"candidates": len(methods), "raced": sum(bool(o.samples) for o in outcomes.values())}
    facts["best candidate"] = fastest.name
    return BenchResult(workload.name, tuple(outcomes.values()), figures, facts)


def _entrant(name: str, entry: PreparedPlan, x: Tensor, truth: Tensor) -> Entrant:
    return admit(name, _first_block(entry.compute, x), truth)


def _candidate(name: str, method: Method, entry: PreparedPlan, x: Tensor, truth: Tensor) -> Entrant:
    problem = entry.problem
    if problem.result_bytes + method.workspace(problem) > problem.memory_limit:
        return Entrant(Outcome(name, "skipped", reason="needs more memory than allowed"))
    try:
        compute = method.prepare(problem)
    except Exception as error:
        return Entrant(Outcome(name, "error", reason=first_line(error)))
    return admit(name, _first_block(compute, x), truth)


def _first_block(compute: Callable[..., Any], x: Tensor) -> Callable[[], Tensor]:
    return lambda: compute((x,), {}).jacobians[0][0]


def regret_cases() -> dict[str, Workload]:
    """Return the workloads that are small enough for every candidate."""
    return {workload.name: workload for workload in of_kind() if workload.kind != "large"}
