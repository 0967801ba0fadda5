"""One candidate: prepared, checked against the reference, then timed and weighed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.primitives import gradient, levels_restored
from autojac.core.plan import Effort, Trial, TrialState
from autojac.core.sandbox import Quiet
from autojac.core.time_limit import within
from autojac.guards.process_state import unwarned
from autojac.methods.base import Method
from autojac.planning.search import measure
from autojac.problem.problem import Compute, Problem, Result
from autojac.problem.reference import Reference

SHORTEST_S = {"quick": 2e-3, "measure": 5e-3, "exhaustive": 2e-2}
"""How long a block of calls must last to be timed."""
BLOCKS = 5
LONG_S = 0.05
"""A first run this long is timing enough: what is close is compared again in the shoot-out."""
PRUNE_RATIO = 2.0
LEAST_S = 1.0
"""What a candidate is allowed at the least, however little of the budget is left."""
PATIENCE_S = 60.0
"""What a candidate is allowed while nothing is known of any other, when a hang can't be told from a hard problem."""

Progress = Callable[[Trial], None]


@dataclass
class Subject:
    """One search: the problem at one point, and all that is known of its candidates so far."""

    problem: Problem
    leaves: Sequence[Tensor]
    kwargs: Mapping[str, Any]
    captured: Sequence[Tensor]
    quiet: Quiet
    effort: Effort
    deadline: float
    end: float
    reference: Reference
    progress: Progress | None = None
    trials: dict[Method, Trial] = field(default_factory=dict)
    runs: dict[Method, measure.Run] = field(default_factory=dict)
    slow: dict[Method, measure.Run] = field(default_factory=dict)
    best: float = math.inf

    @property
    def device(self) -> torch.device:
        return self.leaves[self.problem.inputs[0]].device

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def allowed_s(self, method: Method) -> float:
        """Seconds after which a candidate is given up."""
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


def attempt(subject: Subject, method: Method, allowed_s: float | None = None) -> Attempt | None:
    """Prepare a candidate, run it once and check the result; None, with the reason kept, if it fails.

    Args:
        subject: the search.
        method: the candidate.
        allowed_s: seconds after which it is given up; what the budget leaves by default.
    """
    problem = subject.problem
    needed = problem.result_bytes + method.workspace(problem)
    if needed > problem.memory_limit:
        reason = f"needs at least {needed / 2**30:.2g} GiB of the {problem.memory_limit / 2**30:.2g} GiB allowed"
        subject.record(method, "infeasible", reason=reason)
        return None

    def first_run() -> tuple[Compute, float, str | None]:
        compute = method.ready(problem)
        start = time.perf_counter()
        result = compute(subject.leaves, subject.kwargs)
        measure.synchronize(subject.device)
        seconds = time.perf_counter() - start
        wrong = subject.reference.check(result)
        if wrong is None and problem.differentiable:
            wrong = subject.reference.check_gradient(result)
        return compute, seconds, wrong

    try:
        with subject.quiet(), unwarned(), levels_restored():
            allowed_s = subject.allowed_s(method) if allowed_s is None else allowed_s
            compute, seconds, wrong = within(allowed_s, first_run)
    except Exception as error:  # whatever a transform, a compiler or an allocator raises makes it infeasible
        subject.record(method, "infeasible", reason=_first_line(error))
        return None
    if wrong is not None:
        subject.record(method, "rejected", reason=wrong)
        return None
    return Attempt(compute, seconds)


def try_out(subject: Subject, method: Method, allowed_s: float | None = None) -> Trial:
    """Check a candidate, then time it unless its first run is already hopeless."""
    right = attempt(subject, method, allowed_s)
    if right is None:
        return subject.trials[method]
    run = _as_used(subject, right.compute)

    def timed() -> tuple[measure.Timing, bool]:
        # a run that alone outlasts the budget is not repeated
        dear = right.seconds > LONG_S and time.monotonic() + right.seconds > subject.deadline
        first = right.seconds if dear else measure.once(run, subject.device)
        if first > PRUNE_RATIO * subject.best and not dear:
            first = min(first, measure.once(run, subject.device))
        hopeless = first > PRUNE_RATIO * subject.best
        if first < LONG_S and not hopeless and not subject.out_of_time:
            return measure.repeat(run, subject.device, SHORTEST_S[subject.effort], BLOCKS), False
        return measure.summary([first]), hopeless

    try:
        with subject.quiet(), unwarned(), levels_restored():
            timing, hopeless = within(max(subject.allowed_s(method), 4 * right.seconds), timed)
    except Exception as error:
        return subject.record(method, "infeasible", reason=_first_line(error))
    if hopeless:
        subject.slow[method] = run
        return subject.record(method, "pruned", seconds=timing.seconds, reason="already twice the best after warm-up")
    subject.best = min(subject.best, timing.seconds)
    subject.runs[method] = run
    return subject.record(method, "complete", seconds=timing.seconds, dispersion=timing.dispersion)


def weigh(subject: Subject, method: Method) -> bool:
    """Measure a timed candidate's peak memory in a run of its own; whether it stays within the limit."""
    trial = subject.trials[method]
    try:
        with subject.quiet(), unwarned():
            memory = measure.peak_bytes(subject.runs[method], subject.device)
    except Exception as error:  # it ran before, and may not run any more
        subject.trials[method] = dataclasses.replace(trial, state="infeasible", reason=_first_line(error))
        del subject.runs[method]
        return False
    limit = subject.problem.memory_limit
    if memory <= limit:
        subject.trials[method] = dataclasses.replace(trial, memory_bytes=memory)
        return True
    reason = f"took {memory / 2**30:.2g} GiB of the {limit / 2**30:.2g} GiB allowed"
    subject.trials[method] = dataclasses.replace(trial, state="infeasible", memory_bytes=memory, reason=reason)
    del subject.runs[method]
    return False


def _as_used(subject: Subject, compute: Compute) -> measure.Run:
    """What a training step does with the Jacobian: with a graph, the backward through it too."""
    leaves, kwargs = subject.leaves, subject.kwargs
    sources = [*subject.reference.connected, *(x for x in subject.captured if x.requires_grad)]
    if not subject.problem.differentiable or not sources or subject.reference.once:
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
