"""Training steps on a loss of J: by hand, by J and its backward, and planned as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import autojac
from autojac.api.step_progress import ROUNDS
from autojac.bench.baselines import DEFAULT
from autojac.bench.interop.ways import WAYS, loss_gradient, pull_in_loop, rows
from autojac.bench.jacobians import FIRST, OVER_BEST, OVER_DEFAULT, OWN, PLAN, WORST, wrap
from autojac.bench.results import BenchResult, Facts, Figure, fastest
from autojac.bench.run import Entrant, Settings, admit, at_rest, race_with_best
from autojac.bench.workloads import Workload, move_to

WHOLE = "TrainingStep"
OF_WHOLE = f"{WHOLE} {OVER_BEST}"
WHOLE_BOUND = {True: 0.62, False: 0.9}
"""What a step planned as a whole is to take at most over torch's best step by hand, with a compiler and without."""


def loss_of(y: Tensor, J: Tensor, *rest: Any) -> Tensor:
    return J.square().mean()


def step_through(compute: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Return a training step: J, its loss, and the backward into `.grad`."""

    def step() -> None:
        loss_of(x, compute(x)).backward()

    return step


def gradients_after(step: Callable[[], object], parameters: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Return what runs a step and gives the gradients that it leaves, (1, parameters): compared on one scale."""

    def run() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        step()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])[None]

    return run


def race_step(workload: Workload, settings: Settings) -> BenchResult:
    """Check and time one workload's training step by all ways, each by the gradients that it leaves."""
    with at_rest(training=True):
        func, x = workload.make(settings.device)
        assert isinstance(func, nn.Module)
        # biases of last layers have no part in J
        parameters = [p for name, p in func.named_parameters() if moves_jacobian(func, name, x)]
        exact: Any = move_to(func, x.device, torch.float64)
        doubled = [p for name, p in exact.named_parameters() if moves_jacobian(exact, name, x.double())]
        truth = loss_gradient(rows(exact, x.double(), pull_in_loop), doubled)[None].to(x.dtype)
        jac = wrap(func, settings)
        whole = autojac.TrainingStep(func, loss_of, **settings.planning())
        start = time.perf_counter()
        whole(x)
        first = time.perf_counter() - start
        take_compared_steps(whole, x)
        jac(x)
        steps: dict[str, Callable[[], object]] = {OWN: step_through(jac, x), WHOLE: lambda: whole(x)}
        steps |= {name: step_through(way(func), x) for name, way in WAYS.items()}
        entrants = [_check(name, step, parameters, truth) for name, step in steps.items()]
        own, planned, *ways = race_with_best(entrants[:2], entrants[2:], x.device, settings, DEFAULT)
        facts: Facts = {"kind": workload.kind, "B": workload.batch, "n": workload.n, "m": workload.m}
        serving = str(whole.plan(x)) if whole._progress.of((x,)).is_whole else "derivatives, then a backward"
        facts |= {PLAN: str(jac.plan(x)), f"{PLAN} of {WHOLE}": serving, FIRST: first}
    best = fastest(ways)
    default = next(way for way in ways if way.name == DEFAULT)
    bound = WHOLE_BOUND[settings.effort in ("measure", "exhaustive")]
    figures = (
        Figure.over(own, default, what=OVER_DEFAULT),
        Figure.over(own, best, WORST, OVER_BEST),
        Figure.over(planned, best, bound, OF_WHOLE),
    )
    return BenchResult(workload.name, (own, planned, *ways), figures, facts)


def take_compared_steps(step: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Take the first steps, in which a `TrainingStep` finds out which of its two ways is faster."""
    for _ in range(2 * ROUNDS):
        step(x)


def moves_jacobian(func: nn.Module, name: str, x: Tensor) -> bool:
    """Check whether a parameter has a part in J at all."""
    parameter = func.get_parameter(name)
    J = rows(func, x[:2], pull_in_loop)
    (found,) = torch.autograd.grad(J.square().sum(), [parameter], allow_unused=True)
    return found is not None


def _check(name: str, step: Callable[[], object], parameters: Sequence[Tensor], truth: Tensor) -> Entrant:
    return admit(name, step, truth, gradients_after(step, parameters))
