"""What a benchmark found: one record for each thing measured, and a run's report as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

State = Literal["right", "wrong", "error", "skipped", "slow"]
Facts = dict[str, str | float]


@dataclass(frozen=True)
class Outcome:
    """How one way fared.

    Attributes:
        name: the way.
        state: `right`, `wrong` (its numbers), `error`, `skipped` (too large), or `slow` (a right candidate that was
            left out of the race after its warm-up).
        seconds: median time of one call.
        samples: seconds per call, one for each round; empty if it was not in the race, and `seconds` is then that of a
            single call.
        reason: why it is not `right`.
    """

    name: str
    state: State
    seconds: float | None = None
    samples: tuple[float, ...] = ()
    reason: str | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**{**data, "samples": tuple(data["samples"])})

    def with_samples(self, samples: Iterable[float]) -> Outcome:
        samples = tuple(samples)
        return dataclasses.replace(self, seconds=statistics.median(samples), samples=samples)


def ratio(one: Outcome, other: Outcome) -> float | None:
    """Time of one over the other's: the median over paired rounds where both were in the race."""
    if one.seconds is None or other.seconds is None:
        return None
    if one.samples and other.samples:
        return statistics.median(a / b for a, b in zip(one.samples, other.samples, strict=True))
    return one.seconds / other.seconds


def fastest(outcomes: Iterable[Outcome]) -> Outcome | None:
    """Return the fastest that is right, of those in the race if there are any; None where none is."""
    right = [outcome for outcome in outcomes if outcome.state == "right"]
    return min(
        [outcome for outcome in right if outcome.samples] or right,
        key=lambda outcome: outcome.seconds or math.inf,
        default=None,
    )


@dataclass(frozen=True)
class Figure:
    """A number, and what was asked of it.

    Attributes:
        what: human-readable.
        value: as it was measured; infinite where it could not be.
        bound: what it is to stay below; None where nothing is asked.
        least: whether the bound is what it must reach instead.
    """

    what: str
    value: float
    bound: float | None = None
    least: bool = False

    @classmethod
    def over(cls, outcome: Outcome, base: Outcome | None, bound: float | None = None, what: str = "") -> Self:
        """Return one outcome as a multiple of another; infinite where either has no time."""
        found = None if base is None else ratio(outcome, base)
        label = what or f"{outcome.name} over {base.name if base else 'nothing'}"
        return cls(label, math.inf if found is None else found, bound)

    @property
    def missed(self) -> bool:
        if self.bound is None:
            return False
        return not (self.value >= self.bound if self.least else self.value <= self.bound)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "value": self.value if math.isfinite(self.value) else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**{**data, "value": math.inf if data["value"] is None else data["value"]})


@dataclass(frozen=True)
class BenchResult:
    """One thing measured.

    Attributes:
        name: the workload, or what was measured.
        outcomes: how each way fared, interleaved in one run; autojac first.
        figures: what is asked of it.
        facts: plans, colors, shapes, and what was timed apart.
        suite: the part of the benchmark that it belongs to.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    figures: tuple[Figure, ...]
    facts: Facts
    suite: str = ""

    def figure(self, what: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.what == what), None)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {**data, "figures": [figure.to_json() for figure in self.figures]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        outcomes = tuple(map(Outcome.from_json, data["outcomes"]))
        return cls(**{**data, "outcomes": outcomes, "figures": tuple(map(Figure.from_json, data["figures"]))})


@dataclass(frozen=True)
class Report:
    """One run of the benchmark, or several on the same machine.

    Attributes:
        environment: versions, threads, capability.
        settings: effort, rounds, budget.
        results: everything measured.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    results: tuple[BenchResult, ...] = ()

    def of(self, *suites: str) -> list[BenchResult]:
        return [result for result in self.results if result.suite in suites]

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(result.suite for result in self.results))

    def head(self) -> str:
        """Return the first line of the JSON: what the numbers depend on."""
        return json.dumps({"environment": self.environment, "settings": self.settings}, ensure_ascii=False)

    def lines(self) -> Iterator[str]:
        """Return the report as JSON, one line for what it depends on and one for each result."""
        yield self.head()
        for result in self.results:
            yield json_line(result)

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> Self:
        """Read what runs have written, the last line of a stopped one perhaps cut short; of a repeated result the last.

        Raises:
            ValueError: if no run wrote it.
        """
        heads: list[dict[str, Any]] = []
        found: dict[tuple[str, str], BenchResult] = {}
        for line in lines:
            try:
                data = json.loads(line)
                if "environment" in data:
                    heads.append(data)
                else:
                    result = BenchResult.from_json(data)
                    found[result.suite, result.name] = result
            except (ValueError, KeyError, TypeError):
                continue
        if not heads:
            raise ValueError("no line of it says on what machine it was measured")
        return cls(heads[-1]["environment"], heads[-1]["settings"], tuple(found.values()))


def json_line(result: BenchResult) -> str:
    return json.dumps(result.to_json(), allow_nan=False, ensure_ascii=False)
