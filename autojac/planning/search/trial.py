"""One candidate: prepared, checked against the reference, then timed, and its memory measured."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.open_modes import levels_restored
from autojac.autodiff.pullback import gradient
from autojac.core.options import format_bytes
from autojac.core.plan import NOT_TRIED, Effort, Trial, TrialState, expression
from autojac.core.time_limit import within
from autojac.guards.process_state import ignore_warnings
from autojac.methods.base import Method
from autojac.planning.search import measure, memory
from autojac.planning.search.point import SearchPoint
from autojac.planning.search.space import without_replay
from autojac.problem.derivative_reference import AnyReference, reference_for
from autojac.problem.problem import Compute, Problem, Result
from autojac.replay.replayer import Replayer

SHORTEST_S = {"estimate": 2e-3, "quick": 2e-3, "measure": 5e-3, "exhaustive": 2e-2}
"""Seconds that a block of calls must last to be timed."""
LOOKS = 3
"""Calls by which a candidate is first timed, one by one."""
BLOCKS = 3
"""Blocks of calls by which a candidate that survived is timed again."""
LONG_S = 0.05
"""A run this long is timing enough: what is close is compared again in the last comparison."""
PRUNE_RATIO = 2.0
LEAST_S = 1.0
"""Seconds that every candidate is allowed, however little of the budget is left."""
PATIENCE_S = 60.0
"""Seconds that a candidate is allowed while no other was timed, when a hang can't be told from a hard problem."""

HUNG = 20.0
"""A candidate that takes so many times as long as the best, but at least `LEAST_S`, is given up."""
CUT_SHORT = 0.5
"""One that was given less than this share of that time has not failed: a later search tries it again."""

Progress = Callable[[Trial], None]


@dataclass
class SearchSession:
    """The trials of a problem's candidates, and the point where the next one is tried.

    Attributes:
        problem: what candidates compute.
        effort: decides how long candidates are timed.
        end: when no candidate is started any more, by the search's clock; never by default.
        progress: called after each trial.
        trials: what became of each candidate.
        runs: candidates that ran and were right, ready to run again.
        programs: the first candidate of each flat program.
    """

    problem: Problem
    effort: Effort
    end: float = math.inf
    progress: Progress | None = None
    trials: dict[Method, Trial] = field(default_factory=dict)
    runs: dict[Method, Compute] = field(default_factory=dict)
    programs: dict[Any, Method] = field(default_factory=dict)
    _point: SearchPoint | None = None
    _reference: AnyReference | None = None

    def at(self, point: SearchPoint | None) -> SearchSession:
        """Try the next candidates at this point; None releases it."""
        self._point, self._reference = point, None
        return self

    @property
    def point(self) -> SearchPoint:
        assert self._point is not None
        return self._point

    @property
    def reference(self) -> AnyReference:
        """What candidates are checked against at this point; it evaluates func when it is first asked for."""
        if self._reference is None:
            leaves, kwargs, captured, sandbox = self.point
            self._reference = reference_for(self.problem, leaves, kwargs, sandbox, trained=captured)
        return self._reference

    @property
    def device(self) -> torch.device:
        return torch.device(self.problem.leaves[self.problem.inputs[0]].device)

    @property
    def best(self) -> float:
        """The seconds of the fastest candidate so far."""
        timed = (trial.seconds for trial in self.trials.values() if trial.state == "complete")
        return min((seconds for seconds in timed if seconds is not None), default=math.inf)

    @property
    def hung_s(self) -> float:
        """The seconds after which a candidate is given up; infinite where none was timed yet."""
        return HUNG * self.best

    def allowed_s(self, method: Method) -> float:
        """Return the seconds after which a candidate is given up."""
        left = max(self.end - measure.clock.now(), LEAST_S)
        # a compiler that is interrupted may leave more behind than can be put back
        patient = method.compiles or not math.isfinite(self.best)
        return max(left, PATIENCE_S) if patient else left

    def record(self, method: Method, state: TrialState, **facts: Any) -> Trial:
        """Note what became of a candidate; one that is not right any more is not run any more."""
        trial = Trial(method.spec(), state, predicted=method.cost(self.problem), **facts)
        self.trials[method] = trial
        if state != "complete":
            self.runs.pop(method, None)
        if self.progress is not None:
            self.progress(trial)
        return trial

    def ready(self, method: Method) -> measure.Run | None:
        """Return a run of a candidate as it is used; None, with the reason recorded, if it is not right here."""
        compute = self.runs.get(method)
        if compute is None:
            right = attempt(self, method)
            if right is None:
                return None
            compute = self.runs[method] = right.compute
        return as_used(self, compute)


@dataclass(frozen=True)
class Attempt:
    """A candidate that ran once and was right, and the seconds of that run."""

    compute: Compute
    seconds: float


