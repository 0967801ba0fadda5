"""What a machine takes for operators, bytes and flops: the constants of the cost model, measured or guessed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from autojac.graph.work import Work

SIZES = (2**16, 2**21, 2**26)
"""Bytes that a single operator moves where the rate is known: within the caches nearest to a core, and beyond all."""


@dataclass(frozen=True)
class Machine:
    """What things take on one machine, in seconds of one thread of the host where they are per operator.

    Attributes:
        plain_s: an operator without a gradient: what a flat program takes.
        recorded_s: an operator that autograd records.
        pulled_s: its VJP.
        batched_s: the same under torch.func.vmap, and what each transform around an operator adds.
        dual_s: an operator on dual numbers.
        rates: bytes per second of operators that move `SIZES`.
        flops_per_s: of a product of matrices.
        largest: bytes of the largest operator whose rate was measured; those of larger ones are guessed from it.
        corrections: how many times longer than predicted methods took, by their kinds; "" stands for all others.

    The default constants are those of a server's core, of 2023.
    """

    plain_s: float = 3e-6
    recorded_s: float = 4e-6
    pulled_s: float = 4e-6
    batched_s: float = 2.0e-5
    dual_s: float = 9e-5
    rates: tuple[float, ...] = (6e10, 2.5e10, 5e9)
    flops_per_s: float = 6e10
    largest: float = float(SIZES[-1])
    corrections: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    def host_only(self) -> Machine:
        """Return the machine without what autograd and torch.func add to operators: as flat programs see it."""
        plain = self.plain_s
        return dataclasses.replace(self, recorded_s=plain, pulled_s=plain, batched_s=plain, dual_s=plain)

    def seconds(self, work: Work, times: float = 1.0) -> float:
        """Return what work takes beyond its dispatch, each operator on so many times its bytes."""
        moved = sum(times * total / self.rate(times * 2.0**size) for size, total in work.moved.items())
        return moved + times * work.flops / self.flops_per_s

    def moving(self, size: float) -> float:
        """Return what a copy that moves so many bytes takes."""
        return size / self.rate(size)

    def rate(self, size: float) -> float:
        """Return the bytes per second of an operator that moves so many, between sizes by the logarithm of either."""
        place = (math.log2(max(size, 1.0)) - math.log2(SIZES[0])) / (math.log2(SIZES[1]) - math.log2(SIZES[0]))
        place = min(max(place, 0.0), len(SIZES) - 1.0)
        before = min(int(place), len(SIZES) - 2)
        share = place - before
        return float(self.rates[before] ** (1 - share) * self.rates[before + 1] ** share)

    def has_measured(self, size: float) -> bool:
        """Check whether nothing is guessed about operators that move so many bytes."""
        return min(size, SIZES[-1]) <= self.largest

    def correction(self, kind: str) -> float:
        """Return how many times longer than predicted methods of a kind take, as far as is known."""
        return self.corrections.get(kind, self.corrections.get("", 1.0))

    def to_json(self) -> dict[str, Any]:
        """Return what was measured, without the corrections, as plain JSON types."""
        fields = dataclasses.asdict(dataclasses.replace(self, corrections={}))
        del fields["corrections"]
        return {**fields, "rates": list(self.rates)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self | None:
        """Return the machine that was measured; None where something else than this version measures was."""
        names = {field.name for field in dataclasses.fields(cls)} - {"corrections"}
        rates = data.get("rates")
        if set(data) != names or not isinstance(rates, list) or len(rates) != len(SIZES):
            return None
        values = [*rates, *(data[name] for name in names - {"rates"})]
        if not all(isinstance(value, float) and 0 < value < math.inf for value in values):
            return None
        return cls(**{**data, "rates": tuple(rates)})


DEFAULT = Machine()
"""What is taken for granted until a machine was measured."""
