"""Race `AutoJacobian(func)` against torch's ways on functions and models of other libraries."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import autojac
from autojac.autodiff.tolerance import disagreement
from autojac.bench.interop.case import Built, Case, elsewhere
from autojac.bench.interop.ways import EXACT, WAYS, exact, loss_gradient
from autojac.bench.jacobians import OVER_BEST
from autojac.bench.results import BenchResult, Figure, Outcome
from autojac.bench.run import FAR, Announce, Entrant, Settings, admit, race_entrants
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.search import measure
from autojac.replay.replayer import Replayer

OWN = "autojac"
WORST, MEAN = 1.03, {False: 0.5, True: 0.85}
"""What autojac is to take at most, as a multiple of torch's fastest right way: each case, and the geometric mean
without and with a training step."""
UNSERVED, FIRST_S, WATCH_US = 0.3, 5.0, 10.0
WATCHES = 64
"""Comparisons of what func reads that are timed."""
SETTLING_CALLS = 4
"""Calls at each of two points before the race: what a first call leaves, such as a library's cache, shows in others."""
REFUSED, FAILED = "not possible, ", "UnsupportedError: "
"""What stands before the reasons for which nothing is recorded."""
SERVED, WHY = "served", "the replay, or why there is none"
LINE = 300
"""Characters of an error that are kept."""


def interop(
    chosen: Sequence[Case], settings: Settings, training: bool = False, announce: Announce = lambda name: None
) -> list[BenchResult]:
    """Race on each case whose libraries are installed.

    Args:
        chosen: the cases.
        settings: how to measure; the effort is that of `AutoJacobian` by default, `quick`.
        training: race training steps: J, a loss of it, and the backward to the parameters.
        announce: called with each case's name before its turn.
    """
    races = []
    for case in chosen:
        if case.missing is not None:
            announce(f"{case.name} left out, {case.missing} is not installed")
        elif case.trains or not training:
            announce(case.name)
            with torch.set_grad_enabled(training), warnings.catch_warnings():
                # what libraries and torch warn of is no matter of a benchmark
                warnings.simplefilter("ignore")
                races.append(race_case(case, settings, training))
    return races


def together(races: Sequence[BenchResult], training: bool = False) -> BenchResult:
    """Return the figures that all cases give together."""
    right = [race for race in races if race.outcomes[0].state == "right"]
    ratios = [race.figures[0].value for race in right if math.isfinite(race.figures[0].value)]
    served = sum(race.facts[SERVED] == "yes" for race in right) / max(1, len(right))
    figures = [
        Figure("share of cases without a right Jacobian", 1 - len(right) / max(1, len(races)), 0.0),
        Figure("share of cases that no replay serves", 1 - served, UNSERVED),
        Figure("geometric mean over torch's best", statistics.geometric_mean(ratios or [math.nan]), MEAN[training]),
        Figure("worst over torch's best", max(ratios, default=math.nan), WORST),
        Figure("longest first call, s", _largest(races, "first s"), FIRST_S),
        Figure("dearest comparison of what func reads, µs", _largest(races, "watch µs"), WATCH_US),
    ]
    name = f"{len(races)} {'training steps' if training else 'cases'} of other libraries"
    return BenchResult(name, (), tuple(figures), {})


def race_case(case: Case, settings: Settings, training: bool = False) -> BenchResult:
    """Check and time torch's ways and autojac on one case, in one run."""
    try:
        built = case.build()
        with torch.no_grad():
            truth = exact(built.func)(built.x)
    except Exception as error:
        return _fail(case.name, Outcome(OWN, "error", reason=f"not built: {_line(error)}"))
    jac = autojac.AutoJacobian(built.func, store=autojac.PlanStore(":memory:"), on_miss="tune", **built.options)
    start = time.perf_counter()
    try:
        jac(built.x)
        first = time.perf_counter() - start
        _settle(jac, built, truth)
        prepared, _ = jac._run((built.x,), {})
    except Exception as error:
        return _fail(case.name, Outcome(OWN, "error", reason=_line(error)))
    entrants = _entrants(jac, built, truth, training)
    own, *ways = (entrant.outcome for entrant in race_entrants(entrants, built.x.device, settings, FAR, always=(OWN,)))
    best = min((way for way in ways if way.state == "right"), key=lambda way: way.seconds or math.inf, default=None)
    figure = Figure.over(own, best, WORST, OVER_BEST)
    facts: dict[str, str | float] = {
        "first s": first,
        "watch µs": watch_us(prepared),
        SERVED: "yes" if is_served(prepared) else "no",
        WHY: str(prepared.plan) if is_served(prepared) else reason(prepared),
    }
    return BenchResult(case.name, (own, *ways), (figure,), facts)


