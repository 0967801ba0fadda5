"""The parts of the benchmark, as data: what each measures, and its cases by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from autojac.bench import growth, regret, searching, second, zeros
from autojac.bench.interop.case import cases as interop_cases
from autojac.bench.interop.race import interop
from autojac.bench.jacobians import race_workload
from autojac.bench.overhead import overhead_cases
from autojac.bench.peers.race import peer_cases
from autojac.bench.results import BenchResult, Outcome
from autojac.bench.run import Announce, Settings, first_line
from autojac.bench.training import race_step
from autojac.bench.workloads import EVERY, of_kind

Case = Callable[[Settings], BenchResult | Iterable[BenchResult]]


@dataclass(frozen=True)
class Suite:
    """A part of the benchmark.

    Attributes:
        name: as the command line takes it.
        what: what it measures, in a line.
        cases: what it measures by name. A name before a slash stands for all that begin with it.
        chosen: cases that are measured unless others are asked for; all if None.
        quick: the same where there is little time; those chosen if None.
        by_default: whether it is a part of the whole benchmark.
    """

    name: str
    what: str
    cases: Callable[[], Mapping[str, Case]]
    chosen: Sequence[str] | None = None
    quick: Sequence[str] | None = None
    by_default: bool = True

    def select(self, only: Sequence[str], quick: bool = False) -> dict[str, Case]:
        """Return the cases of these names, or those chosen by default."""
        names = only or (self.quick if quick and self.quick is not None else self.chosen)
        return {
            name: case
            for name, case in self.cases().items()
            if names is None or name in names or name.split("/")[0] in names
        }


def _races() -> dict[str, Case]:
    return {w.name: partial(race_workload, w) for w in (*of_kind(), *of_kind("parameters"))}


def _first_of_each_kind() -> list[str]:
    first = {w.kind: w.name for w in reversed(EVERY)}
    return [name for kind, name in first.items() if kind != "training"]


def _interop() -> dict[str, Case]:
    return {case.name: partial(_one_model, case) for case in interop_cases()}


def _one_model(case: object, settings: Settings) -> list[BenchResult]:
    return interop([case], settings, settings.training)  # type: ignore[list-item]


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "jacobians", "Jacobians without a graph, by torch's ways and autojac", _races, quick=_first_of_each_kind()
        ),
        Suite(
            "training",
            "training steps on a loss of J, by J and its backward and planned as a whole",
            lambda: {w.name: partial(race_step, w) for w in of_kind("training")},
            quick=("pinn-2-50-50-50-1",),
        ),
        Suite(
            "second", "Hessians, Laplacians, steps and products", lambda: second.CASES, quick=("chain-hessian", "jvp")
        ),
        Suite("search", "first calls, searches, exploring in a loop", searching.search_cases, quick=searching.QUICK),
        Suite("overhead", "what calls add to their program", overhead_cases, quick=("cached call of sin",)),
        Suite(
            "growth",
            "time against the number of samples, from 100 to a million",
            growth.growth_cases,
            quick=("sin at 100", "sin at 1000000"),
        ),
        Suite(
            "regret",
            "plans against every fixed candidate",
            lambda: {name: partial(regret.race_candidates, w) for name, w in regret.regret_cases().items()},
            chosen=regret.DEFAULT_CASES,
            quick=regret.DEFAULT_CASES[:1],
        ),
        Suite(
            "zeros",
            "sparse layouts against what knows of no zeros; packed molecules; a million coupled points",
            lambda: {name: partial(zeros.zeros, name) for name in zeros.RACES},
            chosen=("burgers", "conv1d", "brusselator", "molecules"),
            quick=("brusselator",),
        ),
        Suite(
            "peers",
            "JAX, asdex and TensorFlow in environments of their own (make bench-peers)",
            peer_cases,
            quick=("sin, 1 thread",),
            by_default=False,
        ),
        Suite("interop", "models of other libraries that are installed (autojac[interop])", _interop, by_default=False),
    )
}
"""All parts of the benchmark by name, in the order in which they are run."""


def run_suites(
    names: Sequence[str], only: Sequence[str], settings: Settings, announce: Announce = lambda name: None
) -> Iterator[BenchResult]:
    """Measure case by case; one that fails is a result with an error, and the others go on.

    Args:
        names: of suites.
        only: names of cases; those that each suite chooses by default if empty.
        settings: how to measure.
        announce: called with each case's name before its turn.
    """
    for name in names:
        for case_name, case in SUITES[name].select(only, settings.quick).items():
            announce(f"{name}: {case_name}")
            try:
                found = case(settings)
                results = [found] if isinstance(found, BenchResult) else list(found)
            except Exception as error:
                results = [BenchResult(case_name, (Outcome("autojac", "error", reason=first_line(error)),), (), {})]
            yield from (dataclasses.replace(result, suite=name) for result in results)
