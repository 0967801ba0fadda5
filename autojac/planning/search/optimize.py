"""Search: candidates are proposed, each is checked and then timed, and the finalists are compared in pairs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.core.plan import Effort, effort_rank
from autojac.core.sandbox import Sandbox
from autojac.errors import SearchError
from autojac.methods.base import Method
from autojac.methods.pull import Pull
from autojac.planning.search import measure
from autojac.planning.search.shoot_out import SearchResult, shoot_out
from autojac.planning.search.space import candidates, default_methods, hopeless, without_replay
from autojac.planning.search.trial import PATIENCE_S, Progress, SearchPoint, SearchSession, attempt, try_out
from autojac.problem.derivative_reference import reference_for
from autojac.problem.problem import Problem, bind
from autojac.torch_internals import load_compiler

BUDGETS_S: dict[str, float] = {"estimate": 0.0, "quick": 3.0, "measure": 60.0, "exhaustive": 600.0}
SHOOT_OUT_SHARE = 0.25
"""Share of the budget that is kept for the shoot-out."""
FIRST_SHARE = 0.6
"""Share of the rest after which replays and compilers have their turn."""
HEAD_REPLAYS = 2
"""How many of the first candidates that were timed are recorded at once: replays win most searches."""

LAST_RESORT = Pull("identity")
"""One plain VJP per row: right for whatever runs under autograd."""


def search(
    problem: Problem,
    point: SearchPoint,
    effort: Effort,
    budget_s: float | None = None,
    hints: Sequence[Method] = (),
    progress: Progress | None = None,
) -> SearchResult:
    """Find the fastest right method for a problem at one point.

    Args:
        problem: what to compute.
        point: where candidates are checked and timed.
        effort: `estimate` takes the first right method of the cost model and times nothing.
        budget_s: seconds for the search; the effort's own by default. Overshot by one candidate's run at most; what
            torch loads once per process is not counted.
        hints: methods to try first, such as another device's winner.
        progress: called after each trial.

    Raises:
        SearchError: if no candidate gives the right Jacobian within the limits.
    """
    depth = max(effort_rank(effort) - effort_rank("quick"), 0)
    session = _session(problem, point, effort, budget_s, progress)
    problem = session.problem
    defaults = default_methods(problem)
    space = list(dict.fromkeys([*candidates(problem, depth), *defaults]))
    if not session.reference.says:
        # what is slow and safe, until there is something that a faster method can be compared with
        return dataclasses.replace(_estimate(session, [Pull.suiting(problem, "loop")]), verified=False)
    if effort == "estimate":
        # what records a method is worth its while only where that is timed
        return _estimate(session, [method for method in space if without_replay(method) == method])
    dropped = hopeless(problem, space) - set(defaults) if depth < 2 else set()
    for method in dropped:
        session.record(method, "skipped", reason="predicted to be far slower than the best")
    space = [method for method in space if method not in dropped]
    _try_rounds(session, space, hints, defaults)
    _ensure_one(session, [*space, LAST_RESORT])
    for method in space:
        if method not in session.trials:
            session.record(method, "skipped", reason="no budget was left for it")
    found = shoot_out(session, defaults)
    while found is None:
        _ensure_one(session, [*space, LAST_RESORT])
        found = shoot_out(session, defaults)
    return found


def _session(
    problem: Problem, point: SearchPoint, effort: Effort, budget_s: float | None, progress: Progress | None
) -> SearchSession:
    """Start the clock of a search, once what torch loads once per process is loaded."""
    leaves, kwargs, captured, sandbox = point
    problem = dataclasses.replace(problem, pass_bytes=_pass_bytes(problem, leaves, kwargs, sandbox), trial=True)
    if effort != "estimate":
        # torch loads its compiler (1 s) at the first vmapped VJP of a process: no candidate's fault
        load_compiler()
        import_module("autojac.planning.search.propose")
    start, allowed = time.monotonic(), BUDGETS_S[effort] if budget_s is None else budget_s
    deadline, end = start + (1 - SHOOT_OUT_SHARE) * allowed, start + allowed
    reference = reference_for(problem, leaves, kwargs, sandbox, trained=captured)
    return SearchSession(problem, point, effort, start, deadline, end, reference, progress)


def _try_rounds(
    session: SearchSession, space: Sequence[Method], hints: Sequence[Method], defaults: Sequence[Method]
) -> None:
    """Try candidates round by round, those first that are likely to be fast."""
    from autojac.planning.search.propose import propose

    start, deadline = session.start, session.deadline
    rounds = _rounds(space)
    eager, recorded, _ = rounds
    head = [method for method in (*hints, *eager[:1], *defaults[:1], *eager[1:3]) if method in eager]
    _try_all(session, head)
    _try_all(session, fastest(session, recorded)[:HEAD_REPLAYS])
    for number, part in enumerate(rounds):
        fast = fastest(session, part)
        first = [method for method in (*hints, *fast[:3], *part[:1], *defaults[:1], *part[1:3]) if method in part]
        # what comes later has its part of the time, however long the first round could take
        left = bool(number == 0 and any(rounds[1:]))
        session.deadline = start + FIRST_SHARE * (deadline - start) if left else deadline
        if part:
            propose(session, part, first)


def _try_all(session: SearchSession, methods: Sequence[Method]) -> None:
    for method in methods:
        if method not in session.trials and not session.out_of_time:
            try_out(session, method)


def _rounds(space: Sequence[Method]) -> list[list[Method]]:
    """Split candidates into eager ones, recorded ones and compiled ones, to be tried in this order."""
    eager = [method for method in space if not method.compiles and without_replay(method) == method]
    recorded = [method for method in space if not method.compiles and method not in eager]
    return [eager, recorded, [method for method in space if method.compiles]]


def fastest(session: SearchSession, methods: Sequence[Method]) -> list[Method]:
    """Return the methods that were timed without their recording, the fastest first."""
    known = {
        method: session.trials.get(without_replay(method)) for method in methods if without_replay(method) != method
    }
    timed = {method: trial.seconds for method, trial in known.items() if trial is not None and trial.seconds}
    return sorted(timed, key=timed.__getitem__)


def _pass_bytes(problem: Problem, leaves: Sequence[Tensor], kwargs: Mapping[str, Any], sandbox: Sandbox) -> int:
    """Measure the peak memory of one plain evaluation and one VJP of the first output: the least that a seed costs."""

    def one_pass() -> object:
        bound, inputs = bind(problem, leaves, kwargs)
        pullback = Pullback(bound, inputs, differentiable=False)
        return pullback(0, torch.ones_like(pullback.outputs[0]), last=True)

    try:
        with sandbox():
            return measure.peak_bytes(one_pass, leaves[problem.inputs[0]].device)
    except Exception:  # sizes of inputs and outputs have to do; the candidates find out what is wrong
        return 0


def _estimate(session: SearchSession, space: Sequence[Method]) -> SearchResult:
    """Take the cost model's first choice that is right."""
    for method in [*space, LAST_RESORT]:
        if attempt(session, method, _allowed_s(method)) is not None:
            session.record(method, "complete", reason="the cost model's first choice that is right; nothing was timed")
            return SearchResult(method, None, None, None, tuple(session.trials.values()))
    raise _nothing_found(session)


def _ensure_one(session: SearchSession, methods: Sequence[Method]) -> None:
    """Find at least one right method, however short the budget."""
    for method in methods:
        if session.runs:
            return
        if method not in session.trials or session.trials[method].state == "skipped":
            try_out(session, method, _allowed_s(method))
    if not session.runs:
        raise _nothing_found(session)


def _allowed_s(method: Method) -> float:
    """Return the limit where any right method will do; none for the last resort, which the user would write too."""
    return math.inf if method == LAST_RESORT else PATIENCE_S


def _nothing_found(session: SearchSession) -> SearchError:
    reasons = [f"{trial.method['method']}: {trial.reason}" for trial in session.trials.values()]
    listed = "; ".join(itertools.islice(dict.fromkeys(reasons), 6)) or "there is no candidate"
    return SearchError(
        f"no method gives the right Jacobian within the limits ({listed}). Raise memory_limit if memory is what lacks; "
        "otherwise check by torch.autograd.gradcheck that func has the derivatives that it claims",
        listed,
    )
