"""The benchmark itself: tune, check every way, then race them in turns."""

from __future__ import annotations

import importlib.metadata
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import autojac
from autojac.autodiff.tolerance import disagreement
from autojac.bench.baselines import DEFAULT, WAYS, Way, reference
from autojac.bench.results import Outcome, Race, Regret, Report, State
from autojac.bench.workloads import Func, Workload
from autojac.core.plan import Effort, expression
from autojac.methods.base import Method
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.search import measure
from autojac.planning.search.space import DEPTHS, candidates

FAR = 10.0
"""Ways this many times slower than the best are not in the race: their first calls say enough."""
CANDIDATES_FAR = 4.0

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        effort: of the search.
        rounds: of each race.
        budget_s: seconds a search may take; the effort's own by default.
        device: where to run.
        store: where plans are kept; by default in memory, so that every run tunes afresh.
        regret: whether to race every fixed candidate too.
        shortest_s: seconds that a timed block of calls lasts at least.
        race_s: seconds after which a race takes no further round, though never fewer than three.
    """

    effort: Effort = "measure"
    rounds: int = 15
    budget_s: float | None = None
    device: str = "cpu"
    store: str | None = None
    regret: bool = False
    shortest_s: float = 5e-3
    race_s: float = 60.0


@dataclass(frozen=True)
class Tuned:
    """A workload made ready, with its plan."""

    workload: Workload
    func: Func
    x: Tensor
    truth: Tensor
    jac: autojac.AutoJacobian
    entry: PreparedPlan


@dataclass(frozen=True)
class Entrant:
    """Something that computes the Jacobian, checked and run twice."""

    outcome: Outcome
    run: Run | None = None


def bench(
    workloads: Iterable[Workload], settings: Settings, announce: Callable[[str], None] = lambda name: None
) -> Report:
    """Race torch's ways and autojac on each workload.

    Args:
        workloads: what to race on.
        settings: how.
        announce: called with each workload's name before its turn.
    """
    races = []
    with torch.no_grad(), warnings.catch_warnings():
        # torch tells of slow paths, which the times show
        warnings.simplefilter("ignore")
        for workload in workloads:
            announce(workload.name)
            tuned = tune(workload, settings)
            races.append(race(tuned, settings))
    return Report(environment(settings.device), _described(settings), tuple(races))


def tune(workload: Workload, settings: Settings) -> Tuned:
    """Search for a plan, in a store that knows nothing yet unless one is named."""
    func, x = workload.make(settings.device)
    jac = wrapped(func, settings)
    entry, _ = jac._run((x,), {})
    return Tuned(workload, func, x, reference(workload, func, x), jac, entry)


def wrapped(func: Func, settings: Settings, **options: Any) -> autojac.AutoJacobian:
    """Return the wrapper that a benchmark tunes."""
    store = settings.store or autojac.PlanStore(":memory:")
    return autojac.AutoJacobian(
        func, on_miss="tune", effort=settings.effort, budget_s=settings.budget_s, store=store, **options
    )


def race(tuned: Tuned, settings: Settings) -> Race:
    """Check and time all ways and autojac on one workload."""
    workload, x, plan = tuned.workload, tuned.x, tuned.entry.plan
    own = admitted("autojac", lambda: tuned.jac(x), tuned.truth)
    ways = [torch_way(way, tuned) for way in WAYS]
    own, *ways = raced([own, *ways], x.device, settings, FAR, always=("autojac", DEFAULT))
    outcomes = tuple(entrant.outcome for entrant in ways)
    right = {way.name: way.seconds or math.inf for way in outcomes if way.state == "right"}
    default = DEFAULT if DEFAULT in right else min(right, key=right.__getitem__, default=None)
    return Race(
        workload.name,
        workload.kind,
        workload.batch,
        workload.n,
        workload.m,
        default,
        default != DEFAULT,
        str(plan),
        plan.structure.coupling,
        plan.tuning_seconds,
        own.outcome,
        outcomes,
        regret(tuned, settings) if settings.regret else None,
    )


def regret(tuned: Tuned, settings: Settings) -> Regret:
    """Return the plan's bare method against every fixed candidate of the same effort."""
    entry = tuned.entry
    methods = {expression(c.spec()): c for c in candidates(entry.problem, DEPTHS[settings.effort])}
    plan = str(entry.plan)
    entrants = [admitted(plan, lambda: entry.compute((tuned.x,), {}).jacobians[0][0], tuned.truth)]
    entrants += [_candidate(name, method, tuned) for name, method in methods.items() if name != plan]
    entrants = raced(entrants, tuned.x.device, settings, CANDIDATES_FAR, always=(plan,), left_out="slow")
    return Regret(plan, tuple(entrant.outcome for entrant in entrants))


