"""A trace bound to the tensors that it reads besides the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from autojac.replay.hoisting import Kept
from autojac.replay.outcomes import same_values
from autojac.replay.trace import Trace


@dataclass(frozen=True, slots=True)
class BoundTrace:
    """A trace bound to the tensors that it reads besides the arguments, for one state of the function.

    Attributes:
        trace: the programs.
        captured: the tensors.
        given: how many tensors a call brings.
        version: the count of changes of the function's state when it was bound.
        state: the number of the state that was traced.
        unchanged: checks whether what the function reads is as it was then.
        read: tensors whose values Python has read, each with these values.
        kept: returns the captured tensors with values that are reused from call to call; None where there are none.
    """

    trace: Trace
    captured: tuple[Tensor, ...]
    given: int
    version: int
    state: int
    unchanged: Callable[[], bool]
    read: tuple[tuple[Tensor, Tensor], ...] = ()
    kept: Kept | None = None

    @property
    def reads_the_same(self) -> bool:
        """Whether Python would read the same values of tensors as it did."""
        return not self.read or all(same_values(tensor, values) for tensor, values in self.read)
