"""What is known of the batch axis of one tensor, and what a rule gets to find it for the next."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from autojac.graph.ir import Graph, Operation, Value


class BatchAxis(NamedTuple):
    """Axis `axis` runs over samples: entry j belongs to sample (j // inner) % B, with `outer` turns of the batch."""

    axis: int
    outer: int = 1
    inner: int = 1


SHARED: Literal["shared"] = "shared"
State = BatchAxis | Literal["shared"] | None


class BatchAxisLost(Exception):
    """The batch axis can't be followed through an operator; says why."""


class Meets(BatchAxisLost):
    """An operator reads several samples for one result, whatever comes of it."""


class RuleContext:
    """One operator with the states of the tensors that it reads."""

    def __init__(self, graph: Graph, operation: Operation, states: Mapping[int, State], batch: int) -> None:
        self.graph = graph
        self.operation = operation
        self.states = states
        self.batch = batch

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, defaults included."""
        schema = self.operation.target._schema.arguments
        given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        given |= {argument.name: value for argument, value in zip(schema, self.operation.args, strict=False)}
        return given | dict(self.operation.kwargs)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def state(self, value: Any) -> State:
        return self.states.get(value.number) if isinstance(value, Value) else None

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.graph.shapes[value.number]

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the first output."""
        first = next(number for number in self.operation.outputs if number is not None)
        return self.graph.shapes[first]

    def carried(self) -> list[tuple[Value, BatchAxis]]:
        """Return the tensors that carry the batch."""
        found = []
        for number in dict.fromkeys(self.operation.sources):
            state = self.states.get(number)
            if isinstance(state, BatchAxis):
                found.append((Value(number), state))
        return found

    def only(self) -> tuple[tuple[int, ...], BatchAxis]:
        """Shape and state of the one tensor that carries the batch, which must be the first argument."""
        carried = self.carried()
        if len(carried) != 1 or self.operation.args[0] != carried[0][0]:
            raise BatchAxisLost("several tensors carry the batch into it")
        return self.shape(carried[0][0]), carried[0][1]

    def axes(self, name: str, dims: int) -> set[int]:
        """A `dim` argument as a set of axes from the front; all where it names none."""
        given = self.arguments.get(name)
        if given is None or (isinstance(given, (list, tuple)) and not given):
            return set(range(dims))
        return {axis % dims for axis in (given if isinstance(given, (list, tuple)) else [given])}


def regrouped(state: BatchAxis, before: Sequence[int], after: Sequence[int], batch: int) -> BatchAxis:
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
