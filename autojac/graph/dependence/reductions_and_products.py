"""Operators of which each result reads many elements: reductions, products, linear algebra."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autojac.graph.dependence.elementwise_and_moves import unknown
from autojac.graph.dependence.index_sets import Fixed, Reading, Rule, Sets, State, alive_of
from autojac.graph.ir import Value

MOST_PRODUCT = 10_000_000
"""Terms of a product up to which the zeros of a constant factor are used."""


def mixing(reading: Reading) -> State | Sequence[State]:
    """Each result reads its whole line along some axes: reductions, softmax, sorting, transforms."""
    total: Sets | None = None
    dims = 0
    for _, state in reading.sets():
        dims = state.index.dim()
        name = "dim" if "dim" in reading.arguments else "dims"
        axes = reading.axes(name, dims) if name in reading.arguments else list(range(dims))
        mixed = reading.mixed(state, axes)
        if total is not None and total.index.shape != mixed.index.shape:
            return unknown(reading)
        total = mixed if total is None else reading.union(total, mixed)
    assert total is not None
    return [_fitted(reading, total, shape) for shape in reading.shapes]


def behind(lead: int | Callable[[Reading, int], int]) -> Rule:
    """Results share some leading axes with all tensors that they read, and read all behind these."""

    def rule(reading: Reading) -> State | Sequence[State]:
        total: Sets | None = None
        kept: tuple[int, ...] = ()
        for _, state in reading.sets():
            shape = tuple(state.index.shape)
            count = lead if isinstance(lead, int) else lead(reading, len(shape))
            mixed = reading.mixed(state, range(count, len(shape)))
            mixed = Sets(mixed.matrix, mixed.index.reshape(shape[:count]))
            if total is not None and shape[:count] != kept:
                return unknown(reading)
            kept = shape[:count]
            total = mixed if total is None else reading.union(total, mixed)
        assert total is not None
        made: list[State] = []
        for shape in reading.shapes:
            if shape[: len(kept)] != kept:
                return unknown(reading)
            wide = total.index.reshape((*kept, *[1] * (len(shape) - len(kept)))).expand(shape)
            made.append(Sets(total.matrix, wide))
        return made

    return rule


def normalization(reading: Reading) -> State | Sequence[State]:
    """Results read their whole group: the last axes, or groups of channels."""
    if "normalized_shape" in reading.arguments:
        return behind(lambda reading, dims: dims - len(reading["normalized_shape"]))(reading)
    if "group" not in reading.arguments:
        return unknown(reading)
    sets = reading.sets()
    if len(sets) > 1 or sets[0][0] != reading[next(iter(reading.arguments))]:
        return unknown(reading)
    state, groups = sets[0][1], reading["group"]
    shape = tuple(state.index.shape)
    mixed = reading.mixed(Sets(state.matrix, state.index.reshape(shape[0], groups, -1)), [2])
    wide = mixed.index.expand(shape[0], groups, math.prod(shape[1:]) // groups).reshape(shape)
    few = mixed.index.reshape(shape[0], groups)
    return [Sets(mixed.matrix, wide), Sets(mixed.matrix, few), Sets(mixed.matrix, few)]


def product(reading: Reading) -> State:
    """A product of (stacks of) matrices, or of a matrix and a vector; zeros of a captured factor cut paths."""
    assert reading.facts.factors is not None
    left, right = reading.facts.factors
    total: Sets | None = None
    for name, other, turned in ((left, right, False), (right, left, True)):
        state = reading.state(reading[name])
        if isinstance(state, Sets):
            part = _factor(reading, state, reading[other], turned)
            total = part if total is None else reading.union(total, part)
    added = reading.state(reading.arguments.get(reading.facts.addend))
    if isinstance(added, Sets):
        part = Sets(added.matrix, added.index.expand(reading.out))
        total = part if total is None else reading.union(total, part)
    assert total is not None
    return total


def _factor(reading: Reading, state: Sets, other: Value, turned: bool) -> Sets:
    """What one factor gives to a product; it is the right one if `turned`, and then all is transposed."""
    index, shape = state.index, reading.shape(other)
    if index.dim() == 1:
        index = index[:, None] if turned else index[None]
    index = (index.mT if turned else index).contiguous()
    lines, depth = index.shape[-2:]
    width = 1 if len(shape) == 1 else shape[-2 if turned else -1]
    made = (*index.shape[:-1], width)
    where = _entries(reading.states[other.number])
    if where is None or lines * where.shape[1] > MOST_PRODUCT:
        mixed = reading.mixed(Sets(state.matrix, index), [index.dim() - 1])
        found = Sets(mixed.matrix, mixed.index.expand(made))
    else:
        if len(shape) == 1:
            where = torch.stack([where[0], torch.zeros_like(where[0])])
            k, j = where
        else:
            k, j = (where[-1], where[-2]) if turned else (where[-2], where[-1])
        stack = where[0] if len(shape) == 3 else torch.zeros_like(k)
        line = stack * lines + torch.arange(lines)[:, None]
        found = reading.gathered(line * width + j, Sets(state.matrix, index), made, (line * depth + k).reshape(-1))
    return Sets(found.matrix, (found.index.mT if turned else found.index).reshape(reading.out))


def distances(reading: Reading) -> State:
    """Result i, j reads row i of the first and row j of the second."""
    total: Sets | None = None
    for place, value in enumerate(reading.operation.args[:2]):
        state = reading.state(value)
        if isinstance(state, Sets):
            mixed = reading.mixed(state, [state.index.dim() - 1])
            wide = Sets(mixed.matrix, (mixed.index.mT if place else mixed.index).expand(reading.out))
            total = wide if total is None else reading.union(total, wide)
    assert total is not None
    return total


def parts(reading: Reading) -> State:
    """Complex numbers as pairs of real ones, and back."""
    _, state = reading.sets()[0]
    if reading.operation.name == "view_as_real":
        return Sets(state.matrix, state.index[..., None].expand(reading.out))
    mixed = reading.mixed(state, [state.index.dim() - 1])
    return Sets(mixed.matrix, mixed.index[..., 0])


def _entries(state: State) -> Tensor | None:
    """The places of a constant matrix that may be other than zero, (axes, entries); None for all."""
    if isinstance(state, Fixed) and state.value.layout != torch.strided:
        value = state.value.to_sparse_coo().coalesce()
        kept: Tensor = value.indices()[:, value.values() != 0]
        return kept.cpu()
    alive = alive_of(state)
    return None if alive is None else alive.nonzero().mT


def _fitted(reading: Reading, mixed: Sets, shape: tuple[int, ...]) -> Sets:
    """A tensor with some axes of length 1 in the shape of a result, which keeps these axes or has none of them."""
    if mixed.index.numel() == math.prod(shape):
        return Sets(mixed.matrix, mixed.index.reshape(shape))
    if mixed.index.dim() == len(shape):
        wide = all(one in (1, size) for one, size in zip(mixed.index.shape, shape, strict=True))
        if wide:
            return Sets(mixed.matrix, mixed.index.expand(shape))
    total = reading.gathered(torch.zeros(mixed.index.numel(), dtype=torch.int64), mixed, (1,))
    return Sets(total.matrix, total.index.reshape(()).expand(shape))
