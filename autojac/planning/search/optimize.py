"""Search: a race of candidates, run to its end, or handed over to be run a step at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from autojac.autodiff.pullback import Pullback
from autojac.core.plan import Effort, Trial, effort_rank
from autojac.errors import SearchError
from autojac.methods.base import Method, build_if_known
from autojac.methods.pull import Pull
from autojac.methods.threads import Threads
from autojac.planning.search import measure, memory
from autojac.planning.search.looks import SLICE_SHARE
from autojac.planning.search.point import SearchPoint
from autojac.planning.search.race import CandidateRace
from autojac.planning.search.space import candidates, default_methods, hopeless, predicted_seconds, without_replay
from autojac.planning.search.trial import PATIENCE_S, Progress, SearchSession, attempt
from autojac.problem.problem import Problem, bind

BUDGETS_S: dict[str, float] = {"estimate": 0.0, "quick": 3.0, "measure": 60.0, "exhaustive": 600.0}
LEAST_QUICK_S = 0.9
"""Seconds that `quick` takes at most where a call takes little: more only as far as `CALLS_OF_QUICK` are worth."""
CALLS_OF_QUICK = 30
COMPARED_SHARE = 0.3
"""Share of the budget that is kept for timing longer, and for the last comparison."""
FAR_AHEAD = 3.0
"""A hint that is predicted to be so many times slower than the cost model's first choice is not tried first."""
LAST_RESORT = Pull("identity")
"""One plain VJP per row: right for whatever runs under autograd."""


class PriorKnowledge(NamedTuple):
    """What is known before a search.

    Attributes:
        hints: methods to try first, such as another device's winner.
        incumbent: the method of the plan so far, which only a faster one replaces.
        trials: of an unfinished search, which this one continues.
    """

    hints: Sequence[Method] = ()
    incumbent: Method | None = None
    trials: Sequence[Trial] = ()


