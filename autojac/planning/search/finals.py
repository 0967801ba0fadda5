"""The last comparison: the fastest few candidates and what stands, interleaved and compared in pairs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autojac.methods.base import Method
from autojac.planning.search import measure
from autojac.planning.search.trial import SHORTEST_S, SearchSession

MOST_ROUNDS = {"estimate": 5, "quick": 15, "measure": 31, "exhaustive": 61}
ENOUGH_ROUNDS = 5
"""Rounds after which a candidate that has won them all is the winner: by chance one in 32 cases."""
CLEAR_ROUNDS = 3
"""Rounds after which a large difference that every one of them shows is believed."""
NOISE = 0.02
"""Paired differences below this share are noise, and what stands stays."""
CLEARLY = 0.8
"""A ratio of times that noise does not reach in several rounds."""
COMPILER_MARGIN = 0.1
"""The share by which a method must win if every process has to wait for its compiler."""


@dataclass
class Comparison:
    """Timings of several candidates, taken in turn.

    Attributes:
        calls: how many calls in a row each is timed by.
        samples: seconds per call, one for each round.
    """

    calls: dict[Method, int] = field(default_factory=dict)
    samples: dict[Method, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return min((len(times) for times in self.samples.values()), default=0)

    def run_round(self, session: SearchSession, methods: Sequence[Method]) -> None:
        """Time each candidate once; one that is not right any more, or raises, is left out from then on."""
        runs = {method: run for method in methods if (run := session.ready(method)) is not None}
        with session.point.sandbox():
            for method, run in runs.items():
                if method not in self.calls:
                    shortest = SHORTEST_S[session.effort]
                    self.calls[method], _ = measure.block_size(run, session.device, shortest)
            order = list(runs)
            calls = [self.calls[method] for method in order]
            for index, seconds in measure.one_round(list(runs.values()), session.device, calls, self.rounds):
                self.samples.setdefault(order[index], []).append(seconds)
        self.samples = {method: times for method, times in self.samples.items() if method in runs}

    def timings(self) -> dict[Method, measure.Timing]:
        """Return what each candidate takes."""
        return {method: measure.summary(times) for method, times in self.samples.items()}

    def winner(self, standing: Sequence[Method], memory: Mapping[Method, int | None]) -> Method:
        """Return what won: within the noise what stands, then what takes less memory, then a fixed order.

        Args:
            standing: methods that stay unless another is faster, the first one first.
            memory: what each candidate takes at its peak.
        """
        seconds = {method: timing.seconds for method, timing in self.timings().items()}
        best = min(seconds, key=lambda method: (seconds[method], repr(method)))
        close = [method for method in seconds if not self.is_faster(best, method)]
        for method in standing:
            if method in close:
                return method
        near = [m for m in seconds if not m.may_load_compiler and seconds[m] < (1 + COMPILER_MARGIN) * seconds[best]]
        eligible = near if best.may_load_compiler and near else close
        return min(eligible, key=lambda method: (memory.get(method) or 0, seconds[method], repr(method)))

    def is_faster(self, one: Method, other: Method) -> bool:
        """Check whether `one` beats `other` in paired rounds by more than noise."""
        ratios = [a / b for a, b in zip(self.samples[one], self.samples[other], strict=False)]
        return statistics.median(ratios) < 1 - NOISE and sum(ratio < 1 for ratio in ratios) > 0.6 * len(ratios)

    def is_clear(self, one: Method, other: Method) -> bool:
        """Check whether every round shows the same large difference."""
        ratios = [a / b for a, b in zip(self.samples[one], self.samples[other], strict=False)]
        return max(ratios) < CLEARLY or min(ratios) > 1 / CLEARLY

    @property
    def is_decided(self) -> bool:
        """Whether one candidate has won every round, and enough of them."""
        if self.rounds < ENOUGH_ROUNDS:
            return False
        return any(
            all(
                all(a < (1 - NOISE) * b for a, b in zip(times, others, strict=False))
                for other, others in self.samples.items()
                if other != method
            )
            for method, times in self.samples.items()
        )

    @property
    def jitter(self) -> float:
        """The median spread of the candidates' timings: smaller differences say nothing."""
        return statistics.median([timing.dispersion for timing in self.timings().values()] or [0.0])
