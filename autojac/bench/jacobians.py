"""Jacobians without a graph, in the input or in the parameters: autojac against torch's ways on each workload."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

import autojac
from autojac.bench.baselines import DEFAULT, PARAMETER_WAYS, WAYS, flat_parameters, reference
from autojac.bench.results import BenchResult, Facts, Figure, Outcome, fastest
from autojac.bench.roofline import least_seconds
from autojac.bench.run import Entrant, Settings, admit, at_rest, race_with_best
from autojac.bench.workloads import Func, Workload

OWN = "autojac"
WORST = 1.03
"""What autojac is to take at most, as a multiple of torch's fastest right way."""
OVER_DEFAULT, OVER_BEST = f"over {DEFAULT}", "over torch's best"
PLAN, ROOFLINE, FIRST = "plan", "over the roofline", "first call, s"
PAYS = "calls until the search has paid"

View = Callable[[Any], Tensor]


def wrap(func: Func, settings: Settings, **options: Any) -> autojac.AutoJacobian:
    """Return the wrapper that a benchmark tunes."""
    return autojac.AutoJacobian(func, **settings.planning(), **options)


def wrapper_of(workload: Workload, func: Func, settings: Settings) -> tuple[Callable[[Tensor], Any], View]:
    """Return what computes a workload's Jacobian, and what makes one tensor of it."""
    if workload.kind == "parameters":
        assert isinstance(func, nn.Module)
        return autojac.AutoJacobian.of_parameters(func, **settings.planning()), flat_parameters
    return wrap(func, settings), lambda J: J


def race_workload(workload: Workload, settings: Settings) -> BenchResult:
    """Tune, check and time all ways and autojac on one workload."""
    with at_rest():
        func, x = workload.make(settings.device)
        truth = reference(workload, func, x)
        jac, view = wrapper_of(workload, func, settings)
        start = time.perf_counter()
        jac(x)
        first = time.perf_counter() - start
        own = admit(OWN, lambda: jac(x), truth, lambda: view(jac(x)))
        ways = list(torch_ways(workload, func, x, truth, view))
        outcomes = race_with_best([own], ways, x.device, settings, DEFAULT)
        raced = [way.run for way, o in zip(ways, outcomes[1:], strict=True) if way.run is not None and o.samples]
        bound = least_seconds(raced, x, truth)
        plan = jac.plan(x)  # type: ignore[attr-defined]
    facts: Facts = {"kind": workload.kind, "B": workload.batch, "n": workload.n, "m": workload.m}
    facts |= {"coupling": plan.structure.coupling, FIRST: first, PLAN: str(plan)}
    return BenchResult(workload.name, outcomes, tuple(comparisons(outcomes)), facts | gains(outcomes, first, bound))


def comparisons(outcomes: tuple[Outcome, ...]) -> Iterable[Figure]:
    """Compare the first outcome with torch's default, where that is right, and with torch's best."""
    own, *ways = outcomes
    default = next((way for way in ways if way.name == DEFAULT), None)
    if default is not None and default.state == "right":
        yield Figure.over(own, default, what=OVER_DEFAULT)
    best = fastest(ways)
    if best is not None:
        yield Figure.over(own, best, WORST, OVER_BEST)


def gains(outcomes: tuple[Outcome, ...], first: float, bound: float | None) -> Facts:
    """Return what a search has paid for itself by, and how far from the machine's limits the plan is."""
    own, *ways = outcomes
    best = fastest(ways)
    found: Facts = {}
    if own.seconds is not None and bound is not None:
        found[ROOFLINE] = own.seconds / bound
    if own.seconds is not None and best is not None and (best.seconds or 0.0) > own.seconds:
        found[PAYS] = math.ceil(first / ((best.seconds or 0.0) - own.seconds))
    return found


def torch_ways(workload: Workload, func: Func, x: Tensor, truth: Tensor, view: View) -> Iterable[Entrant]:
    """Check torch's ways on a workload."""
    for way in PARAMETER_WAYS if workload.kind == "parameters" else WAYS:
        reason = way.too_large(workload)
        if reason is not None:
            yield Entrant(Outcome(way.name, "skipped", reason=reason))
        else:
            yield _check(way.name, way.prepare(func), x, truth, view)


def _check(name: str, compute: Callable[[Tensor], Any], x: Tensor, truth: Tensor, view: View) -> Entrant:
    return admit(name, lambda: compute(x), truth, lambda: view(compute(x)))
