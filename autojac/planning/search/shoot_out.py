"""The last word: the fastest few and torch's default, interleaved and compared in pairs."""

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
from autojac.planning.search.trial import SHORTEST_S, Subject, try_out, weigh

ROUNDS = {"quick": 15, "measure": 15, "exhaustive": 31}
FINALISTS = 4
NOISE = 0.02
"""Paired differences below this share are noise: the incumbent stays."""
LOADING = 0.1
"""What must be won by a method for which every process has to load torch's compiler first."""
ENOUGH_ROUNDS = 3
FEW_ROUNDS_NOISE = 0.1


@dataclass(frozen=True)
class Found:
    """What a search found: the method, its time and torch's in the same shoot-out, and every trial.

    Attributes:
        verified: it was compared with something; there is nothing where no derivative is finite.
    """

    method: Method
    seconds: float | None
    default_seconds: float | None
    memory_bytes: int | None
    trials: tuple[Trial, ...]
    verified: bool = True


def shoot_out(subject: Subject, defaults: Sequence[Method]) -> Found | None:
    """Interleave the fastest few and torch's default; inside the noise the default stays, then less memory wins.

    Returns:
        What won; None if no timed candidate stays within the memory limit.
    """
    for method in defaults:
        if method not in subject.trials or subject.trials[method].state == "skipped":
            try_out(subject, method)
        if method in subject.runs or method in subject.slow:
            break
    ranked = sorted(subject.runs, key=lambda method: (subject.trials[method].seconds, repr(method)))
    over = time.monotonic() > subject.end
    fitting = filter(lambda method: weigh(subject, method), ranked)
    finalists = list(itertools.islice(fitting, 1 if over else FINALISTS))
    if not over and all(method.functional for method in finalists):
        finalists += itertools.islice((method for method in fitting if not method.functional), 1)
    if not finalists:
        return None
    runs = {method: subject.runs[method] for method in finalists}
    incumbent = next((method for method in defaults if _fits(subject, method)), None)
    if incumbent is not None and incumbent not in runs:
        runs[incumbent] = subject.slow.get(incumbent) or subject.runs[incumbent]
    if len(runs) == 1:
        return _found(subject, finalists[0], subject.trials[finalists[0]].seconds, defaults, {})
    with subject.quiet(), unwarned():
        table = measure.interleaved(
            list(runs.values()), subject.device, SHORTEST_S[subject.effort], ROUNDS[subject.effort], subject.end
        )
    samples = dict(zip(runs, table, strict=True))
    medians = {method: statistics.median(times) for method, times in samples.items()}
    winner = min(runs, key=lambda method: (medians[method], repr(method)))
    close = [method for method in runs if not _faster(samples[winner], samples[method])]
    if incumbent in close:
        winner = incumbent
    else:
        near = [m for m in runs if not m.functional and medians[m] < (1 + LOADING) * medians[winner]]
        chosen = near if winner.functional and near else close
        winner = min(
            chosen, key=lambda method: (subject.trials[method].memory_bytes or 0, medians[method], repr(method))
        )
    return _found(subject, winner, medians[winner], defaults, medians)


def _fits(subject: Subject, method: Method) -> bool:
    """Whether a default can race: it ran, it is within the memory limit, and a round of it within the budget."""
    if method in subject.runs:
        return subject.trials[method].memory_bytes is not None or weigh(subject, method)
    seconds = subject.trials[method].seconds if method in subject.slow else None
    return seconds is not None and time.monotonic() + 3 * seconds < subject.end


def _found(
    subject: Subject, winner: Method, seconds: float | None, defaults: Sequence[Method], medians: dict[Method, float]
) -> Found:
    # a default too slow to race is known by its only run
    known = {method: trial.seconds for method, trial in subject.trials.items()} | medians
    default_seconds = next((known[method] for method in defaults if known.get(method)), None)
    memory = subject.trials[winner].memory_bytes
    return Found(winner, seconds, default_seconds, memory, tuple(subject.trials.values()))


def _faster(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` beats `other` in paired rounds by more than noise."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    noise = NOISE if len(ratios) >= ENOUGH_ROUNDS else FEW_ROUNDS_NOISE
    return statistics.median(ratios) < 1 - noise and sum(ratio < 1 for ratio in ratios) > 0.6 * len(ratios)