NOTHING = PriorKnowledge()


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        method: the fastest right method.
        seconds, default_seconds: of one call by it, and by torch's default; None where they were not timed.
        memory_bytes: its peak, where it was measured.
        trials: every candidate's fate.
        verified: whether the method was compared with a reference; there is none where no derivative is finite.
        finished: whether all candidates worth a look had one, and the last comparison was decided.
        jitter: the spread of timings in the last comparison: smaller differences say nothing.
    """

    method: Method
    seconds: float | None
    default_seconds: float | None
    memory_bytes: int | None
    trials: tuple[Trial, ...]
    verified: bool = True
    finished: bool = True
    jitter: float | None = None


def search(
    problem: Problem,
    point: SearchPoint,
    effort: Effort,
    budget_s: float | None = None,
    prior: PriorKnowledge = NOTHING,
    progress: Progress | None = None,
    begun: float | None = None,
) -> SearchResult:
    """Find the fastest right method for a problem at one point.

    Args:
        problem, point: what to compute, and where candidates are checked and timed.
        effort: `estimate` takes the first right method of the cost model and times nothing.
        budget_s: seconds for all since `begun`, overshot by one candidate's run at most; the effort's own by default.
        prior: what is known already.
        progress: called after each trial.
        begun: when planning began, by the search's clock: the budget pays for the probe too. Now by default.

    Raises:
        SearchError: if no candidate gives the right Jacobian within the limits.
    """
    if effort == "estimate":
        return estimate(problem, point, prior.hints)
    start, adapts = measure.clock.now(), budget_s is None and effort == "quick"
    allowed = (BUDGETS_S[effort] if budget_s is None else budget_s) - (0.0 if begun is None else start - begun)
    allowed = max(allowed, LEAST_QUICK_S if adapts else 0.0)
    race = start_race(problem, point, effort, prior, progress)
    race.session.end = start + allowed
    if not race.session.reference.says:
        return _plain_loop(race.session)
    finished = _run(race, start, allowed, adapts)
    race.confirm()
    _settle(race)
    return result_of(race, finished)


def _plain_loop(session: SearchSession) -> SearchResult:
    """Return the plain loop, until a reference is finite that faster methods can be compared with."""
    result = _first_right(session, [Pull.suiting(session.problem, "loop")])
    return dataclasses.replace(result, verified=False)


def start_race(
    problem: Problem,
    point: SearchPoint,
    effort: Effort,
    prior: PriorKnowledge = NOTHING,
    progress: Progress | None = None,
) -> CandidateRace:
    """Return a race of all candidates at one point; see `search` for the arguments."""
    depth = max(effort_rank(effort) - effort_rank("quick"), 0)
    problem = dataclasses.replace(problem, pass_bytes=problem.pass_bytes or _pass_bytes(problem, point), trial=True)
    session = SearchSession(problem, effort, progress=progress)
    defaults = default_methods(problem)
    space = list(dict.fromkeys([*candidates(problem, depth), *defaults]))
    if depth < 2:
        excluded = hopeless(problem, space)
        for method in space:
            if method in excluded:
                session.record(method, "skipped", reason="predicted to be far slower than the best")
        # compilers and fewer threads join for the best candidates only, which are not known yet
        later = [method for method in space if method.compiles or isinstance(method, Threads)]
        space = [method for method in space if method not in excluded and method not in later]
    _recall(session, prior.trials, space)
    race = CandidateRace(session, space, defaults, prior.hints, prior.incumbent)
    race.looks.is_continued = bool(prior.trials)
    return race.at(point)


def _recall(session: SearchSession, known: Iterable[Trial], space: Sequence[Method]) -> None:
    """Take over the trials of an earlier search, except those that it had no time for."""
    for trial in known:
        method = build_if_known(trial.method)
        if method is None or trial.state == "skipped":
            continue
        if method in space or method.compiles or isinstance(method, Threads):
            session.trials[method] = trial


def _run(race: CandidateRace, start: float, allowed: float, adapts: bool) -> bool:
    """Run a race until it is decided or its time is up; return whether it is decided.

    Args:
        race: the race.
        start, allowed: of its budget, by the search's clock.
        adapts: take no more time than the Jacobian is worth.
    """
    session, latest, last, has_looked = race.session, start + LEAST_QUICK_S, start + allowed, False
    while True:
        if adapts and math.isfinite(session.best):
            allowed = min(allowed, max(LEAST_QUICK_S, CALLS_OF_QUICK * (race.default_seconds() or session.best)))
        # the first call by what wins is a part of the budget too
        session.end = min(start + allowed, last) - race.adopting_s()
        now = measure.clock.now()
        for_looks = min((1 - COMPARED_SHARE) * allowed, session.end - start)
        on_slice = SLICE_SHARE[race.looks.is_continued] * for_looks
        within_s = math.inf
        if (scout := race.looks.scout) is not None:
            scout.end = session.end
            # recording a large batch may take as long as all else
            within_s = session.end - now if has_looked else math.inf
        # each search gets further by one look at least, however much of its time the probe took
        step = race.next_step(now < start + for_looks or not has_looked, now < start + on_slice, within_s)
        if step is not None and step.compiles and now + race.expected_s(step) > session.end:
            step = race.next_step(looks=False)
        if step is None or (now > session.end and (has_looked or step.kind != "look")):
            return not race.looks.find_untried(compilers=session.effort != "quick")
        if adapts:
            step.load()  # before its time is taken
        has_looked |= step.kind == "look"
        waited_before, loaded_s = measure.clock.waiting_s(), measure.clock.now() - now
        race.take(step)
        if adapts:
            trial = session.trials.get(step.method) if step.kind == "look" and step.method is not None else None
            # neither a recording that fails, which may take as long as all others together, nor a busy machine, nor
            # what a process loads once may decide how many candidates are tried
            has_failed = trial is not None and (trial.state == "infeasible" or trial.is_untried)
            waited_s = measure.clock.waiting_s() - waited_before
            start = min(start + (measure.clock.now() - now if has_failed else loaded_s + waited_s), latest)


def result_of(race: CandidateRace, finished: bool) -> SearchResult:
    """Return what a race has found so far."""
    winner = race.winner()
    assert winner is not None
    trial = race.session.trials[winner]
    jitter = race.comparison.jitter if race.comparison.rounds > 1 else None
    return SearchResult(
        winner, trial.seconds, race.default_seconds(), trial.memory_bytes, race.all_trials(), True, finished, jitter
    )


def estimate(problem: Problem, point: SearchPoint, hints: Sequence[Method] = ()) -> SearchResult:
    """Take the first right method: a hint's, where the cost model finds nothing against it, else by the cost model."""
    problem = dataclasses.replace(problem, pass_bytes=problem.pass_bytes or _pass_bytes(problem, point), trial=True)
    session = SearchSession(problem, "estimate").at(point)
    if not session.reference.says:
        return _plain_loop(session)
    # what records a method is worth its while only where that is timed
    space = [m for m in [*candidates(problem, 0), *default_methods(problem)] if without_replay(m) == m]
    best = min((predicted_seconds(problem, method) for method in space), default=math.inf)
    plain = [without_replay(method) for method in hints if not method.compiles]
    first = [m for m in plain if m.unsupported(problem) is None and predicted_seconds(problem, m) <= FAR_AHEAD * best]
    return _first_right(session, list(dict.fromkeys([*first, *space])))


