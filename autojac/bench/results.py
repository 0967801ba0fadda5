"""What a benchmark found, and its JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Any, Literal, Self

State = Literal["right", "wrong", "error", "skipped", "slow"]


@dataclass(frozen=True)
class Outcome:
    """How one way fared on one workload.

    Attributes:
        name: the way.
        state: `right`, `wrong` (its numbers), `error`, `skipped` (too large), or `slow` (a right candidate that was
            left out of the race after its warm-up).
        seconds: median time of one call.
        samples: seconds a call, one for each round; empty if it was not in the race, and `seconds` is then that of a
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

    def raced(self, samples: list[float]) -> Outcome:
        return dataclasses.replace(self, seconds=statistics.median(samples), samples=tuple(samples))


def ratio(one: Outcome, other: Outcome) -> float | None:
    """Time of one over the other's: the median over paired rounds where both were in the race."""
    if one.seconds is None or other.seconds is None:
        return None
    if one.samples and other.samples:
        return statistics.median(a / b for a, b in zip(one.samples, other.samples, strict=True))
    return one.seconds / other.seconds


@dataclass(frozen=True)
class Regret:
    """The plan against every fixed candidate, in a race of their own.

    Attributes:
        plan: the tuned plan's method.
        candidates: every candidate's fate, the plan's own among them.
    """

    plan: str
    candidates: tuple[Outcome, ...]

    @property
    def best(self) -> Outcome:
        """The fastest fixed candidate."""
        return min((c for c in self.candidates if c.samples), key=lambda c: c.seconds or math.inf)

    @property
    def ratio(self) -> float:
        """Time of the plan over that of the fastest: 1 where the plan is the fastest."""
        own = next(c for c in self.candidates if c.name == self.plan)
        return (own.seconds or math.inf) / (self.best.seconds or math.inf)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(data["plan"], tuple(map(Outcome.from_json, data["candidates"])))


@dataclass(frozen=True)
class Race:
    """One workload: every way in one interleaved run.

    Attributes:
        workload, kind, batch, n, m: what was raced.
        default: name of the way that ratios refer to: torch's default, or where that is not right its best right one.
        substituted: whether it is such a substitute.
        plan: the tuned plan's method, in human-readable form.
        coupling: what probing found.
        tuning_seconds: what probing and searching took.
        autojac: the call `jac(x)`.
        ways: torch's own.
        regret: the plan against all fixed candidates, if asked for.
    """

    workload: str
    kind: str
    batch: int
    n: int
    m: int
    default: str | None
    substituted: bool
    plan: str
    coupling: str
    tuning_seconds: float
    autojac: Outcome
    ways: tuple[Outcome, ...]
    regret: Regret | None = None

    @property
    def speedup(self) -> float | None:
        """Torch's default over autojac."""
        against = next((way for way in self.ways if way.name == self.default), None)
        return None if against is None else ratio(against, self.autojac)

    @property
    def best_way(self) -> Outcome | None:
        """Torch's fastest right way."""
        right = [way for way in self.ways if way.state == "right"]
        return min(right, key=lambda way: way.seconds or math.inf, default=None)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        regret = None if data["regret"] is None else Regret.from_json(data["regret"])
        ways = tuple(map(Outcome.from_json, data["ways"]))
        return cls(**{**data, "autojac": Outcome.from_json(data["autojac"]), "ways": ways, "regret": regret})


@dataclass(frozen=True)
class Figure:
    """A number that was promised.

    Attributes:
        what: human-readable.
        value: as it was measured.
        bound: what it is to stay below.
    """

    what: str
    value: float
    bound: float

    @classmethod
    def over(cls, outcome: Outcome, base: Outcome, bound: float) -> Self:
        """Return one outcome as a multiple of another; infinite where either has no time."""
        found = ratio(outcome, base)
        return cls(f"{outcome.name} over {base.name}", math.inf if found is None else found, bound)


@dataclass(frozen=True)
class Promised:
    """A part of the benchmark of which figures were promised.

    Attributes:
        name: the function, or what was measured.
        outcomes: how each way fared, interleaved in one run.
        figures: what was promised of it.
        facts: plans, colors, entries, and what was timed apart.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    figures: tuple[Figure, ...]
    facts: dict[str, str | float]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        outcomes = tuple(map(Outcome.from_json, data["outcomes"]))
        return cls(data["name"], outcomes, tuple(Figure(**figure) for figure in data["figures"]), data["facts"])


@dataclass(frozen=True)
class Startup:
    """Fresh processes.

    Attributes:
        first_seconds: from after the imports to the first Jacobian, warm store, one for each process.
        source: where the plan came from.
        loaded: which of the modules that this path must do without were loaded all the same.
        torch_seconds, autojac_seconds: `import torch` and `import autojac`, alternating.
    """

    first_seconds: tuple[float, ...]
    source: str
    loaded: tuple[str, ...]
    torch_seconds: tuple[float, ...]
    autojac_seconds: tuple[float, ...]

    @property
    def import_ratio(self) -> float:
        """`import autojac` over `import torch`."""
        return statistics.median(self.autojac_seconds) / statistics.median(self.torch_seconds)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class Report:
    """One run of the benchmark.

    Attributes:
        environment: versions, threads, capability.
        settings: effort, rounds, budget.
        races: one a workload.
        overhead_seconds: what `jac(x)` adds to its bare method, for the sin workload.
        startup: fresh processes.
        zeros: one for each function whose zeros were put to use.
        contests: replays against torch's default, any plan against jitted JAX, and against torch's ways on other
            libraries' models: one a workload and rival.
        costs: what replays cost beside their operators, and what other libraries' models give together.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    races: tuple[Race, ...]
    overhead_seconds: float | None = None
    startup: Startup | None = None
    zeros: tuple[Promised, ...] = ()
    contests: tuple[Promised, ...] = ()
    costs: tuple[Promised, ...] = ()

    @property
    def mean_speedup(self) -> float | None:
        """Geometric mean of torch's default over autojac on the dense workloads."""
        speedups = [race.speedup for race in self.races if race.kind == "dense"]
        return statistics.geometric_mean(s for s in speedups if s) if any(speedups) else None

    @property
    def worst_race(self) -> Race | None:
        """The workload on which autojac gains least."""
        return min((race for race in self.races if race.speedup), key=lambda race: race.speedup or 0, default=None)

    def to_json(self) -> dict[str, Any]:
        """Everything measured, and the figures that follow from it."""
        return {**dataclasses.asdict(self), "figures": self.figures()}

    def figures(self) -> dict[str, float | None]:
        """Return the few numbers that the rest is there for."""
        regrets = [race.regret.ratio for race in self.races if race.regret]
        worst = self.worst_race
        return {
            "geometric_mean_speedup_dense": self.mean_speedup,
            "worst_tuned_over_default": 1 / worst.speedup if worst and worst.speedup else None,
            "regret_median": statistics.median(regrets) if regrets else None,
            "regret_worst": max(regrets, default=None),
            "overhead_seconds": self.overhead_seconds,
            "first_jacobian_seconds": statistics.median(self.startup.first_seconds) if self.startup else None,
            "import_ratio": self.startup.import_ratio if self.startup else None,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        startup = None if data["startup"] is None else Startup.from_json(data["startup"])
        races = tuple(map(Race.from_json, data["races"]))
        parts = {name: tuple(map(Promised.from_json, data[name])) for name in ("zeros", "contests", "costs")}
        return cls(data["environment"], data["settings"], races, data["overhead_seconds"], startup, **parts)
