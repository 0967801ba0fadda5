"""How far planning has come for each kind of training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from autojac.core.call import describe
from autojac.core.signature import Signature

MOST_KINDS = 256
"""Maximum number of kinds of steps whose progress is kept: a counter among the arguments makes one per step."""
MOST_REFUSALS = 4
"""How often the whole step is planned again after a change of the model; one that changes all the time is not."""


@dataclass
class Progress:
    """How far planning has come for steps with arguments of the same kind.

    Attributes:
        steps: how many were planned.
        is_whole: steps are computed by the plan for the whole step: a program, or a provisional plan made where nothing
            could be verified.
        signature: of that plan; other flags of the model have another.
        refused: why there is no program of the whole step; empty if there may be one.
        refused_at: version of the model's state after the step that was refused; the whole step is planned again once
            it changes.
        refusals: how often it was refused.
        separate_s: by the signature of the plan for the whole step, seconds of the fastest step that was computed as
            derivatives and a backward.
    """

    steps: int = 0
    is_whole: bool = False
    signature: Signature | None = None
    refused: str = ""
    refused_at: int | None = None
    refusals: int = 0
    separate_s: dict[Signature, float] = field(default_factory=dict)

    def refuse(self, reason: str) -> None:
        """Compute steps as derivatives and a backward until the model changes."""
        self.is_whole, self.refused, self.refused_at = False, reason, None
        self.refusals += 1

    def reconsider(self, version: int) -> bool:
        """Return whether there may be a program of the whole step: again, if the model has changed since a refusal."""
        if self.refused and self.refused_at != version and self.refusals < MOST_REFUSALS:
            self.refused = ""
        return not self.refused

    def fastest_separate_s(self, signature: Signature) -> float:
        """Return the seconds of the fastest step by derivatives and a backward; infinite if there was none."""
        return self.separate_s.get(signature, math.inf)

    def time_separate(self, signature: Signature, seconds: float) -> None:
        """Record the seconds of a step by derivatives and a backward."""
        self.separate_s[signature] = min(seconds, self.fastest_separate_s(signature))


class ProgressByKind:
    """The progress of steps by the kind of their arguments: shapes and types of tensors, values of all else."""

    def __init__(self) -> None:
        self._by_kind: dict[Any, Progress] = {}

    def __len__(self) -> int:
        return len(self._by_kind)

    def of(self, args: Sequence[Any]) -> Progress:
        """Return the progress of steps with arguments like these."""
        kind = _kind(args)
        progress = self._by_kind.get(kind)
        if progress is None:
            if len(self._by_kind) >= MOST_KINDS:
                del self._by_kind[next(iter(self._by_kind))]
            progress = self._by_kind[kind] = Progress()
        return progress

    def forget(self, args: Sequence[Any]) -> None:
        """Start again with steps with arguments like these."""
        self._by_kind.pop(_kind(args), None)

    def clear(self) -> None:
        """Start again with all steps."""
        self._by_kind.clear()


def _kind(args: Sequence[Any]) -> Any:
    if all(type(x) is Tensor and not x.is_nested for x in args):
        return tuple([(x.shape, x.dtype, x.device) for x in args])
    return tuple(map(str, map(describe, args)))
