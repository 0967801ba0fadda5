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
from autojac.graph.operator_facts import Axes, Kind, facts_of
from autojac.graph.sample_graph.slices import MOST_SLICES, MOST_WORK, SliceSamples, TooDense, incidence, stacked, united

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
        """Whether the arguments that say where entries go are constants; they are noted."""
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
    """The slices of a tensor of numbers, told apart along the axes on which they differ."""
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
        if place is not None and (context.name != "gather" or _uniform(context, axis)):
            found[axis] = place
    return found


def _uniform(context: SampleContext, axis: int) -> bool:
    """Whether an index is the same all along an axis."""
    (number,) = numbers_in(context.call["index"])
    index = context.fixed(number)
    return index.shape[axis] > 0 and bool((index == index.narrow(axis, 0, 1)).all())


def scattered(context: SampleContext) -> list[SliceSamples | None] | None:
    """Operators that bring entries to indexed places, where they are added or replace what was there."""
    facts, call = context.facts, context.call
    if facts.kind is not Kind.SCATTER or not context.select(*facts.selectors):
        return None
    (target,) = numbers_in(call["self"])
    shape, dims = context.shape(target), len(context.shape(target))
    brought = next(numbers_in(call.arguments.get(facts.source)), -1)
    parts = [context.reached[number] for number in (target, brought) if number in context.reached]
    # counted from the end, where the axes of target and source agree
    tracked = {axis - len(context.shape(target)) for axis in (parts[0].axes if target in context.reached else ())}
    if brought in context.reached:
        tracked |= {axis - len(context.shape(brought)) for axis in context.reached[brought].axes}
    if "indices" in facts.selectors:
        used = [axis for axis, index in enumerate(call["indices"]) if index is not None]
        alone = {axis - dims for axis in range(used[-1] + 1, dims)} if used == list(range(len(used))) else set()
        pick: Callable[[Tensor], Tensor] = lambda places: aten.index.Tensor(places, _values(context, call["indices"]))  # noqa: E731
    else:
        (number,) = numbers_in(call["index"])
        index = context.fixed(number).cpu()
        axis = call["dim"] % max(dims, 1)
        alone = {other - dims for other in range(dims) if other != axis}
        if facts.axes is Axes.INDEXED:
            alone = {other for other in alone if _uniform(context, other)}
            for other in alone - tracked:
                index = index.narrow(other, 0, 1)
            pick = lambda places: places.gather(axis, index)  # noqa: E731
        else:
            pick = lambda places: places.index_select(axis, index)  # noqa: E731
    narrow = alone - tracked
    axes = [axis for axis in range(dims) if axis - dims not in narrow and shape[axis] > 1]
    sizes = [shape[axis] for axis in axes]
    if math.prod(sizes) > MOST_SLICES:
        raise TooDense
    places = torch.arange(math.prod(sizes)).reshape([shape[a] if a in axes else 1 for a in range(dims)])
    found = [context.reached[target].spread_over(axes, sizes)] if target in context.reached else []
    if brought in context.reached:
        into = pick(places)
        reach = context.reached[brought]
        own = torch.from_numpy(reach.numbers(len(context.shape(brought))))
        full = [1 if axis - own.dim() in narrow else size for axis, size in enumerate(context.shape(brought))]
        own = own.expand(full)
        if facts.axes is Axes.INDEXED:
            own = own[tuple(slice(size) for size in into.shape)]
        pairs = torch.broadcast_tensors(into, own)
        if pairs[0].numel() > MOST_WORK:
            raise TooDense
        rows, columns = (pair.reshape(-1).numpy() for pair in pairs)
        found.append(reach.mixed(incidence(rows, columns, math.prod(sizes), reach.slices), axes, sizes))
    return [united(found)]


