"""Operators of which each result reads many elements: reductions, products, linear algebra."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autojac.graph.dependence.context import Constant, DependenceContext, Result
from autojac.graph.dependence.index_sets import IndexSets
from autojac.graph.ir import Value

MOST_PRODUCT = 10_000_000
"""Terms of a product up to which the zeros of a constant factor are used."""


def of_first(rule: Callable[[DependenceContext, Value, IndexSets], Result]) -> Callable[[DependenceContext], Result]:
    """Make a rule for operators where inputs stand behind the first argument alone."""

    def rule_of_first(context: DependenceContext) -> Result:
        sets = context.sets()
        alone = len(sets) == 1 and sets[0][0] == context.operation.args[0]
        return rule(context, *sets[0]) if alone else None

    return rule_of_first


def keeping_axes(context: DependenceContext) -> list[IndexSets]:
    """Keep the axes that the rules of the batch axis keep; along all others each result reads everything."""
    totals: list[IndexSets | None] = [None] * len(context.results)
    for value, state in context.sets():
        places = {axis: context.kept_axis(value, axis) for axis in state.axes}
        for output, number in enumerate(context.results):
            kept = {axis: place for axis in places if (place := places[axis][output]) is not None}
            mixed = context.unite_along(state, [axis for axis in places if axis not in kept])
            order = sorted(kept, key=kept.__getitem__)
            shape = [1] * len(context.graph.shapes[number])
            for axis in order:
                shape[kept[axis]] = state.index.shape[axis]
            rest = [axis for axis in range(state.index.dim()) if axis not in kept]
            index = mixed.index.permute(*order, *rest).reshape(shape)
            totals[output] = context.algebra.union(totals[output], IndexSets(mixed.matrix, index))
    return [total for total in totals if total is not None]


def leaves_alone(context: DependenceContext) -> bool:
    """Check whether an operator keeps all axes along which sets differ."""
    return all(None not in context.kept_axis(value, axis) for value, state in context.sets() for axis in state.axes)


def mixing(context: DependenceContext) -> Result:
    """Join whole lines along some axes, which each result reads: reductions, softmax, sorting, transforms."""
    total: IndexSets | None = None
    shapes = {context.shape(value) for value, _ in context.sets()}
    if len(shapes) > 1:
        return None
    dims = len(shapes.pop())
    axes = sorted(context.axes(dims))
    for _, state in context.sets():
        total = context.algebra.union(total, context.unite_along(state, axes))
    assert total is not None
    if len(context.out) == dims:
        return total
    lengths = [size for axis, size in enumerate(total.index.shape) if axis not in axes]
    return IndexSets(total.matrix, total.index.reshape(lengths))


def behind(lead: int | Callable[[DependenceContext, int], int]) -> Callable[[DependenceContext], Result]:
    """Join all that lies behind the leading axes that results share with all tensors that they read."""

    def rule(context: DependenceContext) -> Result:
        total: IndexSets | None = None
        shared = set()
        for value, state in context.sets():
            shape = context.shape(value)
            count = lead if isinstance(lead, int) else lead(context, len(shape))
            shared.add(shape[:count])
            mixed = context.unite_along(state, range(count, len(shape)))
            index = mixed.index.reshape(mixed.index.shape[:count])
            total = context.algebra.union(total, IndexSets(mixed.matrix, index))
        assert total is not None
        front, shapes = shared.pop(), [context.graph.shapes[number] for number in context.results]
        if shared or any(shape[: len(front)] != front for shape in shapes):
            return None
        lengths = [(*total.index.shape, *[1] * (len(shape) - len(front))) for shape in shapes]
        return [IndexSets(total.matrix, total.index.reshape(one)) for one in lengths]

    return rule


@of_first
def normalization(context: DependenceContext, value: Value, state: IndexSets) -> Result:
    """Join the groups that results read whole: the last axes, or groups of channels."""
    if "group" not in context.arguments:
        return keeping_axes(context)
    shape, groups = context.shape(value), context["group"]
    divided = (shape[0], groups, shape[1] // groups, *shape[2:])
    mixed = context.unite_along(context.algebra.reshape(state, shape, divided), range(2, len(divided)))
    few = mixed.index.reshape(mixed.index.shape[:2])
    wide = per_channel(few[:, :, None], shape[1] // groups)
    whole = wide.reshape(*wide.shape, *[1] * (len(shape) - 2))
    return [IndexSets(mixed.matrix, index) for index in (whole, few, few)]


def per_channel(index: Tensor, channels: int) -> Tensor:
    """Return the index of (N, groups * channels, *space) from that of (N, groups, 1, *space)."""
    length = channels if index.shape[1] > 1 else 1
    return index.expand(-1, -1, length, *index.shape[3:]).flatten(1, 2)


def product(context: DependenceContext) -> Result:
    """Follow a product of (stacks of) matrices, or of a matrix and a vector; zeros of a captured factor cut paths."""
    assert context.facts.factors is not None
    left, right = (context[name] for name in context.facts.factors)
    total: IndexSets | None = None
    for one, other, turned in ((left, right, False), (right, left, True)):
        state = context.state(one)
        if isinstance(state, IndexSets):
            total = context.algebra.union(total, _factor(context, state, other, turned))
    added = context.state(context.arguments.get(context.facts.addend))
    return context.algebra.union(total, added) if isinstance(added, IndexSets) else total


def _factor(context: DependenceContext, state: IndexSets, other: Value, turned: bool) -> IndexSets:
    """Return what one factor gives to a product; it is the right one if `turned`, and then all is transposed."""
    index, shape = state.index, context.shape(other)
    if index.dim() == 1:
        index = index[:, None] if turned else index[None]
    index = index.mT if turned else index
    size = (*shape, 1) if len(shape) == 1 else (*shape[:-2], *reversed(shape[-2:])) if turned else shape
    lines, (*stacks, depth, width) = index.shape[-2], size
    # where sets are alike along what is summed over, zeros of samples make no difference
    where = _entries(context, other) if index.shape[-1] > 1 or not context.follow_values else None
    if where is None or lines * where.shape[1] > MOST_PRODUCT:
        found = context.unite_along(IndexSets(state.matrix, index), [index.dim() - 1])
    else:
        k, j = where[-1], torch.zeros_like(where[-1])
        if len(shape) > 1:
            k, j = (where[-1], where[-2]) if turned else (where[-2], where[-1])
        stack = where[0] if stacks else torch.zeros_like(k)
        line = stack * lines + torch.arange(lines)[:, None]
        index = index.expand(*stacks, lines, depth)
        members = IndexSets(state.matrix, index.reshape(-1)[line * depth + k])
        found = context.algebra.gather(line * width + j, members, (*stacks, lines, width))
    made = found.index.mT if turned else found.index
    # of a product with a vector one axis is left, or none
    return IndexSets(found.matrix, made if len(context.out) > 1 else made.reshape([-1] * len(context.out)))


def _entries(context: DependenceContext, value: Value) -> Tensor | None:
    """Return the places of a constant matrix that may be other than zero, (axes, entries); None for all."""
    if isinstance(context.states[value.number], Constant):
        tensor = context.constant(value.number)
        if tensor.layout != torch.strided:
            context.select(value)
            entries = tensor.detach().to_sparse_coo().coalesce()
            places: Tensor = entries.indices() if context.follow_values else entries.indices()[:, entries.values() != 0]
            return places.cpu()
    nonzero = context.nonzero(value)
    return None if nonzero is None else nonzero.nonzero().mT


def distances(context: DependenceContext) -> Result:
    """Unite row i of the first and row j of the second for result i, j."""
    total: IndexSets | None = None
    for place, value in enumerate(context.operation.args[:2]):
        state = context.state(value)
        if isinstance(state, IndexSets):
            mixed = context.unite_along(state, [state.index.dim() - 1])
            total = context.algebra.union(total, IndexSets(mixed.matrix, mixed.index.mT if place else mixed.index))
    return total
