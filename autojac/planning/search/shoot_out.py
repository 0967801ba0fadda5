"""The final comparison: the fastest few candidates and torch's default, interleaved and compared in pairs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from autojac.core.plan import Trial
from autojac.guards.process_state import unwarned
from autojac.methods.base import Method
from autojac.planning.search import measure
from autojac.planning.search.trial import SHORTEST_S, SearchSession, measure_memory, try_out

ROUNDS = {"quick": 15, "measure": 15, "exhaustive": 31}
FINALISTS = 4
NOISE = 0.02
"""Paired differences below this share are noise, and torch's default stays."""
COMPILER_LOAD_MARGIN = 0.1
"""The share by which a method must win for which every process has to load torch's compiler first."""
ENOUGH_ROUNDS = 3
FEW_ROUNDS_NOISE = 0.1


@dataclass(frozen=True)
class SearchResult:
    """What a search found: the method, its time and torch's in the same shoot-out, and every trial.

    Attributes:
        verified: whether the method was compared with a reference; there is none where no derivative is finite.
    """

    method: Method
    seconds: float | None
    default_seconds: float | None
    memory_bytes: int | None
    trials: tuple[Trial, ...]
    verified: bool = True


def shoot_out(session: SearchSession, defaults: Sequence[Method]) -> SearchResult | None:
    """Interleave the fastest few and torch's default; inside the noise the default stays, then less memory wins.

    Returns:
        What won; None if no timed candidate stays within the memory limit.
    """
    for method in defaults:
        if method not in session.trials or session.trials[method].state == "skipped":
            try_out(session, method)
        if method in session.runs or method in session.slow:
            break
    ranked = sorted(session.runs, key=lambda method: (session.trials[method].seconds, repr(method)))
    over = time.monotonic() > session.end
    fitting = filter(lambda method: measure_memory(session, method), ranked)
    finalists = list(itertools.islice(fitting, 1 if over else FINALISTS))
    if not over and all(method.uses_transforms for method in finalists):
        finalists += itertools.islice((method for method in fitting if not method.uses_transforms), 1)
    if not finalists:
        return None
    runs = {method: session.runs[method] for method in finalists}
    incumbent = next((method for method in defaults if _fits(session, method)), None)
    if incumbent is not None and incumbent not in runs:
        runs[incumbent] = session.slow.get(incumbent) or session.runs[incumbent]
    if len(runs) == 1:
        return _found(session, finalists[0], session.trials[finalists[0]].seconds, defaults, {})
    with session.point.sandbox(), unwarned():
        table = measure.interleaved(
            list(runs.values()), session.device, SHORTEST_S[session.effort], ROUNDS[session.effort], session.end
        )
    samples = dict(zip(runs, table, strict=True))
    medians = {method: statistics.median(times) for method, times in samples.items()}
    winner = min(runs, key=lambda method: (medians[method], repr(method)))
    close = [method for method in runs if not _faster(samples[winner], samples[method])]
    if incumbent in close:
        winner = incumbent
    else:
        near = [m for m in runs if not m.uses_transforms and medians[m] < (1 + COMPILER_LOAD_MARGIN) * medians[winner]]
        chosen = near if winner.uses_transforms and near else close
        winner = min(
            chosen, key=lambda method: (session.trials[method].memory_bytes or 0, medians[method], repr(method))
        )
    return _found(session, winner, medians[winner], defaults, medians)


def _fits(session: SearchSession, method: Method) -> bool:
    """Check whether a default can race: it ran, it is within the memory limit, and a round of it within the budget."""
    if method in session.runs:
        return session.trials[method].memory_bytes is not None or measure_memory(session, method)
    seconds = session.trials[method].seconds if method in session.slow else None
    return seconds is not None and time.monotonic() + 3 * seconds < session.end


def _found(
    session: SearchSession,
    winner: Method,
    seconds: float | None,
    defaults: Sequence[Method],
    medians: dict[Method, float],
) -> SearchResult:
    # a default too slow to race is known by its only run
    known = {method: trial.seconds for method, trial in session.trials.items()} | medians
    default_seconds = next((known[method] for method in defaults if known.get(method)), None)
    memory = session.trials[winner].memory_bytes
    return SearchResult(winner, seconds, default_seconds, memory, tuple(session.trials.values()))


def _faster(one: Sequence[float], other: Sequence[float]) -> bool:
    """Check whether `one` beats `other` in paired rounds by more than noise."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    noise = NOISE if len(ratios) >= ENOUGH_ROUNDS else FEW_ROUNDS_NOISE
    return statistics.median(ratios) < 1 - noise and sum(ratio < 1 for ratio in ratios) > 0.6 * len(ratios)
