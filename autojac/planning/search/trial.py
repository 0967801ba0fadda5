"""One candidate: prepared, checked against the reference, then timed, and its memory measured."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.autodiff.open_modes import levels_restored
from autojac.autodiff.pullback import gradient
from autojac.core.options import format_bytes
from autojac.core.plan import Effort, Trial, TrialState
from autojac.core.sandbox import Sandbox
from autojac.core.time_limit import within
from autojac.guards.process_state import unwarned
from autojac.methods.base import Method
from autojac.planning.search import measure
from autojac.problem.derivative_reference import AnyReference
from autojac.problem.problem import Compute, Problem, Result

SHORTEST_S = {"quick": 2e-3, "measure": 5e-3, "exhaustive": 2e-2}
"""How long a block of calls must last to be timed."""
BLOCKS = 5
LONG_S = 0.05
"""A first run this long is timing enough: what is close is compared again in the shoot-out."""
PRUNE_RATIO = 2.0
LEAST_S = 1.0
"""Seconds that every candidate is allowed, however little of the budget is left."""
PATIENCE_S = 60.0
"""Seconds that a candidate is allowed while no other was timed, when a hang can't be told from a hard problem."""

Progress = Callable[[Trial], None]


class SearchPoint(NamedTuple):
    """Where candidates are checked and timed.

    Attributes:
        leaves, kwargs: the arguments.
        captured: tensors besides the inputs that a loss on a differentiable Jacobian trains.
        sandbox: how to evaluate without a trace.
    """

    leaves: Sequence[Tensor]
    kwargs: Mapping[str, Any]
    captured: Sequence[Tensor]
    sandbox: Sandbox


@dataclass
class SearchSession:
    """One search: the problem at one point, and all that is known of its candidates so far."""

    problem: Problem
    point: SearchPoint
    effort: Effort
    start: float
    deadline: float
    end: float
    reference: AnyReference
    progress: Progress | None = None
    trials: dict[Method, Trial] = field(default_factory=dict)
    runs: dict[Method, measure.Run] = field(default_factory=dict)
    slow: dict[Method, measure.Run] = field(default_factory=dict)
    best: float = math.inf

    @property
    def device(self) -> torch.device:
        return self.point.leaves[self.problem.inputs[0]].device

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def allowed_s(self, method: Method) -> float:
        """Return the seconds after which a candidate is given up."""
        left = max(self.end - time.monotonic(), LEAST_S)
        # a compiler that is interrupted may leave more behind than can be put back
        patient = method.compiles or not math.isfinite(self.best)
        return max(left, PATIENCE_S) if patient else left

    def record(self, method: Method, state: TrialState, **facts: Any) -> Trial:
        trial = Trial(method.spec(), state, **facts)
        self.trials[method] = trial
        if self.progress is not None:
            self.progress(trial)
        return trial


@dataclass(frozen=True)
class Attempt:
    """A candidate that ran once and was right, and the seconds of that run."""

    compute: Compute
    seconds: float


def attempt(session: SearchSession, method: Method, allowed_s: float | None = None) -> Attempt | None:
    """Prepare a candidate, run it once and check the result; None, with the reason kept, if it fails.

    Args:
        session: the search.
        method: the candidate.
        allowed_s: seconds after which it is given up; what the budget leaves by default.
    """
    problem = session.problem
    needed = problem.result_bytes + method.workspace(problem)
    if needed > problem.memory_limit:
        reason = f"needs at least {format_bytes(needed)} of the {format_bytes(problem.memory_limit)} allowed"
        session.record(method, "infeasible", reason=reason)
        return None

    def first_run() -> tuple[Compute, float, str | None]:
        compute = method.prepare_call(problem)
        if method.makes_flat_programs:
            compute(session.point.leaves, session.point.kwargs)  # what is made at the first run is no part of its time
        start = time.perf_counter()
        result = compute(session.point.leaves, session.point.kwargs)
        measure.synchronize(session.device)
        seconds = time.perf_counter() - start
        wrong = session.reference.check(result)
        if wrong is None and problem.differentiable:
            wrong = session.reference.check_gradient(result)
        return compute, seconds, wrong

    try:
        with session.point.sandbox(), unwarned(), levels_restored():
            allowed_s = session.allowed_s(method) if allowed_s is None else allowed_s
            compute, seconds, wrong = within(allowed_s, first_run)
    except Exception as error:  # whatever a transform, a compiler or an allocator raises makes it infeasible
        session.record(method, "infeasible", reason=_first_line(error))
        return None
    if wrong is not None:
        session.record(method, "rejected", reason=wrong)
        return None
    return Attempt(compute, seconds)