def _pass_bytes(problem: Problem, point: SearchPoint) -> int:
    """Measure the peak memory of one plain evaluation and one VJP of the first output: the least that a seed costs."""
    leaves, kwargs, _, sandbox = point

    def one_pass() -> object:
        bound, inputs = bind(problem, leaves, kwargs)
        pullback = Pullback(bound, inputs, differentiable=False)
        return pullback(0, torch.ones_like(pullback.outputs[0]), last=True)

    try:
        with sandbox():
            return memory.peak_bytes(one_pass, leaves[problem.inputs[0]].device) or 0
    except Exception:  # estimate by the sizes of inputs and outputs; candidates will show what is wrong
        return 0


def _first_right(session: SearchSession, space: Sequence[Method]) -> SearchResult:
    """Take the first method that is right."""
    for method in [*space, LAST_RESORT]:
        if attempt(session, method, _limit_s(method)) is not None:
            session.record(method, "complete", reason="the cost model's first choice that is right; nothing was timed")
            return SearchResult(method, None, None, None, tuple(session.trials.values()))
    raise _nothing_found(session)


def _settle(race: CandidateRace) -> None:
    """Find a winner that is right and within the memory limit, however short the budget."""
    candidates_left = iter([*race.looks.promising(), *race.defaults, *race.looks.space, LAST_RESORT])
    while (winner := race.winner()) is None or not race.fits_memory(winner):
        if winner is not None:
            continue
        method = next((m for m in candidates_left if not race.had_its_look(m)), None)
        if method is None:
            raise _nothing_found(race.session)
        race.try_out(method, _limit_s(method))


def _limit_s(method: Method) -> float:
    """Return the time limit where any right method will do; none for the last resort, which a user would write too."""
    return math.inf if method == LAST_RESORT else PATIENCE_S


def _nothing_found(session: SearchSession) -> SearchError:
    reasons = [f"{trial.method['method']}: {trial.reason}" for trial in session.trials.values()]
    text = "; ".join(itertools.islice(dict.fromkeys(reasons), 6)) or "there is no candidate"
    return SearchError(
        f"no method gives the right Jacobian within the limits ({text}). Raise memory_limit if memory is what lacks; "
        "otherwise check by torch.autograd.gradcheck that func has the derivatives that it claims",
        text,
    )
