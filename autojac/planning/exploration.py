"""A search that goes on while its plan is used: one step before a call, whenever the calls so far have paid for it.

The rule of the ski rental problem (Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", 1988): what is
spent on exploring stays below a fixed share of what calls cost anyway: a single call pays nothing, and repeated calls
soon have the best plan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from autojac.core.plan import Effort
from autojac.methods.base import Method
from autojac.planning.search import measure
from autojac.problem.problem import Problem

if TYPE_CHECKING:
    from autojac.planning.search.optimize import PriorKnowledge
    from autojac.planning.search.point import SearchPoint
    from autojac.planning.search.race import CandidateRace
    from autojac.planning.search.steps import Step

SHARE = 0.2
"""What all exploring for a signature may cost, as a share of what its calls have cost."""
FIRST_STEP_S, FIRST_STEP_CALLS = 0.02, 1
"""Seconds, and calls, that the first step is expected to cost: it runs func and lists the candidates."""
ADOPT_BELOW = 0.9
"""A candidate that was timed below this share of the plan in use is compared with it immediately."""
HELD_UP = 4.0
"""A call that takes more than so many times the fastest one was held up by something else."""
FIRST_LIMIT_S = 60.0
"""Seconds after which a candidate is given up where none was timed yet."""
MOST_FAILURES = 3
"""Steps that may raise before exploring ends: something other than a candidate fails."""

logger = logging.getLogger("autojac")


class Exploration:
    """The unfinished search behind a plan in use, and what its calls have paid for it.

    Args:
        prior: what is known already, the method of the plan in use included.
        effort: of the search.
        budget_s: what all exploring in this process may cost; no limit of its own by default.

    Attributes:
        method: of the plan in use.
        spent, earned: seconds that exploring and that calls have cost so far.
        fastest_s: seconds of the fastest call that was timed since the plan came into use.
        is_left_to_compile: only compiling the best candidates remains.
        is_paused: another search comes first.
    """

    def __init__(self, prior: PriorKnowledge, effort: Effort, budget_s: float | None) -> None:
        assert prior.incumbent is not None
        self.prior = prior
        self.method: Method = prior.incumbent
        self.effort = effort
        self.budget_s = math.inf if budget_s is None else budget_s
        self.spent = self.earned = 0.0
        self.race: CandidateRace | None = None
        self.is_over = self.is_left_to_compile = self.is_paused = False
        self._challenger: Method | None = None
        self._beaten: set[Method] = set()
        self._calls = self._failures = 0
        self._expected: float | None = None
        self._fastest_around = math.inf
        self._forget_times()

    def _forget_times(self) -> None:
        self.fastest_s = self._per_call = math.inf
        self._timed, self._count = 0.0, 0

    def credit(self, calls: int, seconds: float) -> None:
        """Count a call that took some seconds, and those since the last one that was timed by what the timed ones take.

        Args:
            calls: how many calls the plan has served.
            seconds: what the last of them took.
        """
        self.fastest_s = min(self.fastest_s, seconds)
        # a call that was held up by something else pays for no more than a few
        self._timed += min(seconds, HELD_UP * self.fastest_s)
        self._count += 1
        self._per_call = min(self._timed / self._count, self._trial_s)
        self.earned += seconds + max(calls - self._calls - 1, 0) * self._per_call
        self._calls = calls

    def credit_around(self, earned: float, calls: int, seconds: float) -> None:
        """Credit the duration of a computation that contains the plan's last call, in place of that call's own.

        Args:
            earned: `self.earned` before the computation.
            calls: how many calls the plan has served.
            seconds: of the computation, without exploring.
        """
        self._fastest_around = min(self._fastest_around, seconds)
        self.earned = max(self.earned, earned + min(seconds, HELD_UP * self._fastest_around))
        self._calls = calls

    @property
    def _trial_s(self) -> float:
        """The seconds of the plan in use in its trial, infinite without one; timed calls take longer than that."""
        trial = None if self.race is None else self.race.session.trials.get(self.method)
        return math.inf if trial is None or trial.seconds is None else trial.seconds

    @property
    def _usual_s(self) -> float:
        """The seconds of a call by the plan in use, as far as is known."""
        return next(filter(math.isfinite, (self._per_call, self._trial_s)), 0.0)

    def next_call(self) -> float:
        """Return the call before which the next step is due, by the calls' cost so far; infinite when all is over."""
        if self.is_over or self.is_paused:
            return math.inf
        shortfall = (self.spent + self.expected_s) / SHARE - self.earned
        if shortfall <= 0:
            return self._calls + 1
        if not 0 < self._per_call < math.inf:
            return math.inf
        return self._calls + 1 + math.ceil(shortfall / self._per_call)

    @property
    def expected_s(self) -> float:
        """The seconds that the next step will hardly exceed."""
        return FIRST_STEP_S + FIRST_STEP_CALLS * self.fastest_s if self._expected is None else self._expected

    @contextmanager
    def charging_first_call(self) -> Iterator[None]:
        """Charge the search for the first call by a plan that it found, which is checked and recorded."""
        start = measure.clock.working_s()
        yield
        if self.race is not None:
            self.spent += max(measure.clock.working_s() - start - self._usual_s, 0.0)

    def line(self) -> str:
        """Say how far the search has come, and what it waits for."""
        known = 0 if self.race is None else len(self.race.session.trials)
        return (
            f"the search goes on as the plan is used: {known} candidates known, {self.spent:.2g} s spent on it, which "
            f"may become {SHARE:.0%} of the {self.earned:.2g} s that calls have taken"
        )

    def take_step(self, problem: Callable[[], Problem], point: SearchPoint) -> Method | None:
        """Do the next step at a point; return a method to use from now on, if one was found to be faster.

        Args:
            problem: states what to compute, when the first step needs it.
            point: where candidates are checked and timed.
        """
        from autojac.planning.search.optimize import start_race

        start = measure.clock.working_s()
        try:
            if self.race is None:
                # the candidates, and so the time of the first look, are known only now
                self.race = start_race(problem(), point, self.effort, self.prior)
                self._time_by_calls(self.race)
                return None
            return self._take(self.race, point)
        except Exception as error:  # func, not a candidate: exploring never fails a call
            self._failures += 1
            self.is_over = self._failures >= MOST_FAILURES
            logger.debug("a step of the search failed: %s", error)
            return None
        finally:
            if self.race is not None:
                self.race.at(None)
                step = self._next_step(self.race)
                self.is_left_to_compile = step is not None and step.compiles
                self._expected = self._expect(self.race, step)
            self.spent += max(measure.clock.working_s() - start, 0.0)
            if self.spent >= self.budget_s:
                self.is_over = True

    def _expect(self, race: CandidateRace, step: Step | None) -> float:
        """Return the seconds that the next step will hardly exceed."""
        from autojac.planning.search.steps import Step

        race.usual_s = self._usual_s
        if step is None:
            return 0.0
        # where a duel is won, the winner is prepared, and its first call checked
        follows = race.expected_s(Step("adopt", step.method)) if step.kind == "duel" else 0.0
        return race.expected_s(step) + follows

    def _time_by_calls(self, race: CandidateRace) -> None:
        """Record the calls' time as the trial of the plan in use, without a backward, and on a CPU."""
        session = race.session
        if session.problem.differentiable or session.device.type != "cpu" or self.method in session.trials:
            return
        if self._count:
            session.record(self.method, "complete", seconds=self.fastest_s)

    def _take(self, race: CandidateRace, point: SearchPoint) -> Method | None:
        race.at(point)
        step = self._next_step(race)
        if step is None:
            self.is_over = True
            return None
        if step.kind == "adopt":
            self.is_over = race.next_step() is None
            return self._adopt(step.method)
        if not race.says(step):
            return None  # no derivative is finite here, so nothing can be compared: wait for another call
        if self._challenger is not None:
            challenger, self._challenger = self._challenger, None
            self._beaten.add(challenger)
            return self._adopt(challenger) if race.beats(challenger, self.method) else None
        session = race.session_of(step)
        session.end = measure.clock.now() + (session.hung_s if math.isfinite(session.hung_s) else FIRST_LIMIT_S)
        race.take(step)
        self._challenger = self._find_challenger(race)
        return None

    def _next_step(self, race: CandidateRace) -> Step | None:
        from autojac.planning.search.steps import Step

        if self._challenger is not None:
            return Step("duel", self._challenger)
        step = race.next_step()
        # the winner is used at the end, and before waiting for a compiler
        if (step is None or step.compiles) and (winner := race.winner()) not in (None, self.method):
            return Step("adopt", winner)
        return step

    def _find_challenger(self, race: CandidateRace) -> Method | None:
        """Return a candidate that seems to be clearly faster than the plan in use."""
        current = race.session.trials.get(self.method)
        best = race.fastest()
        if best is None or best == self.method or best in self._beaten:
            return None
        if current is None or current.seconds is None:
            return best
        seconds = race.session.trials[best].seconds
        return best if seconds is not None and seconds < ADOPT_BELOW * current.seconds else None

    def _adopt(self, method: Method | None) -> Method | None:
        if method is None or method == self.method:
            return None
        self.method = method
        self._forget_times()  # calls are faster from now on
        if self.race is not None:
            self.race.incumbent = method
        return method
