"""What is known of the batch axis of one tensor, and what a rule gets to find it for the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from autojac.graph.ir import BoundOperation, Graph, Operation, Value


class BatchAxis(NamedTuple):
    """Axis `axis` runs over samples: entry j belongs to sample (j // inner) % B, with `outer` turns of the batch."""

    axis: int
    outer: int = 1
    inner: int = 1


SPREAD = BatchAxis(-1)
"""Where samples are told apart by several axes together; see `BatchFlow.together`."""
SHARED: Literal["shared"] = "shared"
State = BatchAxis | Literal["shared"] | None


class BatchAxisLost(Exception):
    """The batch axis can't be followed through an operator; says why."""


class Meets(BatchAxisLost):
    """An operator reads several samples for one result, whatever comes of it."""


class RuleContext(BoundOperation):
    """One operator with the states of the tensors that it reads."""

    def __init__(self, graph: Graph, operation: Operation, states: Mapping[int, State], batch: int) -> None:
        super().__init__(graph, operation)
        self.states = states
        self.batch = batch

    def state(self, value: Any) -> State:
        return self.states.get(value.number) if isinstance(value, Value) else None

    def carriers(self) -> list[tuple[Value, BatchAxis]]:
        """Return the tensors that carry the batch."""
        numbers = dict.fromkeys(self.operation.sources)
        return [(Value(number), state) for number in numbers if isinstance(state := self.states.get(number), BatchAxis)]

    def only(self) -> tuple[tuple[int, ...], BatchAxis]:
        """Return the shape and state of the one tensor that carries the batch, which must be the first argument."""
        carried = self.carriers()
        if len(carried) != 1 or self.operation.args[0] != carried[0][0]:
            raise BatchAxisLost("several tensors carry the batch into it")
        return self.shape(carried[0][0]), carried[0][1]


def regroup(state: BatchAxis, before: Sequence[int], after: Sequence[int], batch: int) -> BatchAxis:
    """Return the batch axis after a view in another shape."""
    behind = state.inner * math.prod(before[state.axis + 1 :])
    for axis, size in enumerate(after):
        stride = math.prod(after[axis + 1 :])
        if 0 < stride <= behind:
            inner, rest = divmod(behind, stride)
            if rest or size % (inner * batch):
                break
            return BatchAxis(axis, size // (inner * batch), inner)
    raise BatchAxisLost("a view takes the batch axis apart")