def try_out(session: SearchSession, method: Method, allowed_s: float | None = None) -> Trial:
    """Check a candidate, then time it unless its first run is already hopeless."""
    right = attempt(session, method, allowed_s)
    if right is None:
        return session.trials[method]
    run = _as_used(session, right.compute)

    def timed() -> tuple[measure.Timing, bool]:
        # a run that alone outlasts the budget is not repeated
        dear = right.seconds > LONG_S and time.monotonic() + right.seconds > session.deadline
        first = right.seconds if dear else measure.once(run, session.device)
        if first > PRUNE_RATIO * session.best and not dear:
            first = min(first, measure.once(run, session.device))
        hopeless = first > PRUNE_RATIO * session.best
        if first < LONG_S and not hopeless and not session.out_of_time:
            return measure.repeat(run, session.device, SHORTEST_S[session.effort], BLOCKS), False
        return measure.summary([first]), hopeless

    try:
        with session.point.sandbox(), unwarned(), levels_restored():
            timing, hopeless = within(max(session.allowed_s(method), 4 * right.seconds), timed)
    except Exception as error:
        return session.record(method, "infeasible", reason=_first_line(error))
    if hopeless:
        session.slow[method] = run
        return session.record(method, "pruned", seconds=timing.seconds, reason="already twice the best after warm-up")
    session.best = min(session.best, timing.seconds)
    session.runs[method] = run
    return session.record(method, "complete", seconds=timing.seconds, dispersion=timing.dispersion)


def measure_memory(session: SearchSession, method: Method) -> bool:
    """Measure a timed candidate's peak memory in a run of its own; tell whether it stays within the limit."""
    trial = session.trials[method]
    try:
        with session.point.sandbox(), unwarned():
            memory = measure.peak_bytes(session.runs[method], session.device)
    except Exception as error:  # it ran before, and may not run any more
        session.trials[method] = dataclasses.replace(trial, state="infeasible", reason=_first_line(error))
        del session.runs[method]
        return False
    limit = session.problem.memory_limit
    if memory <= limit:
        session.trials[method] = dataclasses.replace(trial, memory_bytes=memory)
        return True
    reason = f"took {format_bytes(memory)} of the {format_bytes(limit)} allowed"
    session.trials[method] = dataclasses.replace(trial, state="infeasible", memory_bytes=memory, reason=reason)
    del session.runs[method]
    return False


def _as_used(session: SearchSession, compute: Compute) -> measure.Run:
    """Return what a training step does with the Jacobian: with a graph, the backward through it too."""
    leaves, kwargs = session.point.leaves, session.point.kwargs
    sources = [*session.reference.connected, *(x for x in session.point.captured if x.requires_grad)]
    if not session.problem.differentiable or not sources or session.reference.gradient.once:
        return lambda: compute(leaves, kwargs)

    def step() -> Result:
        result = compute(leaves, kwargs)
        total = sum(jacobian.sum() for row in result.jacobians for jacobian in row)
        assert isinstance(total, Tensor)
        gradient(total, sources)
        return result

    return step


def _first_line(error: Exception) -> str:
    # the compiler puts a heading on the first line and what happened on the second
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
