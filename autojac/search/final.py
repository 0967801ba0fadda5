"""The last word: the fastest few and torch's default, interleaved and compared in pairs."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from autojac.methods.base import Method
from autojac.plan import Trial
from autojac.search import measure
from autojac.search.trial import SHORTEST_S, Subject, try_out

ROUNDS = {"quick": 9, "measure": 15, "exhaustive": 31}
FINALISTS = 4
NOISE = 0.02
"""Paired differences below this share are noise: the incumbent stays."""


@dataclass(frozen=True)
class Found:
    """What a search found: the method, its time and torch's in the same shoot-out, and every trial."""

    method: Method
    seconds: float | None
    default_seconds: float | None
    memory_bytes: int | None
    trials: tuple[Trial, ...]


def shoot_out(subject: Subject, defaults: Sequence[Method]) -> Found:
    """Interleave the fastest few and torch's default; inside the noise the default stays, then less memory wins."""
    for method in defaults:
        if method not in subject.trials and not subject.out_of_time:
            try_out(subject, method)
        if method in subject.trials and subject.trials[method].state in ("complete", "pruned"):
            break
    incumbent = next((method for method in defaults if method in subject.runs), None)
    ranked = sorted(subject.runs, key=lambda method: (subject.trials[method].seconds, repr(method)))
    finalists = ranked[:FINALISTS]
    if incumbent is not None and incumbent not in finalists:
        finalists.append(incumbent)
    if len(finalists) == 1:
        return _found(subject, finalists[0], subject.trials[finalists[0]].seconds, incumbent, None)
    effort = subject.effort
    with subject.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = measure.interleaved(
            [subject.runs[method] for method in finalists],
            subject.device,
            SHORTEST_S[effort],
            ROUNDS[effort],
            subject.end,
        )
    samples = dict(zip(finalists, table, strict=True))
    medians = {method: statistics.median(times) for method, times in samples.items()}
    winner = min(finalists, key=lambda method: (medians[method], repr(method)))
    close = [method for method in finalists if not _faster(samples[winner], samples[method])]
    if incumbent in close:
        winner = incumbent
    else:
        winner = min(
            close, key=lambda method: (subject.trials[method].memory_bytes or 0, medians[method], repr(method))
        )
    default_seconds = medians.get(incumbent) if incumbent else _default_seconds(subject, defaults)
    return _found(subject, winner, medians[winner], incumbent, default_seconds)


def _default_seconds(subject: Subject, defaults: Sequence[Method]) -> float | None:
    """What the default took in its only run, where it was too slow for the shoot-out."""
    return next(
        (subject.trials[m].seconds for m in defaults if m in subject.trials and subject.trials[m].seconds), None
    )


def _faster(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` beats `other` in paired rounds by more than noise."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.median(ratios) < 1 - NOISE and sum(ratio < 1 for ratio in ratios) > 0.6 * len(ratios)


def _found(
    subject: Subject, winner: Method, seconds: float | None, incumbent: Method | None, default_seconds: float | None
) -> Found:
    memory = subject.trials[winner].memory_bytes
    if default_seconds is None and winner == incumbent:
        default_seconds = seconds
    return Found(winner, seconds, default_seconds, memory, tuple(subject.trials.values()))
