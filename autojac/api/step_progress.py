"""How far planning has come for each kind of training step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autojac.core.call import describe
from autojac.core.signature import Signature
from autojac.planning.explain import format_seconds
from autojac.planning.pinned_plans import pinned_store
from autojac.planning.search import measure

MOST_KINDS = 256
"""Maximum number of kinds of steps whose progress is kept: a counter among the arguments makes one per step."""
MOST_REFUSALS = 4
"""How often the whole step is planned again after a change of the model; one that changes all the time is not."""
ROUNDS = 6
"""How many steps of each way a duel takes; the first of each may make and check plans, and does not count."""
CLEARLY = 0.9
"""Derivatives and a backward must take less than this share of the program's time to replace it: a search has seen the
program win already."""

Step = Callable[[], Tensor]
Program = tuple[Signature, str]
"""What tells one program of a step from another: for what signature, and the expression of its method."""


@dataclass
class Duel:
    """A program of the whole step against derivatives and a backward: real steps are computed by turns, and timed.

    Attributes:
        program: which one.
        whole, separate: seconds of the steps so far, by the program and separately.
    """

    program: Program
    whole: list[float] = field(default_factory=list)
    separate: list[float] = field(default_factory=list)

    def take(self, by_program: Step, separately: Step, device: torch.device) -> Tensor:
        """Compute a step by the way whose turn it is, and time it; one that raises does not count."""
        is_turn_of_program = len(self.whole) <= len(self.separate)
        start = measure.clock.start(device)
        value = by_program() if is_turn_of_program else separately()
        (self.whole if is_turn_of_program else self.separate).append(measure.clock.since(start))
        return value

    @property
    def is_over(self) -> bool:
        """Whether it is known which is faster."""
        return min(len(self.whole), len(self.separate)) >= ROUNDS

    @property
    def verdict(self) -> str:
        """What the program has lost by; empty if it is not slower."""
        pairs = list(zip(self.whole, self.separate, strict=False))[1:]
        whole, separate = map(min, zip(*pairs, strict=True))
        if separate >= whole or statistics.median(s / w for w, s in pairs) >= CLEARLY:
            return ""
        return f"they took {format_seconds(separate)}, the program of the whole step {format_seconds(whole)}"


@dataclass
class Progress:
    """How far planning has come for steps with arguments of the same kind.

    Attributes:
        steps: how many were planned.
        is_whole: steps are computed by the plan for the whole step: a program, or a provisional plan made where nothing
            could be verified.
        duels: of programs that have not been compared with derivatives and a backward yet.
        verdicts: of duels that are over.
        refused: why there is no program of the whole step; empty if there may be one.
        refused_at: version of the model's state after the step that was refused; the whole step is planned again once
            it changes.
        refusals: how often it was refused.
    """

    steps: int = 0
    is_whole: bool = False
    duels: dict[Program, Duel] = field(default_factory=dict)
    verdicts: dict[Program, str] = field(default_factory=dict)
    refused: str = ""
    refused_at: int | None = None
    refusals: int = 0

    def refuse(self, reason: str) -> None:
        """Compute steps as derivatives and a backward until the model changes."""
        self.is_whole, self.refused, self.refused_at = False, reason, None
        self.refusals += 1

    def reconsider(self, version: int) -> bool:
        """Return whether there may be a program of the whole step: again, if the model has changed since a refusal."""
        if self.refused and self.refused_at != version and self.refusals < MOST_REFUSALS:
            self.refused = ""
        return not self.refused

    def duel_of(self, program: Program) -> Duel | None:
        """Return the duel of a program; None once it is over."""
        return None if program in self.verdicts else self.duels.setdefault(program, Duel(program))

    def end(self, duel: Duel) -> None:
        """Remember what a duel has shown."""
        self.verdicts[duel.program] = duel.verdict
        self.duels.pop(duel.program, None)


class ProgressByKind:
    """The progress of steps by the kind of their arguments: shapes and types of tensors, values of all else."""

    def __init__(self) -> None:
        self._by_kind: dict[Any, Progress] = {}

    def __len__(self) -> int:
        return len(self._by_kind)

    def of(self, args: Sequence[Any]) -> Progress:
        """Return the progress of steps with arguments like these.

        While plans are pinned it starts anew: what timings have decided does not hold then.
        """
        kind = _kind(args), pinned_store() is not None
        progress = self._by_kind.get(kind)
        if progress is None:
            if len(self._by_kind) >= MOST_KINDS:
                del self._by_kind[next(iter(self._by_kind))]
            progress = self._by_kind[kind] = Progress()
        return progress

    def forget(self, args: Sequence[Any]) -> None:
        """Start again with steps with arguments like these."""
        for is_pinned in (False, True):
            self._by_kind.pop((_kind(args), is_pinned), None)

    def clear(self) -> None:
        """Start again with all steps."""
        self._by_kind.clear()


def _kind(args: Sequence[Any]) -> Any:
    if all(type(x) is Tensor and not x.is_nested for x in args):
        return tuple([(x.shape, x.dtype, x.device) for x in args])
    return tuple(map(str, map(describe, args)))
