"""Replays against what torch's documentation recommends, no compiler on either side."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from autojac.bench.baselines import DEFAULT, WAYS
from autojac.bench.results import Figure, Promised
from autojac.bench.run import Entrant, Settings, Tuned, admitted, raced, torch_way, tune
from autojac.bench.workloads import WORKLOADS, Workload

BOUNDS: dict[str, float] = {
    "mlp-2-16-2": 0.10,
    "sin": 0.10,
    "mlp-6-128-128-6": 0.35,
    "mlp-3-64-64-3": 0.5,
    "mlp-3-64-64-3-100k": 0.45,
}
"""What autojac is to take at most on each workload, in times of torch's default."""
BUDGET_S = 30.0
"""Without compilers there are few candidates, of which the slow ones take seconds on the largest batch."""

Announce = Callable[[str], None]


def against_torch(settings: Settings, announce: Announce = lambda name: None) -> list[Promised]:
    """Race what a search without compilers finds against torch's default.

    Args:
        settings: how to measure; the effort is `quick`, whose candidates need no compiler.
        announce: called with each workload's name before its turn.
    """
    budget = BUDGET_S if settings.budget_s is None else settings.budget_s
    settings = dataclasses.replace(settings, effort="quick", budget_s=budget)
    found = []
    with at_rest():
        for name, bound in BOUNDS.items():
            announce(f"replay of {name}")
            found.append(torch_contest(WORKLOADS[name], settings, bound))
    return found


def torch_contest(workload: Workload, settings: Settings, bound: float) -> Promised:
    """Race a tuned plan against torch's default."""
    tuned = tune(workload, settings)
    default = next(way for way in WAYS if way.name == DEFAULT)
    return contest(tuned, [torch_way(default, tuned)], settings, bound)


def contest(tuned: Tuned, rivals: Sequence[Entrant], settings: Settings, bound: float) -> Promised:
    """Race a tuned plan against rivals; what was promised refers to the fastest of them.

    Args:
        tuned: the workload with its plan.
        rivals: checked already.
        settings: how to measure.
        bound: what autojac is to take at most, in times of the fastest rival that is right.
    """
    own = admitted("autojac", lambda: tuned.jac(tuned.x), tuned.truth)
    entrants = [own, *rivals]
    names = [entrant.outcome.name for entrant in entrants]
    timed = [entrant.outcome for entrant in raced(entrants, tuned.x.device, settings, math.inf, always=names)]
    best = min(timed[1:], key=lambda outcome: outcome.seconds or math.inf)
    plan = tuned.entry.plan
    facts: dict[str, str | float] = {"tuning s": plan.tuning_seconds, "plan": str(plan)}
    return Promised(tuned.workload.name, tuple(timed), (Figure.over(timed[0], best, bound),), facts)


@contextmanager
def at_rest() -> Iterator[None]:
    """No graph, as all ways are raced; torch tells of slow paths, which the times show."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