def attempt(session: SearchSession, method: Method, allowed_s: float | None = None) -> Attempt | None:
    """Prepare a candidate, run it once and check the result; return None, with the reason recorded, if it fails.

    Args:
        session: the search.
        method: the candidate.
        allowed_s: seconds after which it is given up; what the budget leaves by default.
    """
    problem = session.problem
    if (needed := problem.result_bytes + method.workspace(problem)) > problem.memory_limit:
        session.record(method, "infeasible", reason=_lacks_memory(f"at least {format_bytes(needed)}", problem))
        return None
    reference = session.reference

    def first_run() -> tuple[Compute, float, str | None]:
        compute = method.prepare_call(problem)
        if without_replay(method) != method:
            # the first run records, and compiles: that is no part of its time, and what it moves is put back
            with session.point.sandbox():
                compute(session.point.leaves, session.point.kwargs)
        start = time.perf_counter()
        result = compute(session.point.leaves, session.point.kwargs)
        measure.synchronize(session.device)
        seconds = time.perf_counter() - start
        wrong = reference.check(result)
        if wrong is None and problem.differentiable:
            wrong = reference.check_gradient(result)
        return compute, seconds, wrong

    allowed_s = session.allowed_s(method) if allowed_s is None else allowed_s
    try:
        with session.point.sandbox(), ignore_warnings(), levels_restored():
            compute, seconds, wrong = within(allowed_s, first_run)
    except Exception as error:  # whatever a transform, a compiler or an allocator raises makes it infeasible
        _fail(session, method, error, allowed_s)
        return None
    if wrong is not None:
        session.record(method, "rejected", reason=wrong)
        return None
    return Attempt(compute, seconds)


def look(session: SearchSession, method: Method, allowed_s: float | None = None) -> Trial:
    """Check a candidate, and time a few single calls; one that is hopeless already is not timed any longer."""
    right = attempt(session, method, allowed_s)
    if right is None:
        return session.trials[method]
    if isinstance(right.compute, Replayer) and right.compute.program is not None:
        same = session.programs.setdefault(right.compute.program, method)
        if same != method:
            return session.record(method, "skipped", reason=f"the same program as {expression(same.spec())}")
    run, best = as_used(session, right.compute), session.best

    def time_calls() -> float:
        # a run that alone outlasts the budget is not repeated
        if right.seconds > LONG_S and measure.clock.now() + right.seconds > session.end:
            return right.seconds
        fastest = measure.once(run, session.device)
        for _ in range(LOOKS - 1):
            if fastest > LONG_S and fastest < PRUNE_RATIO * best:
                break
            fastest = min(fastest, measure.once(run, session.device))
            if fastest > PRUNE_RATIO * best:
                break
        return fastest

    allowed_s = max(session.allowed_s(method), 4 * right.seconds)
    try:
        with session.point.sandbox(), ignore_warnings(), levels_restored():
            seconds = within(allowed_s, time_calls)
    except Exception as error:
        return _fail(session, method, error, allowed_s)
    if seconds > PRUNE_RATIO * best:
        return session.record(method, "pruned", seconds=seconds, reason="already twice the best after warm-up")
    session.runs[method] = right.compute
    return session.record(method, "complete", seconds=seconds)


def look_longer(session: SearchSession, method: Method) -> None:
    """Time a candidate that survived by blocks of calls."""
    run = session.ready(method)
    if run is None:
        return
    try:
        with session.point.sandbox(), ignore_warnings(), levels_restored():
            allowed = max(session.allowed_s(method), LEAST_S)
            timing = within(allowed, lambda: measure.repeat(run, session.device, SHORTEST_S[session.effort], BLOCKS))
    except Exception as error:
        _fail(session, method, error)
        return
    session.trials[method] = dataclasses.replace(session.trials[method], **vars(timing))


def measure_memory(session: SearchSession, method: Method) -> bool:
    """Measure a timed candidate's peak memory in another run; return whether it stays within the limit."""
    run = session.ready(method)
    if run is None:
        return False
    trial = session.trials[method]
    try:
        with session.point.sandbox(), ignore_warnings():
            peak = memory.peak_bytes(run, session.device)
    except Exception as error:  # it ran before, and may not run any more
        _fail(session, method, error)
        return False
    if peak is None or peak <= session.problem.memory_limit:
        session.trials[method] = dataclasses.replace(trial, memory_bytes=peak)
        return True
    facts = {"memory_bytes": peak, "seconds": trial.seconds}
    session.record(method, "infeasible", reason=_lacks_memory(format_bytes(peak), session.problem), **facts)
    return False


def as_used(session: SearchSession, compute: Compute) -> measure.Run:
    """Return what a training step does with the Jacobian: with a graph, the backward through it too."""
    leaves, kwargs = session.point.leaves, session.point.kwargs
    if not session.problem.differentiable:
        return lambda: compute(leaves, kwargs)
    sources = [*session.reference.connected, *(x for x in session.point.captured if x.requires_grad)]
    if not sources or session.reference.trains_nothing:
        return lambda: compute(leaves, kwargs)

    def step() -> Result:
        result = compute(leaves, kwargs)
        total = sum(jacobian.sum() for row in result.jacobians for jacobian in row)
        assert isinstance(total, Tensor)
        gradient(total, sources)
        return result

    return step


def _fail(session: SearchSession, method: Method, error: Exception, allowed_s: float = math.inf) -> Trial:
    """Record that a candidate raised, and release what its frames and an accelerator's allocator hold."""
    is_cut_short = isinstance(error, TimeoutError) and allowed_s < CUT_SHORT * session.hung_s < math.inf
    if is_cut_short and method not in session.trials:
        trial = session.record(method, "skipped", reason=NOT_TRIED)
    else:
        trial = session.record(method, "infeasible", reason=_first_line(error))
    error.__traceback__ = None
    if session.device.type != "cpu" and memory.is_out_of_memory(error):
        torch.accelerator.empty_cache()
    return trial


def _lacks_memory(takes: str, problem: Problem) -> str:
    return f"expected to fit the {format_bytes(problem.memory_limit)} allowed, it takes {takes}: raise memory_limit"


def _first_line(error: Exception) -> str:
    # the compiler puts a heading on the first line and what happened on the second
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
