"""Which candidate is looked at next: flat programs in the cost model's order, other methods, compilers last.

Large batches are looked at on a slice first: candidates that are slow there are not run on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from autojac.methods.base import Method
from autojac.methods.batch_chunk import BatchChunk
from autojac.methods.replay import Replay, twin_by_autograd
from autojac.methods.threads import Threads
from autojac.planning.search.point import SearchPoint
from autojac.planning.search.space import (
    form_turn,
    has_threads,
    of_one_chunk,
    predicted_seconds,
    waits_for_compiler,
    with_all_threads,
    with_compiler,
    without_replay,
)
from autojac.planning.search.trial import PRUNE_RATIO, SearchSession, look

if TYPE_CHECKING:
    from autojac.planning.search.propose import Proposer

PROGRAM_REACH = {"estimate": 1.0, "quick": 4.0, "measure": 10.0, "exhaustive": math.inf}
"""A flat program is worth recording where it is predicted to take no more than so many times the best one."""
COMPILED_PROGRAMS = 2
"""How many flat programs, the fastest distinct ones, are compiled."""
THREADED = 2
"""How many of the fastest candidates are tried with one thread."""
ONE_THREAD_PAYS = 0.7
"""Where one thread takes less than so much of the time of all, the order with all says little of that with one."""
SMALL_S = 5e-3
"""Candidates that take longer gain by every thread."""
SLICE = 4096
"""Samples of the slice on which candidates for larger batches race first."""
LARGE = 4
"""A batch of so many slices is worth a race on one of them."""
SLICE_MARGIN = 1.3
"""What was so many times slower than the best on the slice is not run on the batch."""
MUCH_FASTER = 0.5
"""A candidate that takes no more than so much of the time of what stands is compared, and used, before all others."""
SLICE_SHARE = {False: 0.4, True: 0.8}
"""Share of the time for looks that those on the slice may take, in a first search and in one that is continued."""
MOST_IN_ORDER = 100
"""While more candidates than these are untried, Optuna proposes the next one from what is known."""


class Looks:
    """The order in which candidates are looked at, as it follows from what is known of those before.

    Args:
        session: the problem, and the trials so far.
        space: candidates in the order of the cost model.
        defaults: what a torch user would write.
        hints: candidates to look at early, such as a neighbour's plan; where the batch is large, with all threads.
        incumbent: the method of the plan in use, the first one to look at.

    Attributes:
        is_continued: whether trials of an earlier search are known.
        scout: the same problem on a slice of the batch where that is large; None elsewhere.
    """

    def __init__(
        self,
        session: SearchSession,
        space: Sequence[Method],
        defaults: Sequence[Method],
        hints: Sequence[Method],
        incumbent: Method | None,
    ) -> None:
        self.session = session
        self.defaults = defaults
        self.is_continued = False
        self.scout = self._scout()
        if self.scout is not None:
            # a small batch gains by fewer threads, as a large one does not
            hints = [with_all_threads(hint) for hint in hints]
        hints = [hint for hint in hints if hint.unsupported(session.problem) is None]
        self.first = [*([] if incumbent is None else [incumbent]), *hints]
        self.space = list(dict.fromkeys([*space, *self.first]))
        self._predicted: dict[bool, dict[Method, float]] = {False: {}, True: {}}
        self._proposer: Proposer | None = None
        self._proposed: Method | None = None

    def next_on_slice(self) -> Method | None:
        """Return the next candidate to look at on the slice; None where there is none."""
        return None if self.scout is None else next(self._on_slice(self.scout), None)

    def next_compiled(self) -> Method | None:
        """Return the next candidate that takes a compiler: the fastest distinct flat programs are compiled."""
        return next(self._compiled_forms(), None)

    def find_untried(self, compilers: bool = True) -> list[Method]:
        """Return the candidates that are worth a look, as far as is known, and have not had one."""
        known = self.session.trials
        untried = [method for method, trial in known.items() if trial.is_untried]
        untried += self.upcoming()
        if self.scout is not None and not self.is_continued:
            untried += (method for method in self._on_slice(self.scout) if method not in known)
        if compilers:
            untried += self._compiled_forms()
        return [method for method in dict.fromkeys(untried) if compilers or not method.compiles]

    def promising(self) -> list[Method]:
        """Return the candidates that a slice of the batch speaks for, in the order of looks; empty without a slice."""
        if self.scout is None or not any(trial.is_timed for trial in self.scout.trials.values()):
            return []
        return self._promising([m for m in self.space if not waits_for_compiler(m)])

    def by_time(self, methods: Iterable[Method]) -> list[Method]:
        """Return those that were timed, slow ones included, the fastest first."""
        return sorted((m for m in methods if math.isfinite(self.time(m))), key=lambda m: (self.time(m), repr(m)))

    def time(self, method: Method) -> float:
        """Return the seconds of a candidate; infinite where they are not known."""
        trial = self.session.trials.get(method)
        return math.inf if trial is None or trial.seconds is None else trial.seconds

    def upcoming(self) -> Iterator[Method]:
        """Yield the candidates to look at as far as is known now, the next one first."""
        known = self.session.trials
        yield from (m for m in self.first if m not in known)
        space = [m for m in self.space if not waits_for_compiler(m)]
        if self.scout is not None:
            yield from (m for m in self._promising(space) if m not in known)
            return
        yield from self._in_order(self.session, space)

    def _in_order(self, session: SearchSession, space: Sequence[Method]) -> Iterator[Method]:
        """Yield the candidates without a look in a session: the safest ones, then flat programs, then all others."""
        known = session.trials
        eager = [m for m in space if without_replay(m) == m]
        programs = self._promising_programs(session, [m for m in space if without_replay(m) != m])
        # for a batch too small for a race on a slice, chunks hardly ever win
        programs.sort(key=lambda m: isinstance(m, BatchChunk))
        defaults = [m for m in self.defaults[:1] if m in space]
        # what a user would write comes before the first recording, which may take as long as there is
        begin = [*eager[:1], *defaults, *(programs if _can_record(session) else ())]
        yield from (m for m in begin if m not in known)
        if session is self.session:
            yield from self._with_fewer_threads()
        untried = [m for m in eager if m not in known and (m in defaults or not _is_surpassed(session, m))]
        if len(untried) > MOST_IN_ORDER and (proposed := self._propose(untried)) is not None:
            yield proposed
        yield from (m for m in [*untried, *programs] if m not in known)

    def _promising_programs(self, session: SearchSession, flat: Sequence[Method]) -> list[Method]:
        """Return the flat programs that are worth recording by what is predicted of them, in that order."""
        predicted = {m: self.predict_s(session, m) for m in flat}
        reach = PROGRAM_REACH[session.effort] * min(predicted.values(), default=0.0)
        return [m for m in flat if predicted[m] <= reach]

    def predict_s(self, session: SearchSession, method: Method) -> float:
        """Return the seconds by the corrected cost model, computed once: each step asks for them again."""
        known = self._predicted[session is self.session]
        if method not in known:
            known[method] = predicted_seconds(session.problem, method)
        return known[method]

    def _with_fewer_threads(self) -> Iterator[Method]:
        """Yield the fastest candidates with one thread, where they are so small that others may cost more than help."""
        known, is_exhaustive = self.session.trials, self.session.effort == "exhaustive"
        fastest = [m for m in self.by_time(self.space) if not (m.compiles or has_threads(m))]
        for turn, method in enumerate(fastest):
            single = Threads(1, method)
            # predicted times count too: threads that wait for each other on a busy machine take many times as long
            seconds = min(self.time(method), method.cost(self.session.problem))
            if single not in known and seconds < SMALL_S and single.unsupported(self.session.problem) is None:
                yield single
            if turn + 1 >= THREADED and not (is_exhaustive or self.time(single) < ONE_THREAD_PAYS * self.time(method)):
                return

    def _compiled_forms(self) -> Iterator[Method]:
        known = self.session.trials
        later = [m for m in self.space if m not in known and waits_for_compiler(m)]
        # programs that load a compiler, without a compiler's work
        yield from (m for m in later if not m.compiles and without_replay(m) != m)
        yield from (m for m in later if m.compiles)
        flat = [m for m in self.by_time(self.space) if not m.compiles and of_one_chunk(m).makes_flat_programs]
        for method in flat[:COMPILED_PROGRAMS]:
            compiled = with_compiler(method)
            if compiled and compiled not in known and compiled.unsupported(self.session.problem) is None:
                yield compiled

    def _propose(self, space: Sequence[Method]) -> Method | None:
        """Return the candidate that Optuna proposes, which stays the same until it was looked at."""
        from autojac.planning.search.propose import Proposer  # Optuna takes 0.2 s to load

        known = self.session.trials
        if self._proposer is None:
            self._proposer = Proposer(list(space))
        if self._proposed is None or self._proposed in known:
            for method, trial in known.items():
                self._proposer.tell(method, trial)
            self._proposed = self._proposer.ask(known)
        return self._proposed

    def _scout(self) -> SearchSession | None:
        problem = self.session.problem
        structure = problem.structure
        large = problem.batch >= LARGE * SLICE and self.session.device.type == "cpu"
        if not (large and structure.independent and structure.sliceable and not structure.effects):
            return None
        return SearchSession(problem.resize(SLICE), self.session.effort)

    def at(self, point: SearchPoint | None) -> None:
        """Look at the next candidates at this point; None releases it."""
        self.session.at(point)
        if self.scout is not None:
            roles = self.session.problem.leaves
            self.scout.at(
                point
                and point._replace(
                    leaves=[x[:SLICE] if leaf.batched else x for x, leaf in zip(point.leaves, roles, strict=True)]
                )
            )

    def look_on_slice(self, method: Method) -> None:
        """Look at a candidate on the slice, unless func doesn't take a slice."""
        self.says_on_slice()
        if self.scout is not None:
            look(self.scout, method)
            self.scout.runs.clear()

    def says_on_slice(self) -> bool:
        """Check whether candidates can be checked on the slice, which is given up if func fails there."""
        try:
            return self.scout is None or self.scout.reference.says
        except Exception:  # whatever func raises at this size
            self.scout = None
            return True

    def by_slice(self, method: Method) -> float:
        """Return the seconds that a candidate would take if its time grew as the batch does; infinite if unknown."""
        trial = None if self.scout is None else self.scout.trials.get(of_one_chunk(method))
        if trial is None or trial.seconds is None:
            return math.inf
        return trial.seconds * self.session.problem.batch / SLICE

    def next_far_ahead(self) -> Method | None:
        """Return the next candidate for the batch, where the slice shows one to be far faster than all tried so far."""
        known, best = self.session.trials, self.session.best
        untried = (self.by_slice(m) for m in self.space if not (m in known or waits_for_compiler(m)))
        if math.isinf(best) or min(untried, default=math.inf) > MUCH_FASTER * best:
            return None
        return next(self.upcoming(), None)

    def _on_slice(self, scout: SearchSession) -> Iterator[Method]:
        """Yield the candidates that race on the slice: methods that take all samples in one pass."""
        # a slice gains by fewer threads, as the batch does not; plans of earlier versions have them inside chunks
        kinds = dict.fromkeys(of_one_chunk(m) for m in self.space if not (waits_for_compiler(m) or has_threads(m)))
        yield from self._in_order(scout, [m for m in kinds if m.unsupported(scout.problem) is None])

    def _promising(self, methods: Sequence[Method]) -> list[Method]:
        """Return candidates for a large batch by what a slice of it takes, without the slow ones; others as given."""
        predicted = {method: self.by_slice(method) for method in methods}
        best = min(map(self.by_slice, self.space), default=math.inf)
        if math.isinf(best):
            return list(methods)
        within = [m for m in methods if predicted[m] <= (PRUNE_RATIO if m in self.defaults else SLICE_MARGIN) * best]
        whole, chunked = self._best_of_each_form()
        modelled = {method: self.predict_s(self.session, method) for method in within}
        by_model = sorted((m for m in within if isinstance(m, BatchChunk)), key=lambda m: modelled[m], reverse=True)
        sizes = {m.inner: m.size for m in by_model}

        def turn(method: Method) -> tuple[int, float, float]:
            return form_turn(method, whole, chunked, sizes), predicted[method], modelled[method]

        return sorted(within, key=turn)

    def _best_of_each_form(self) -> tuple[float, float]:
        """Return the seconds of the fastest method for the whole batch in one pass, and of that for chunks of it."""
        times = {m: self.time(m) for m in self.session.trials}
        whole = min((time for m, time in times.items() if not isinstance(m, BatchChunk)), default=math.inf)
        return whole, min((time for m, time in times.items() if isinstance(m, BatchChunk)), default=math.inf)


def _can_record(session: SearchSession) -> bool:
    """Check whether func can be recorded, as far as is known."""
    programs = [trial for m, trial in session.trials.items() if m.makes_flat_programs and not m.compiles]
    has_failure = any(trial.state in ("infeasible", "rejected") for trial in programs)
    return not has_failure or any(trial.seconds is not None for trial in programs)


def _is_surpassed(session: SearchSession, method: Method) -> bool:
    """Check whether a method's flat program was tried: the same operators with less overhead."""
    programs = [session.trials.get(Replay(m)) for m in (method, twin_by_autograd(method)) if m is not None]
    known = [trial for trial in programs if trial is not None and not trial.is_untried]
    is_tried = any(trial.state in ("complete", "pruned", "skipped") for trial in known)
    return is_tried and session.effort != "exhaustive"
