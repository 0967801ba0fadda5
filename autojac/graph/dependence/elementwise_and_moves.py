"""Operators that work element by element, or move elements about."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from autojac.graph.dependence.context import Constant, DependenceContext, Result, Unknown
from autojac.graph.dependence.index_sets import MOST_ELEMENTS, IndexSets, compress_index
from autojac.graph.ir import Value
from autojac.graph.operator_kinds import MASKS, MOVING, Axes, Kind
from autojac.torch_internals import OpOverload

WORTH_NARROWING = 1000
"""Elements below which it costs less to move all than to find out along which axes one slice suffices."""


def without_inputs(context: DependenceContext) -> Unknown:
    """Return what follows where no input is read: a product, or what only moves elements, is zero where that is."""
    facts, sources = context.facts, context.operation.sources
    masks = [found for number in sources if (found := context.nonzero(Value(number))) is not None]
    if not facts.keeps_zeros or not masks:
        return Unknown()
    if facts.factors:
        return Unknown(functools.reduce(torch.logical_and, masks).expand(context.out))
    if len(sources) > 1 or context.operation.many:
        return Unknown()
    if facts.kind not in MOVING:
        return Unknown(masks[0])
    if facts.kind is Kind.VIEW:
        return Unknown(masks[0].reshape(context.out))
    return Unknown(_run(context, {sources[0]: masks[0].double()}, fillers=True)[0] != 0)


def pointwise(context: DependenceContext) -> Result:
    """Unite sets element by element; where captured selectors choose among the arguments, move them."""
    chosen = context.selector_numbers()
    if chosen and all(isinstance(context.states[number], Constant) for number in chosen):
        return moving(context)
    total: IndexSets | None = None
    for _, state in context.sets():
        total = context.algebra.union(total, state)
    assert total is not None
    # a product has no derivative where a captured factor is zero
    for number in context.operation.sources if context.facts.factors else ():
        nonzero = context.nonzero(Value(number))
        if nonzero is not None:
            total = IndexSets(total.matrix, torch.where(nonzero, total.index, 0))
    return total


def viewing(context: DependenceContext) -> Result:
    """Keep the order of elements."""
    ((value, state),) = context.sets()
    return context.algebra.reshape(state, context.shape(value), context.out)


def moving(context: DependenceContext) -> Result:
    """Move the numbers of sets as the operator moves elements."""
    context.select([Value(number) for number in context.selector_numbers()])
    sets = context.sets()
    matrix, starts = context.algebra.stack([state for _, state in sets])
    given = {
        value.number: torch.where(state.index > 0, state.index + start, 0) if start else state.index
        for (value, state), start in zip(sets, starts, strict=True)
    }
    return _move(context, matrix, given)


def _move(context: DependenceContext, matrix: Any, given: Mapping[int, Tensor]) -> list[IndexSets]:
    """Return sets whose numbers an operator moves; one slice suffices along axes that it leaves alone."""
    narrow: set[int] = set()
    if context.facts.kind is not Kind.POINTWISE:
        narrow = set() if _is_view(context) else _narrowable_axes(context, given)
        given = {number: index.expand(context.graph.shapes[number]) for number, index in given.items()}
        for axis in narrow:
            given = {number: index.narrow(axis, 0, 1) for number, index in given.items()}
    if not _is_view(context):
        shape, elements = context.graph.shapes[next(iter(given))], sum(index.numel() for index in given.values())
        if context.facts.kind is not Kind.POINTWISE:
            results = sum(math.prod(context.graph.shapes[number]) for number in context.results)
            elements += results // max(math.prod(shape[axis] for axis in narrow), 1)
        context.algebra.spend(elements, MOST_ELEMENTS)
        # every operator takes doubles, and they are exact
        given = {number: index.double() for number, index in given.items()}
    return [IndexSets(matrix, compress_index(part).long()) for part in _run(context, given, narrow)]


def _is_view(context: DependenceContext) -> bool:
    alias = context.operation.target._schema.arguments[0].alias_info
    return alias is not None and not alias.is_write


def _narrowable_axes(context: DependenceContext, given: Mapping[int, Tensor]) -> set[int]:
    """Return axes on which all sets are alike and that an operator leaves alone: one slice along each suffices."""
    chosen = set(context.selector_numbers())
    sources = set(context.operation.sources) - chosen
    shapes = {context.graph.shapes[number] for number in sources}
    dims = {len(shape) for shape in shapes}
    if len(dims) != 1 or max(map(math.prod, shapes)) < WORTH_NARROWING:
        return set()
    found = set()
    for axis in range(dims.pop()):
        sizes = {shape[axis] for shape in shapes}
        if len(sizes) != 1 or sizes == {1} or any(index.shape[axis] > 1 for index in given.values()):
            continue
        places = {place for number in sources for place in context.kept_axis(Value(number), axis)}
        alike = context.facts.axes is not Axes.INDEXED or all(is_uniform(context, n, axis) for n in chosen)
        if len(places) == 1 and None not in places and alike:
            found.add(axis)
    return found


def is_uniform(context: DependenceContext, number: int, axis: int) -> bool:
    """Check whether an index is the same all along an axis, and as long as the result is there."""
    if not isinstance(context.states[number], Constant):
        return False
    index = context.constant(number)
    alike = index.shape[axis] == context.out[axis] > 0
    return alike and bool((index == index.narrow(axis, 0, 1)).all())


def gathering(context: DependenceContext) -> Result:
    """Choose elements by number or by a mask; where numbers may change, any element along their axes is meant."""
    facts, value = context.facts, context.operation.args[0]
    (chosen,) = (context[name] for name in facts.selectors)
    if context.select(chosen):
        return moving(context)
    state = context.state(value)
    if not isinstance(state, IndexSets) or len(context.sets()) > 1:
        return None
    dims = state.index.dim()
    if not isinstance(chosen, Value):
        parts = [(axis, part) for axis, part in enumerate(chosen) if part is not None]
        if any(context.graph.dtypes[part.number] in MASKS for _, part in parts):
            return None
        return _anywhere(context, value, state, [axis for axis, part in parts if not context.select(part)])
    axis = context[facts.along] % max(dims, 1) if isinstance(facts.along, str) else facts.along
    return None if dims == 0 or axis is None else _anywhere(context, value, state, [axis])


def _anywhere(context: DependenceContext, value: Value, state: IndexSets, axes: Collection[int]) -> list[IndexSets]:
    """Join sets along some axes where elements are chosen by numbers that may be any: any number may be meant."""
    mixed = context.unite_along(state, list(axes))
    return _move(context, mixed.matrix, {value.number: mixed.index})


def placing(context: DependenceContext) -> Result:
    """Put elements of a source to numbered places of a tensor, instead of what is there or onto it."""
    facts, given, out = context.facts, context.arguments, context.out
    (chosen,) = (context[name] for name in facts.selectors)
    own, other = context.state(given["self"]), context.state(given.get(facts.source))
    if not context.select(chosen):
        return None
    # counted from the end, where the axes of both tensors agree
    dims = len(out)
    varying = {
        axis - state.index.dim() for state in (own, other) if isinstance(state, IndexSets) for axis in state.axes
    }
    pick, alone = _picker(context, varying)
    wide = [1 if axis - dims in alone - varying else size for axis, size in enumerate(out)]
    context.algebra.spend(math.prod(wide), MOST_ELEMENTS)
    places = torch.arange(math.prod(wide)).reshape(wide)
    picked = pick(places)
    total: IndexSets | None = None
    if isinstance(own, IndexSets):
        index = own.index
        if facts.overwrites and not given.get("accumulate") and given.get("reduce") is None:
            index = index.expand(wide).clone(memory_format=torch.contiguous_format)
            index.reshape(-1)[picked.reshape(-1)] = 0
        total = IndexSets(own.matrix, index)
    if isinstance(other, IndexSets):
        read = other.index
        if facts.axes is Axes.INDEXED:
            read = read[tuple(slice(size) for size in context.shape(chosen))]
        groups, index = torch.broadcast_tensors(picked, read)
        total = context.algebra.union(total, context.algebra.gather(groups, IndexSets(other.matrix, index), wide))
    return total


def _picker(context: DependenceContext, varying: Collection[int]) -> tuple[Callable[[Tensor], Tensor], set[int]]:
    """Return what picks the places that a source goes to, and the axes, from the end, that it leaves alone."""
    dims = len(context.out)
    if "indices" in context.facts.selectors:
        indices = context.value(context["indices"])
        used = [axis for axis, index in enumerate(indices) if index is not None]
        alone = {axis - dims for axis in range(used[-1] + 1, dims)} if used == list(range(len(used))) else set()
        return lambda places: torch.ops.aten.index.Tensor(places, indices), alone
    index, axis = context.value(context["index"]), context["dim"] % max(dims, 1)
    alone = {other - dims for other in range(dims) if other != axis}
    if context.facts.axes is not Axes.INDEXED:
        return lambda places: places.index_select(axis, index), alone
    alone = {other for other in alone if is_uniform(context, context["index"].number, other)}
    for other in alone - set(varying):
        index = index.narrow(other, 0, 1)
    return lambda places: places.gather(axis, index), alone


def _run(
    context: DependenceContext, given: Mapping[int, Tensor], narrow: Collection[int] = (), fillers: bool = False
) -> list[Tensor]:
    """Run an operator on numbers of sets.

    All other tensors become zero, the empty set, and so do fillers unless they are asked for.

    Args:
        context: the operator.
        given: for each tensor that has sets their numbers.
        narrow: axes along which these, and so all tensors, are of length 1.
        fillers: whether to fill gaps with what the operator fills them with.
    """
    graph, operation = context.graph, context.operation
    chosen, spread = set(context.selector_numbers()), context.facts.kind is Kind.POINTWISE
    dtype = next(iter(given.values())).dtype

    def fill(value: Any) -> Any:
        if not isinstance(value, Value):
            return [fill(part) for part in value] if isinstance(value, (tuple, list)) else value
        number, shape = value.number, graph.shapes[value.number]
        if number in given:
            return given[number]
        if number not in chosen:
            return torch.zeros(
                [1 if spread or axis in narrow else size for axis, size in enumerate(shape)], dtype=dtype
            )
        if not isinstance(context.states[number], Constant):
            return torch.zeros(shape, dtype=graph.dtypes[number])
        index = context.value(value)
        for axis in narrow if context.facts.axes is Axes.INDEXED else ():
            index = index.narrow(axis, 0, 1)
        return compress_index(index) if spread else index

    if not isinstance(operation.target, OpOverload):
        # a copy into a tensor: the source in the target's shape
        return [fill(operation.args[0]).expand(operation.args[1])]
    arguments = {}
    for argument in operation.target._schema.arguments:
        value = context.arguments.get(argument.name, argument.default_value)
        # what fills gaps depends on nothing
        number = not fillers and argument.name in context.facts.fillers and not isinstance(value, Value)
        arguments[argument.name] = 0 if number else fill(value)
    positional = [arguments.pop(a.name) for a in operation.target._schema.arguments if not a.kwarg_only]
    made = operation.target(*positional, **arguments)
    parts = made if operation.many else [made]
    return [part for part, number in zip(parts, operation.outputs, strict=True) if number is not None]