def windowed(context: SampleContext) -> list[SliceSamples | None] | None:
    """Convolution and pooling along a tracked axis: each slice of the output reads a window."""
    call, facts = context.call, context.facts
    number = context.operation.sources[0]
    if number not in context.reached or facts.kind not in (Kind.WINDOW, Kind.CONVOLUTION):
        return None
    reach, shape, out = context.reached[number], context.shape(number), context.shape(context.outputs[0])
    if facts.kind is Kind.CONVOLUTION:
        if call.operation.args[0] != Value(number) or list(context.reached) != [number] or len(out) != len(shape):
            return None
        (weight,) = numbers_in(call["weight"])
        kernel, first = context.shape(weight)[2:], 2
        reach = reach.without([axis for axis in reach.axes if axis == 1])
    else:
        kernel, first = call["kernel_size"], len(shape) - facts.window_axes
    transposed = bool(call.arguments.get("transposed"))
    count = len(shape) - first
    sizes = [_each(given, count) for given in (kernel, call["stride"] or kernel, call["padding"])]
    dilation = _each(call.arguments.get("dilation") or 1, count)
    for place, (size, stride, padding, gap) in enumerate(zip(*sizes, dilation, strict=True)):
        axis = first + place
        if axis not in reach.axes:
            continue
        long, short = (out[axis], shape[axis]) if transposed else (shape[axis], out[axis])
        position = np.arange(short)[:, None] * stride - padding + np.arange(size)[None] * gap
        inside = (position >= 0) & (position < long)
        pair = np.broadcast_to(np.arange(short)[:, None], position.shape)[inside], position[inside]
        reach = _along(reach, axis, *(reversed(pair) if transposed else pair), length=out[axis])
    return [reach] * len(context.outputs)


def multiplied(context: SampleContext) -> list[SliceSamples | None] | None:
    """Products with a constant sparse matrix, whose entries tell which slices are read."""
    if context.facts.kind is not Kind.PRODUCT or context.facts.factors is None:
        return None
    left, right = (next(numbers_in(context.call.arguments.get(name)), -1) for name in context.facts.factors)
    if left < 0 or left in context.reached or right not in context.reached or 0 not in context.reached[right].axes:
        return None
    matrix = context.fixed(left)
    if matrix.layout == torch.strided or matrix.dim() != 2:
        return None
    context.selectors.add(left)
    rows, columns = matrix.detach().to_sparse_coo().coalesce().indices().cpu().numpy()
    found = [_along(context.reached[right], 0, rows, columns, length=matrix.shape[0])]
    if context.facts.addend:
        (added,) = numbers_in(context.call[context.facts.addend])
        if added in context.reached:
            behind = len(context.shape(context.outputs[0])) - len(context.shape(added))
            reach = context.reached[added]
            found.append(reach.placed({axis: axis + behind for axis in reach.axes}))
    return [united(found)]


def _along(reach: SliceSamples, axis: int, rows: Any, columns: Any, *, length: int) -> SliceSamples:
    """Slices along one axis mixed: slice `rows[e]` reads slice `columns[e]`, the other axes stay."""
    place = reach.axes.index(axis)
    before, behind = math.prod(reach.sizes[:place]), math.prod(reach.sizes[place + 1 :])
    if before * behind * len(rows) > MOST_WORK:
        raise TooDense
    old, outer, inner = reach.sizes[place], np.arange(before)[:, None, None], np.arange(behind)[None, None]
    into = ((outer * length + rows[None, :, None]) * behind + inner).ravel()
    read = ((outer * old + columns[None, :, None]) * behind + inner).ravel()
    sizes = (*reach.sizes[:place], length, *reach.sizes[place + 1 :])
    mixed = reach.mixed(incidence(into, read, math.prod(sizes), reach.slices), reach.axes, sizes)
    # a length of one tells nothing apart
    kept = [(a, size) for a, size in zip(mixed.axes, sizes, strict=True) if size > 1]
    return SliceSamples(tuple(a for a, _ in kept), tuple(size for _, size in kept), mixed.samples)


def numbers_in(value: Any) -> Iterator[int]:
    """The tensors in an argument."""
    if isinstance(value, Value):
        yield value.number
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from numbers_in(part)


def _values(context: SampleContext, indices: Sequence[Any]) -> list[Tensor | None]:
    return [None if index is None else context.fixed(index.number).cpu() for index in indices]


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


def _each(given: Any, count: int) -> list[int]:
    """A size for each axis, from one for all or from a list."""
    sizes = list(given) if isinstance(given, (tuple, list)) else [given]
    return sizes * count if len(sizes) == 1 else sizes
