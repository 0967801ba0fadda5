"""A plan: the method expression that won a search, with what was measured on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from autojac.core.pattern import Pattern
from autojac.core.structure import Structure
from autojac.errors import require_choice

Effort = Literal["estimate", "quick", "measure", "exhaustive"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
NOT_TRIED = "not tried yet"
"""The reason of candidates that were left for later."""
TrialState = Literal["complete", "pruned", "infeasible", "rejected", "unsupported", "skipped"]


def effort_rank(effort: str) -> int:
    """Return the position of an effort in the order estimate < quick < measure < exhaustive."""
    require_choice("effort", effort, EFFORTS)
    return EFFORTS.index(effort)


def expression(spec: dict[str, Any]) -> str:
    """Return a method's spec in human-readable form: `batch_chunk(pull(shared, vmap, chunk=16), size=8192)`."""
    fields = [
        expression(value) if isinstance(value, dict) else f"{name}={value}"
        for name, value in spec.items()
        if name != "method" and value is not None
    ]
    return f"{spec['method']}({', '.join(fields)})"


@dataclass(frozen=True)
class Trial:
    """One candidate's fate in a search.

    Attributes:
        method: the candidate's JSON spec.
        state: `complete` (timed), `pruned` (hopelessly slow), `infeasible` (memory, operator or compiler
            failure), `rejected` (wrong numbers), `unsupported` (does not apply) or `skipped` (no budget left).
        seconds: time of one call, by the lower quartile of several timings.
        dispersion: relative spread of the timings (interquartile range over median).
        memory_bytes: peak bytes allocated by one call on top of what was allocated before.
        reason: why it is not `complete`, as a sentence.
        predicted: seconds of one call by the cost model.
    """

    method: dict[str, Any]
    state: TrialState
    seconds: float | None = None
    dispersion: float | None = None
    memory_bytes: int | None = None
    reason: str | None = None
    predicted: float | None = None

    @property
    def is_timed(self) -> bool:
        """Whether it was right, and timed to the end."""
        return self.state == "complete" and self.seconds is not None

    @property
    def is_untried(self) -> bool:
        """Whether it was left for later."""
        return self.state == "skipped" and self.reason == NOT_TRIED

    def to_json(self) -> dict[str, Any]:
        # JSON has no nan and no infinity
        seconds = self.seconds if self.seconds is not None and math.isfinite(self.seconds) else None
        return {**vars(self), "seconds": seconds}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trial:
        return cls(**data)


@dataclass(frozen=True)
class Plan:
    """How the Jacobian of one signature is computed on one device.

    Attributes:
        method: JSON spec of the winning method expression.
        structure: the structure that the method relies on.
        batched: for each tensor of the positional arguments, whether its axis 0 runs over samples.
        effort: how hard the search was.
        seconds: time of one call in the last comparison; None if nothing was timed.
        default_seconds: the same for torch's default method.
        memory_bytes: peak bytes of one call, if measured.
        tuning_seconds: what probing and searching cost.
        source: where the plan came from in this process: `search`, `estimate`, `store` or `neighbour`.
        trials: every candidate's fate; empty when the plan was loaded without them.
        finished: whether the search came to its end; later ones continue those that did not.
        jitter: spread of the timings in the last comparison, relative: smaller differences say nothing.
    """

    method: dict[str, Any]
    structure: Structure
    batched: tuple[bool, ...]
    effort: Effort
    seconds: float | None = None
    default_seconds: float | None = None
    memory_bytes: int | None = None
    tuning_seconds: float = 0.0
    source: str = "search"
    trials: tuple[Trial, ...] = ()
    finished: bool = True
    jitter: float | None = None

    def __str__(self) -> str:
        return expression(self.method)

    def __repr__(self) -> str:
        timed = "" if self.seconds is None else f", {self.seconds:.3g} s"
        return f"Plan({self}, {self.structure!r}, effort={self.effort!r}, source={self.source!r}{timed})"

    def to_json(self) -> dict[str, Any]:
        """Return everything but `trials` and `source`, as plain JSON types."""
        data = {name: value for name, value in vars(self).items() if name not in ("source", "trials")}
        return {**data, "structure": self.structure.to_json(), "batched": list(self.batched)}

    @classmethod
    def from_json(
        cls,
        data: dict[str, Any],
        source: str = "store",
        trials: tuple[Trial, ...] = (),
        patterns: Callable[[str], Pattern] | None = None,
    ) -> Plan:
        """Return the plan that gave this JSON; `patterns` gives the patterns that its structure names."""
        structure = Structure.from_json(data["structure"], patterns)
        fields = {**data, "structure": structure, "batched": tuple(data["batched"])}
        effort_rank(fields["effort"])
        return cls(**fields, source=source, trials=trials)