def _entrants(jac: Callable[[Tensor], Tensor], built: Built, truth: Tensor, training: bool) -> list[Entrant]:
    """Check autojac and torch's ways; every row one by one is among them where nothing quicker is right."""
    found = [_entrant(name, run, built, truth, training) for name, run in _runs(jac, built)]
    rows = Entrant(Outcome(EXACT, "skipped", reason="a quicker way is right"))
    if not any(entrant.outcome.state == "right" for entrant in found[1:]):
        rows = _entrant(EXACT, exact(built.func), built, truth, training)
    return [*found, rows]


def _runs(jac: Callable[[Tensor], Tensor], built: Built) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    yield OWN, jac
    for name, way in WAYS.items():
        yield name, way(built.func)


def _entrant(name: str, run: Callable[[Tensor], Tensor], built: Built, truth: Tensor, training: bool) -> Entrant:
    """Check a way's numbers; of a training step its gradients are checked too, and its time is the step's."""
    checked = admit(name, lambda: run(built.x).detach(), truth)
    if not training or checked.run is None or built.module is None:
        return checked
    parameters = [parameter for parameter in built.module.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        # one row: gradients are compared on one scale, since those of single weights may be rounding alone
        return loss_gradient(run(built.x), parameters)[None]

    return admit(name, step, loss_gradient(exact(built.func)(built.x), parameters)[None])


def _settle(jac: Callable[[Tensor], Tensor], built: Built, truth: Tensor) -> None:
    """Call it at two points in turn, and check each result.

    Raises:
        ArithmeticError: if one is wrong.
    """
    other = elsewhere(built.x)
    with torch.no_grad():
        points = [(built.x, truth), (other, exact(built.func)(other))]
    for turn in range(SETTLING_CALLS):
        for point, expected in points:
            error = disagreement(jac(point).detach(), expected)
            if error is not None:
                raise ArithmeticError(f"wrong in round {turn}, off by {error:.2g} relative to the reference")


def is_served(prepared: PreparedPlan) -> bool:
    """Check whether a recorded program serves calls."""
    compute = prepared.compute
    return isinstance(compute, Replayer) and compute.bound is not None


def reason(prepared: PreparedPlan) -> str:
    """Return why no recorded program serves calls."""
    state = prepared.problem.function_state
    lines = list(state.lines()) if state is not None else []
    replays = [trial for trial in prepared.plan.trials if trial.method.get("method") == "Replay"]
    lines += [trial.reason for trial in replays if trial.reason is not None]
    refused = [line.partition(mark)[2] for mark in (REFUSED, FAILED) for line in lines if mark in line]
    timed = sum(trial.seconds is not None for trial in replays)
    return next(iter(refused), f"{prepared.plan} won; {timed} of {len(replays)} replays were timed")


def watch_us(prepared: PreparedPlan) -> float:
    """Return how many microseconds one comparison of everything that func reads takes."""
    state = prepared.problem.function_state
    if state is None:
        return 0.0
    return 1e6 * measure.repeat(state.is_unchanged, torch.device("cpu"), 1e-3, WATCHES).seconds


def _largest(races: Sequence[BenchResult], fact: str) -> float:
    return max((value for race in races if isinstance(value := race.facts[fact], float)), default=math.nan)


def _fail(name: str, own: Outcome) -> BenchResult:
    """Return a case without a race, with the outcomes of all others, so that they stand in one table."""
    ways = [Outcome(way, "skipped") for way in (*WAYS, EXACT)]
    facts: dict[str, str | float] = {"first s": "", "watch µs": "", SERVED: "no", WHY: own.reason or ""}
    return BenchResult(name, (own, *ways), (Figure(f"{OWN} over torch", math.inf, WORST),), facts)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:LINE]
