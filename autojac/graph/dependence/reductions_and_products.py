"""Operators of which each result reads many elements: reductions, products, linear algebra."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autojac.graph.dependence.elementwise_and_moves import unknown
from autojac.graph.dependence.index_sets import Constant, DependenceContext, IndexSets, Rule, State, alive_of
from autojac.graph.ir import Value

MOST_PRODUCT = 10_000_000
"""Terms of a product up to which the zeros of a constant factor are used."""


def mixing(context: DependenceContext) -> State | Sequence[State]:
    """Each result reads its whole line along some axes: reductions, softmax, sorting, transforms."""
    total: IndexSets | None = None
    dims = 0
    for _, state in context.sets():
        dims = state.index.dim()
        name = "dim" if "dim" in context.arguments else "dims"
        axes = context.axes(name, dims) if name in context.arguments else list(range(dims))
        mixed = context.mixed(state, axes)
        if total is not None and total.index.shape != mixed.index.shape:
            return unknown(context)
        total = mixed if total is None else context.union(total, mixed)
    assert total is not None
    return [_fitted(context, total, shape) for shape in context.shapes]


def behind(lead: int | Callable[[DependenceContext, int], int]) -> Rule:
    """Results share some leading axes with all tensors that they read, and read all behind these."""

    def rule(context: DependenceContext) -> State | Sequence[State]:
        total: IndexSets | None = None
        kept: tuple[int, ...] = ()
        for _, state in context.sets():
            shape = tuple(state.index.shape)
            count = lead if isinstance(lead, int) else lead(context, len(shape))
            mixed = context.mixed(state, range(count, len(shape)))
            mixed = IndexSets(mixed.matrix, mixed.index.reshape(shape[:count]))
            if total is not None and shape[:count] != kept:
                return unknown(context)
            kept = shape[:count]
            total = mixed if total is None else context.union(total, mixed)
        assert total is not None
        made: list[State] = []
        for shape in context.shapes:
            if shape[: len(kept)] != kept:
                return unknown(context)
            wide = total.index.reshape((*kept, *[1] * (len(shape) - len(kept)))).expand(shape)
            made.append(IndexSets(total.matrix, wide))
        return made

    return rule


def normalization(context: DependenceContext) -> State | Sequence[State]:
    """Results read their whole group: the last axes, or groups of channels."""
    if "normalized_shape" in context.arguments:
        return behind(lambda context, dims: dims - len(context["normalized_shape"]))(context)
    if "group" not in context.arguments:
        return unknown(context)
    sets = context.sets()
    if len(sets) > 1 or sets[0][0] != context[next(iter(context.arguments))]:
        return unknown(context)
    state, groups = sets[0][1], context["group"]
    shape = tuple(state.index.shape)
    mixed = context.mixed(IndexSets(state.matrix, state.index.reshape(shape[0], groups, -1)), [2])
    wide = mixed.index.expand(shape[0], groups, math.prod(shape[1:]) // groups).reshape(shape)
    few = mixed.index.reshape(shape[0], groups)
    return [IndexSets(mixed.matrix, wide), IndexSets(mixed.matrix, few), IndexSets(mixed.matrix, few)]


def product(context: DependenceContext) -> State:
    """A product of (stacks of) matrices, or of a matrix and a vector; zeros of a captured factor cut paths."""
    assert context.facts.factors is not None
    left, right = context.facts.factors
    total: IndexSets | None = None
    for name, other, turned in ((left, right, False), (right, left, True)):
        state = context.state(context[name])
        if isinstance(state, IndexSets):
            part = _factor(context, state, context[other], turned)
            total = part if total is None else context.union(total, part)
    added = context.state(context.arguments.get(context.facts.addend))
    if isinstance(added, IndexSets):
        part = IndexSets(added.matrix, added.index.expand(context.out))
        total = part if total is None else context.union(total, part)
    assert total is not None
    return total


def _factor(context: DependenceContext, state: IndexSets, other: Value, turned: bool) -> IndexSets:
    """Return what one factor gives to a product; it is the right one if `turned`, and then all is transposed."""
    index, shape = state.index, context.shape(other)
    if index.dim() == 1:
        index = index[:, None] if turned else index[None]
    index = (index.mT if turned else index).contiguous()
    lines, depth = index.shape[-2:]
    width = 1 if len(shape) == 1 else shape[-2 if turned else -1]
    made = (*index.shape[:-1], width)
    where = _entries(context.states[other.number])
    if where is None or lines * where.shape[1] > MOST_PRODUCT:
        mixed = context.mixed(IndexSets(state.matrix, index), [index.dim() - 1])
        found = IndexSets(mixed.matrix, mixed.index.expand(made))
    else:
        if len(shape) == 1:
            where = torch.stack([where[0], torch.zeros_like(where[0])])
            k, j = where
        else:
            k, j = (where[-1], where[-2]) if turned else (where[-2], where[-1])
        stack = where[0] if len(shape) == 3 else torch.zeros_like(k)
        line = stack * lines + torch.arange(lines)[:, None]
        found = context.gathered(line * width + j, IndexSets(state.matrix, index), made, (line * depth + k).reshape(-1))
    return IndexSets(found.matrix, (found.index.mT if turned else found.index).reshape(context.out))


def distances(context: DependenceContext) -> State:
    """Result i, j reads row i of the first and row j of the second."""
    total: IndexSets | None = None
    for place, value in enumerate(context.operation.args[:2]):
        state = context.state(value)
        if isinstance(state, IndexSets):
            mixed = context.mixed(state, [state.index.dim() - 1])
            wide = IndexSets(mixed.matrix, (mixed.index.mT if place else mixed.index).expand(context.out))
            total = wide if total is None else context.union(total, wide)
    assert total is not None
    return total


def parts(context: DependenceContext) -> State:
    """Complex numbers as pairs of real ones, and back."""
    _, state = context.sets()[0]
    if context.operation.name == "view_as_real":
        return IndexSets(state.matrix, state.index[..., None].expand(context.out))
    mixed = context.mixed(state, [state.index.dim() - 1])
    return IndexSets(mixed.matrix, mixed.index[..., 0])


def _entries(state: State) -> Tensor | None:
    """Return the places of a constant matrix that may be other than zero, (axes, entries); None for all."""
    if isinstance(state, Constant) and state.value.layout != torch.strided:
        value = state.value.to_sparse_coo().coalesce()
        kept: Tensor = value.indices()[:, value.values() != 0]
        return kept.cpu()
    alive = alive_of(state)
    return None if alive is None else alive.nonzero().mT


def _fitted(context: DependenceContext, mixed: IndexSets, shape: tuple[int, ...]) -> IndexSets:
    """A tensor with some axes of length 1 in the shape of a result, which keeps these axes or has none of them."""
    if mixed.index.numel() == math.prod(shape):
        return IndexSets(mixed.matrix, mixed.index.reshape(shape))
    if mixed.index.dim() == len(shape):
        wide = all(one in (1, size) for one, size in zip(mixed.index.shape, shape, strict=True))
        if wide:
            return IndexSets(mixed.matrix, mixed.index.expand(shape))
    total = context.gathered(torch.zeros(mixed.index.numel(), dtype=torch.int64), mixed, (1,))
    return IndexSets(total.matrix, total.index.reshape(()).expand(shape))
