"""Convolutions and pooling: each tap of a window moves elements about, and the taps are united."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.graph.dependence.context import DependenceContext, Result
from autojac.graph.dependence.index_sets import MOST_ELEMENTS, IndexSets
from autojac.graph.dependence.reductions_and_products import behind, of_first, per_channel
from autojac.graph.ir import Value


@of_first
def convolution(context: DependenceContext, value: Value, state: IndexSets) -> Result:
    """Join the channels of a group, in a window whose taps may be nonzero."""
    shape, kernel, groups = context.shape(value), context.shape(context["weight"])[2:], context["groups"]
    if len(shape) != len(kernel) + 2:
        return None
    divided = (shape[0], groups, shape[1] // groups, *shape[2:])
    mixed = context.algebra.unite_along(context.algebra.reshape(state, shape, divided), [2])
    nonzero = context.nonzero(context["weight"])
    # a kernel that is not zero throughout has a tap
    taps = torch.ones(kernel, dtype=torch.bool) if nonzero is None else nonzero.flatten(0, 1).any(0)
    options = [_each(context[name], len(kernel)) for name in ("stride", "padding", "dilation")]
    made = _unite_taps(context, mixed, taps, options, context["transposed"])
    return IndexSets(made.matrix, per_channel(made.index, context.out[1] // groups))


@of_first
def pooling(context: DependenceContext, value: Value, state: IndexSets) -> Result:
    """Join windows of each channel by itself."""
    dims = context.facts.window_axes
    kernel = _each(context["kernel_size"], dims)
    given = (context["stride"] or kernel, context["padding"], context.arguments.get("dilation") or 1)
    options = [_each(option, dims) for option in given]
    return _unite_taps(context, state, torch.ones(kernel, dtype=torch.bool), options)


@of_first
def adaptive(context: DependenceContext, value: Value, state: IndexSets) -> Result:
    """Join windows that divide the axes evenly, or else all of each channel."""
    out = list(context["output_size"])
    lead = len(context.out) - len(out)
    sizes = context.shape(value)[lead:]
    if any(size % part for size, part in zip(sizes, out, strict=True)):
        return behind(lead)(context)
    kernel = [size // part for size, part in zip(sizes, out, strict=True)]
    options = [kernel, [0] * len(out), [1] * len(out)]
    return _unite_taps(context, state, torch.ones(kernel, dtype=torch.bool), options)


def _unite_taps(
    context: DependenceContext,
    source: IndexSets,
    taps: Tensor,
    options: Sequence[Sequence[int]],
    transposed: bool = False,
) -> IndexSets:
    """Unite what each tap of a kernel reads.

    Args:
        context: the operator.
        source: sets whose last axes the kernel moves along.
        taps: which entries of the kernel count.
        options: stride, padding and dilation along each of these axes.
        transposed: the windows are those of a transposed convolution.
    """
    dims = taps.dim()
    out, sizes = context.out[-dims:], source.index.shape[-dims:]
    varying = [axis for axis in range(dims) if sizes[axis] > 1]
    for axis in set(range(dims)) - set(varying):
        taps = taps.any(axis, keepdim=True)
    moved = []
    for tap in taps.nonzero().tolist():
        index = source.index
        for axis in varying:
            stride, padding, dilation = (option[axis] for option in options)
            start = tap[axis] * dilation - padding
            place = torch.arange(out[axis]) * (1 if transposed else stride) + (-start if transposed else start)
            outside = torch.zeros_like(place, dtype=torch.bool)
            if transposed:
                place, outside = place // stride, place % stride != 0
            outside |= (place < 0) | (place >= sizes[axis])
            # an empty set behind the last one stands for what lies outside
            index = torch.cat([index, torch.zeros_like(index.narrow(axis - dims, 0, 1))], axis - dims)
            index = index.index_select(axis - dims, torch.where(outside, sizes[axis], place))
        context.algebra.spend(index.numel(), MOST_ELEMENTS)
        moved.append(index)
    if len(moved) == 1:
        return IndexSets(source.matrix, moved[0])
    mixed = context.algebra.unite_along(IndexSets(source.matrix, torch.stack(moved)), [0])
    return IndexSets(mixed.matrix, mixed.index[0])


def _each(given: Any, dims: int) -> list[int]:
    """Return a number for each axis, from one for all or from a list."""
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    return values * dims if len(values) == 1 else values
