"""A race of candidates, step by step: what is run next follows from what is known of all, so it can go on anywhere.

Each candidate is looked at once. Then the slow half is dropped and the rest timed longer, until few are left
(successive halving: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
2016), and the last few are compared in pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from autojac.core.plan import NOT_TRIED, Trial
from autojac.methods.base import Method
from autojac.planning.search import measure
from autojac.planning.search.finals import CLEAR_ROUNDS, ENOUGH_ROUNDS, MOST_ROUNDS, Comparison
from autojac.planning.search.looks import Looks
from autojac.planning.search.point import SearchPoint
from autojac.planning.search.steps import Step, StepCosts, step_seconds
from autojac.planning.search.trial import (
    LONG_S,
    PRUNE_RATIO,
    SearchSession,
    look,
    look_longer,
    measure_memory,
)

FINALISTS = 4
MOST_LEVELS = 4
"""How often the slower half is dropped, and the rest timed again, at most."""
KEPT_RUNS = 12
"""Candidates, the fastest, that are kept ready to run again."""
UNSURE = 1.1
"""What stands stays unless it takes so many times as long, where nothing was compared in pairs."""


class CandidateRace:
    """The candidates of one problem, and what is known of them.

    Args:
        session: the problem, the trials so far and the point where the next ones are made.
        space: candidates in the order of the cost model.
        defaults: what a torch user would write.
        hints: candidates to look at early, such as a neighbour's plan.
        incumbent: the method of the plan that is used so far, which only a faster one replaces.

    Attributes:
        usual_s: seconds of a call by the plan in use, where there is one.
    """

    def __init__(
        self,
        session: SearchSession,
        space: Sequence[Method],
        defaults: Sequence[Method],
        hints: Sequence[Method] = (),
        incumbent: Method | None = None,
    ) -> None:
        self.session = session
        self.defaults = defaults
        self.incumbent = incumbent
        self.usual_s = 0.0
        self.looks = Looks(session, space, defaults, hints, incumbent)
        self.comparison = Comparison()
        self.levels: dict[Method, int] = {}
        self.weighed: set[Method] = set()
        self._costs = StepCosts()
        self._racers: list[Method] | None = None
        self._champion: Method | None = None

    def at(self, point: SearchPoint | None) -> CandidateRace:
        """Make the next steps at this point; None releases it."""
        self.looks.at(point)
        return self

    def next_step(self, looks: bool = True, slices: bool = True, within_s: float = math.inf) -> Step | None:
        """Return what to do next; None where all is decided.

        Args:
            looks: whether new candidates are looked at; if not, those known are compared.
            slices: whether more of them are looked at on a slice first.
            within_s: seconds that a look on the batch may be expected to take.
        """
        if looks:
            if self.usual_s and (method := self.looks.next_far_ahead()) is not None:  # calls wait for a better plan
                return Step("look", method)
            if slices and (method := self.looks.next_on_slice()) is not None:
                return Step("slice", method)
            steps = (Step("look", method) for method in self.looks.upcoming())
            if (step := next((s for s in steps if self.expected_s(s) <= within_s), None)) is not None:
                return step
        if (method := self._next_longer()) is not None:
            return Step("longer", method)
        racers = self.racers()
        if (method := next((m for m in racers if m not in self.weighed), None)) is not None:
            return Step("memory", method)
        if len(racers) > 1 and not self._is_decided():
            return Step("round")
        if looks and (method := self.looks.next_compiled()) is not None:
            return Step("look", method)
        return None

    def _is_decided(self) -> bool:
        return self.comparison.rounds >= MOST_ROUNDS[self.session.effort] or self.comparison.is_decided

    def says(self, step: Step) -> bool:
        """Check whether candidates can be checked where a step is made: whether a derivative is finite there."""
        return self.looks.says_on_slice() if step.kind == "slice" else self.session.reference.says

    def session_of(self, step: Step) -> SearchSession:
        """Return the session in which a step is made: the slice's, or that of the whole batch."""
        return self.looks.scout if step.kind == "slice" and self.looks.scout is not None else self.session

    def take(self, step: Step) -> None:
        """Do a step at the session's point."""
        with self.counting(step):
            self._take(step)

    def _take(self, step: Step) -> None:
        step.load()
        method = step.method
        if method is None:
            self.comparison.run_round(self.session, self.racers())
            if set(self.racers()) != set(self.comparison.samples):
                self.choose_racers()
        elif step.kind == "slice":
            self.looks.look_on_slice(method)
        elif step.kind == "look":
            self.try_out(method)
        elif step.kind == "longer":
            look_longer(self.session, method)
            self.levels[method] = self.levels.get(method, 0) + 1
            self.choose_racers()
        else:
            self.fits_memory(method)

    def expected_s(self, step: Step) -> float:
        """Return the seconds that a step will hardly exceed."""
        return self._costs.expected_s(step, self._model_s(step))

    def adopting_s(self) -> float:
        """Return the seconds of the first call by the fastest candidate so far; 0 where there is none."""
        fastest = self.fastest()
        return 0.0 if fastest is None else self.expected_s(Step("adopt", fastest))

    @contextmanager
    def counting(self, step: Step) -> Iterator[None]:
        """Learn what a step takes."""
        start, model_s = measure.clock.working_s(), self._model_s(step)
        yield
        self._costs.note(step, model_s, measure.clock.working_s() - start)

    def _model_s(self, step: Step) -> float:
        methods = self.racers() if step.method is None else [step.method]
        if step.kind == "duel" and self.incumbent is not None:
            methods = [*methods, self.incumbent]
        session = self.session_of(step)
        return step_seconds(step, session, [self._run_s(session, m) for m in methods], first=not self.comparison.rounds)

    def _run_s(self, session: SearchSession, method: Method) -> float:
        """Return what a run of a candidate takes: as timed, else as predicted, or as long as others take there."""
        trial = session.trials.get(method)
        if trial is not None and trial.seconds is not None:
            return trial.seconds
        others = [session.best]
        if session is self.session:
            others = [self.looks.by_slice(method), session.best, self.usual_s]
        return max(self.looks.predict_s(session, method), next(filter(math.isfinite, others), 0.0))

    def try_out(self, method: Method, allowed_s: float | None = None) -> None:
        """Look at a candidate, and release those that will hardly run again."""
        if method not in self.looks.space:
            self.looks.space.append(method)
        look(self.session, method, allowed_s)
        for known in self.looks.by_time(self.session.runs)[KEPT_RUNS:]:
            if known not in self.standing:
                del self.session.runs[known]
        self.choose_racers()

    def beats(self, challenger: Method, current: Method) -> bool:
        """Compare a candidate with another one in a few rounds; return whether it is faster and fits the memory."""
        with self.counting(Step("duel", challenger)):
            return self.fits_memory(challenger) and self._wins(challenger, current)

    def _wins(self, challenger: Method, current: Method) -> bool:
        duel, both = Comparison(), {challenger, current}
        while duel.rounds < ENOUGH_ROUNDS and not (duel.rounds >= CLEAR_ROUNDS and duel.is_clear(challenger, current)):
            duel.run_round(self.session, [challenger, current])
            if set(duel.samples) != both:
                return False
        return duel.is_faster(challenger, current)

    def had_its_look(self, method: Method) -> bool:
        """Check whether a candidate was looked at."""
        trial = self.session.trials.get(method)
        return trial is not None and trial.state != "skipped"

    def fits_memory(self, method: Method) -> bool:
        """Check whether a timed candidate stays within the memory limit, by another run if that is not known."""
        if method in self.weighed:
            return True
        self.weighed.add(method)
        fits = measure_memory(self.session, method)
        if not fits:
            self.choose_racers()
        return fits

    def ranking(self) -> list[Method]:
        """Return the candidates that were timed, hopeless ones left out, the fastest first."""
        return self.looks.by_time(m for m, trial in self.session.trials.items() if trial.is_timed)

    def _next_longer(self) -> Method | None:
        """Return the next survivor to be timed longer; None where few are left."""
        timed = self.ranking()
        for level in range(1, MOST_LEVELS + 1):
            if len(timed) <= FINALISTS:
                return None
            half = max((len(timed) + 1) // 2, FINALISTS)
            fastest = self.looks.time(timed[0])
            timed = [m for m in timed[:half] if self.looks.time(m) < PRUNE_RATIO * fastest]
            for method in timed:
                # a long run was timed well enough
                if self.levels.get(method, 0) < level and self.looks.time(method) < LONG_S:
                    return method
        return None

    def choose_racers(self) -> None:
        """Choose again who takes part in the last comparison, as times have changed."""
        self._racers = None

    def racers(self) -> list[Method]:
        """Return who takes part in the last comparison: the fastest few, and what stands unless it is beaten."""
        if self._racers is None:
            timed = self.ranking()
            racers = [m for m in timed[:FINALISTS] if self.looks.time(m) <= PRUNE_RATIO * self.looks.time(timed[0])]
            if racers and all(method.may_load_compiler for method in racers):
                racers += [m for m in timed[FINALISTS:] if not m.may_load_compiler][:1]
            # what is far behind is known well enough
            limit = PRUNE_RATIO * self.session.best
            racers += [m for m in self.standing if m in timed and m not in racers and self.looks.time(m) < limit]
            self._racers = racers
            if set(self.comparison.samples) - set(racers) or set(racers) - set(self.comparison.samples):
                self._champion = self._compared_winner() if self.comparison.rounds else self._champion
                self.comparison = Comparison()
        return self._racers

    @property
    def standing(self) -> list[Method]:
        """What stays within the noise: the plan so far, then torch's default that works."""
        default = next((m for m in self.defaults if math.isfinite(self.looks.time(m))), None)
        return [m for m in (self.incumbent, default) if m is not None]

    def fastest(self) -> Method | None:
        """Return the candidate that was timed fastest so far."""
        return next(iter(self.ranking()), None)

    def winner(self) -> Method | None:
        """Return the fastest right candidate as far as is known; None if there is none."""
        racers = self.racers()
        if not racers:
            return None
        if self.comparison.rounds:
            self._note(self.comparison)
            return self._compared_winner()
        close = [m for m in self.standing if m in racers and self.looks.time(m) < UNSURE * self.looks.time(racers[0])]
        return close[0] if close else racers[0]

    def confirm(self) -> None:
        """Compare what a few calls show to be the fastest with what had won a comparison before it was looked at."""
        leader, champion = next(iter(self.racers()), None), self._champion
        if leader is None or champion is None or leader == champion or self.comparison.rounds:
            return
        duel = Comparison()
        for _ in range(CLEAR_ROUNDS if self.looks.time(champion) < LONG_S else 1):
            duel.run_round(self.session, [leader, champion])
        self._note(duel)
        self.choose_racers()

    def _note(self, comparison: Comparison) -> None:
        """Take over what candidates take in a comparison."""
        for method, timing in comparison.timings().items():
            self.session.trials[method] = dataclasses.replace(self.session.trials[method], **vars(timing))

    def _compared_winner(self) -> Method:
        memory = {method: self.session.trials[method].memory_bytes for method in self.comparison.samples}
        return self.comparison.winner(self.standing, memory)

    def default_seconds(self) -> float | None:
        """Return what torch's default takes, by its time on a slice where it was not worth a run on the batch."""
        times = [*map(self.looks.time, self.defaults), *map(self.looks.by_slice, self.defaults)]
        return next(filter(math.isfinite, times), None)

    def all_trials(self) -> tuple[Trial, ...]:
        """Return every candidate's fate, those that have not been looked at included."""
        untried = [method for method in self.looks.find_untried() if method not in self.session.trials]
        unknown = (Trial(method.spec(), "skipped", reason=NOT_TRIED) for method in untried)
        return (*self.session.trials.values(), *unknown)
