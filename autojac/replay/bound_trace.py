"""A trace bound to the tensors that it reads besides the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from autojac.replay.hoisting import HoistedInputs
from autojac.replay.outcomes import same_values
from autojac.replay.trace import Trace


@dataclass(frozen=True, slots=True)
class BoundTrace:
    """A trace bound to the tensors that it reads besides the arguments, for one state of the function.

    Attributes:
        trace: the programs.
        captured: the tensors.
        argument_count: how many tensors a call passes.
        version: the count of changes of the function's state when it was bound.
        state: the number of the state that was traced.
        is_unchanged: checks whether what the function reads is as it was then.
        read: tensors whose values Python has read, each with these values.
        hoisted: returns the captured tensors and what is computed from them alone; None where nothing is hoisted.
    """

    trace: Trace
    captured: tuple[Tensor, ...]
    argument_count: int
    version: int
    state: int
    is_unchanged: Callable[[], bool]
    read: tuple[tuple[Tensor, Tensor], ...] = ()
    hoisted: HoistedInputs | None = None

    @property
    def reads_the_same(self) -> bool:
        """Whether Python would read the same values of tensors as it did."""
        return not self.read or all(same_values(tensor, values) for tensor, values in self.read)
