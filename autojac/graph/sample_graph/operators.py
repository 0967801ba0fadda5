"""What operators that move or mix slices along a tracked axis do to the samples behind them.

No operator that merely moves entries needs a rule: it is run on a tensor that holds, in the place of each entry, the
number of its slice. Indices and masks are constants of the call; where they depend on its inputs nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autojac.graph.batch_axis.rules import rule_of
from autojac.graph.batch_axis.states import BatchAxis, BatchAxisLost, RuleContext
from autojac.graph.ir import Graph, Operation, Value
from autojac.graph.operator_facts import Kind, facts_of
from autojac.graph.sample_graph.slices import MOST_SLICES, SliceSamples, stacked

aten = torch.ops.aten


class SampleContext:
    """One operator, with what stands behind its arguments.

    Args:
        graph, operation: the operator.
        reached: for each argument that reads samples, by number, which.
        fixed: gives the value of a tensor that reads no sample.

    Attributes:
        selectors: tensors whose values decided what is read.
        wandering: what is read depends on the values of samples.
    """

    def __init__(
        self, graph: Graph, operation: Operation, reached: Mapping[int, SliceSamples], fixed: Callable[[int], Tensor]
    ) -> None:
        self.graph = graph
        self.operation = operation
        self.reached = reached
        self.fixed = fixed
        self.facts = facts_of(operation.target)
        self.call = RuleContext(graph, operation, {}, 0)
        self.outputs = [number for number in operation.outputs if number is not None]
        self.selectors: set[int] = set()
        self.wandering = False

    @property
    def name(self) -> str:
        return self.operation.name

    def shape(self, number: int) -> tuple[int, ...]:
        return self.graph.shapes[number]

    def select(self, *names: str) -> bool:
        """Check whether the arguments that say where entries go are constants; they are noted."""
        chosen = {number for name in names for number in numbers_in(self.call.arguments.get(name))}
        if not chosen.isdisjoint(self.reached):
            self.wandering = True
            return False
        self.selectors |= chosen
        return True

    def kept(self, number: int, axis: int) -> list[int | None]:
        """For each output the axis whose slice j reads slice j of an argument's axis, and no other."""
        length = self.shape(number)[axis]
        alone: dict[int, Any] = {number: BatchAxis(axis)}
        together: dict[int, Any] = {y: BatchAxis(axis) for y, reach in self.reached.items() if axis in reach.axes}
        for states in (alone, together):
            if number not in states or any(self.shape(other)[axis] != length for other in states):
                continue
            try:
                made = rule_of(self.operation)(RuleContext(self.graph, self.operation, states, length))
            except BatchAxisLost:
                continue
            each = made if isinstance(made, list) else [made] * len(self.operation.outputs)
            pairs = zip(self.operation.outputs, each, strict=False)
            return [self._axis(y, state, length) for y, state in pairs if y is not None]
        return [None] * len(self.outputs)

    def _axis(self, number: int, state: object, length: int) -> int | None:
        if not isinstance(state, BatchAxis) or (state.outer, state.inner) != (1, 1):
            return None
        shape = self.shape(number)
        return state.axis if state.axis < len(shape) and shape[state.axis] == length else None


def moved(context: SampleContext) -> list[SliceSamples | None] | None:
    """Operators that move entries; None if it is none, or moves them by what samples say."""
    name, call = context.name, context.call
    facts = context.facts
    if not facts.moves_entries or not context.select(*facts.selectors):
        return None
    sources = {
        number
        for argument, value in call.arguments.items()
        if argument not in facts.selectors
        for number in numbers_in(value)
    }
    narrow = _narrowed(context, sources) if facts.kind is not Kind.POINTWISE else {}
    if any(_size(context.shape(y), set(narrow.values())) > MOST_SLICES for y in context.outputs):
        return None
    offsets: dict[int, int] = {}
    total = 0
    for number in context.reached:
        offsets[number] = total
        total += context.reached[number].slices

    def numbered(number: int, selector: bool) -> Tensor:
        if selector:
            value = context.fixed(number)
            if name == "gather":
                for axis in narrow:
                    value = value.narrow(axis, 0, 1)
            return value.cpu()
        shape = [1 if axis in narrow else size for axis, size in enumerate(context.shape(number))]
        if number not in offsets:
            return torch.zeros(shape, dtype=torch.float64)
        # 0 is what pads and fills, and reads nothing; doubles are exact and every operator takes them
        rows = context.reached[number].numbers(len(shape)) + (offsets[number] + 1)
        return torch.from_numpy(np.asarray(rows, dtype=np.float64)).expand(shape)

    given = {
        argument: _replaced(value, numbered, argument in facts.selectors) for argument, value in call.arguments.items()
    }
    for argument in facts.fillers:
        if not isinstance(call.arguments[argument], Value):
            given[argument] = 0
    made = _called(context.operation, given)
    parts = made if isinstance(made, (tuple, list)) else (made,)
    rows = stacked(list(context.reached.values()))
    whole = SliceSamples((), (), rows)
    return [_read(part, whole) for part in parts if part is not None]


def _read(part: Tensor, whole: SliceSamples) -> SliceSamples:
    """Return the slices of a tensor of numbers, told apart along the axes on which they differ."""
    if not part.numel():
        return SliceSamples.nothing(whole.samples.shape[1])
    rows = part.long().numpy() - 1
    axes = []
    for axis, size in enumerate(rows.shape):
        if size > 1:
            first = rows.take([0], axis)
            if (rows == first).all():
                rows = first
            else:
                axes.append(axis)
    return whole.taken(rows.ravel(), axes, [rows.shape[axis] for axis in axes])


def _narrowed(context: SampleContext, sources: set[int]) -> dict[int, int]:
    """Axes that an operator leaves alone and along which nothing is told apart, with their places in the output."""
    dims = {len(context.shape(number)) for number in sources}
    if len(dims) != 1:
        return {}
    found = {}
    for axis in range(dims.pop()):
        sizes = {context.shape(number)[axis] for number in sources}
        if len(sizes) != 1 or sizes == {1} or any(axis in reach.axes for reach in context.reached.values()):
            continue
        places = {place for number in sources for place in context.kept(number, axis)}
        place = places.pop() if len(places) == 1 else None
        if place is not None and (context.name != "gather" or is_uniform(context, axis)):
            found[axis] = place
    return found


def is_uniform(context: SampleContext, axis: int) -> bool:
    """Check whether an index is the same all along an axis."""
    (number,) = numbers_in(context.call["index"])
    index = context.fixed(number)
    return index.shape[axis] > 0 and bool((index == index.narrow(axis, 0, 1)).all())


def numbers_in(value: Any) -> Iterator[int]:
    """Return the tensors in an argument."""
    if isinstance(value, Value):
        yield value.number
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from numbers_in(part)


def _replaced(value: Any, by: Callable[[int, bool], Tensor], selector: bool) -> Any:
    if isinstance(value, Value):
        return by(value.number, selector)
    if isinstance(value, (tuple, list)):
        return [_replaced(part, by, selector) for part in value]
    return value


def _called(operation: Operation, given: Mapping[str, Any]) -> Any:
    """An operator with its arguments by name."""
    positional, named = [], {}
    for argument in operation.target._schema.arguments:
        if argument.kwarg_only:
            if argument.name in operation.kwargs:
                named[argument.name] = given[argument.name]
        elif argument.name in given:
            positional.append(given[argument.name])
    return operation.target(*positional, **named)


def _size(shape: Sequence[int], narrow: set[int]) -> int:
    return math.prod(size for axis, size in enumerate(shape) if axis not in narrow)