def admitted(name: str, run: Run, truth: Tensor) -> Entrant:
    """Run it twice: its numbers are checked first, and the second call is timed."""
    try:
        J = run()
        if J.shape != truth.shape:
            return Entrant(Outcome(name, "wrong", reason=f"shape {tuple(J.shape)} instead of {tuple(truth.shape)}"))
        error = disagreement(J, truth)
        if error is not None:
            return Entrant(Outcome(name, "wrong", reason=f"off by {error:.2g} relative to the reference"))
        del J
        seconds = measure.once(run, truth.device)
    except Exception as problem:  # whatever a transform or an allocator raises is that way's result
        line = next(iter(str(problem).strip().splitlines()), "")
        return Entrant(Outcome(name, "error", reason=f"{type(problem).__name__}: {line}"[:300]))
    return Entrant(Outcome(name, "right", seconds), run)


def torch_way(way: Way, tuned: Tuned) -> Entrant:
    reason = way.too_large(tuned.workload)
    if reason is not None:
        return Entrant(Outcome(way.name, "skipped", reason=reason))
    compute = way.prepare(tuned.func)
    return admitted(way.name, lambda: compute(tuned.x), tuned.truth)


def _candidate(name: str, method: Method, tuned: Tuned) -> Entrant:
    problem = tuned.entry.problem
    if problem.result_bytes + method.workspace(problem) > problem.memory_limit:
        return Entrant(Outcome(name, "skipped", reason="needs more memory than allowed"))
    try:
        compute = method.prepare(problem)
    except Exception as error:
        return Entrant(Outcome(name, "error", reason=f"{type(error).__name__}: {error}"[:300]))
    return admitted(name, lambda: compute((tuned.x,), {}).jacobians[0][0], tuned.truth)


def raced(
    entrants: Sequence[Entrant],
    device: torch.device,
    settings: Settings,
    far: float,
    always: Sequence[str],
    left_out: State = "right",
) -> list[Entrant]:
    """Return the entrants with their times from one interleaved run, but for those far behind the best."""
    runs = {e.outcome.name: e.run for e in entrants if e.run is not None}
    first = {e.outcome.name: e.outcome.seconds or math.inf for e in entrants if e.run is not None}
    best = min(first.values(), default=0.0)
    for name, seconds in first.items():
        # one call may have been unlucky, though not by that much
        if far * best < seconds < 3 * far * best:
            first[name] = min(seconds, measure.once(runs[name], device))
    names = [name for name in first if name in always or first[name] <= far * best]
    until = time.monotonic() + settings.race_s
    table = measure.interleaved([runs[n] for n in names], device, settings.shortest_s, settings.rounds, until)
    samples = dict(zip(names, table, strict=True))
    timed = []
    for entrant in entrants:
        outcome = entrant.outcome
        if outcome.name in samples:
            outcome = outcome.raced(samples[outcome.name])
        elif entrant.run is not None:
            outcome = Outcome(outcome.name, left_out, first[outcome.name])
        timed.append(Entrant(outcome, entrant.run))
    return timed


def environment(device: str) -> dict[str, Any]:
    """Return what of this machine the times depend on; nothing that names it."""
    facts: dict[str, Any] = {
        "autojac": importlib.metadata.version("autojac"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": device,
    }
    if device.startswith("cuda"):
        facts |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(device)}
    return facts


def _described(settings: Settings) -> dict[str, Any]:
    return {
        "effort": settings.effort,
        "rounds": settings.rounds,
        "budget_s": settings.budget_s,
        "fresh_store": settings.store is None,
        "shortest_s": settings.shortest_s,
    }
