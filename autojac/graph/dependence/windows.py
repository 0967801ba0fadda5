"""Convolutions and pooling: each tap of a window moves elements about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.graph.dependence.elementwise_and_moves import unknown
from autojac.graph.dependence.index_sets import DependenceContext, IndexSets, State, alive_of
from autojac.graph.dependence.reductions_and_products import behind

aten = torch.ops.aten


def convolution(context: DependenceContext) -> State:
    """One tap of the kernel moves elements about; the taps that may be nonzero are united."""
    source, weight = context.state(context["input"]), context.state(context["weight"])
    if weight is None or not isinstance(source, IndexSets) or len(context.sets()) > 1:
        return unknown(context)
    shape, groups = tuple(source.index.shape), context["groups"]
    grouped = IndexSets(source.matrix, source.index.reshape(shape[0], groups, shape[1] // groups, *shape[2:]))
    mixed = context.mixed(grouped, [2])
    numbers = mixed.index.reshape(shape[0] * groups, 1, *shape[2:])
    kernel = context.shape(context["weight"])[2:]
    alive = alive_of(weight)
    # a kernel that is not zero throughout has a tap
    taps = torch.ones(kernel, dtype=torch.bool) if alive is None else alive.flatten(0, 1).any(0)
    options = [context[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding")]
    total = _tapped(context, IndexSets(mixed.matrix, numbers), taps, options)
    out = context.out
    wide = total.index.reshape(out[0], groups, 1, *out[2:]).expand(out[0], groups, out[1] // groups, *out[2:])
    return IndexSets(total.matrix, wide.reshape(out))


def pooling(context: DependenceContext) -> State | Sequence[State]:
    """Windows of each channel by itself."""
    _, state = context.sets()[0]
    dims = context.facts.window_axes
    kernel = _each(context["kernel_size"], [1], dims)
    out, shape = context.out, tuple(state.index.shape)
    stride, padding, dilation = (
        _each(context.arguments.get(name), default, dims)
        for name, default in (("stride", kernel), ("padding", [0]), ("dilation", [1]))
    )
    amounts = []
    for axis in reversed(range(dims)):
        reach = (out[axis - dims] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        amounts += [padding[axis], reach - shape[axis - dims] - padding[axis]]
    flat = state.index.reshape(-1, 1, *shape[-dims:]).double()
    numbers = aten.constant_pad_nd(flat, amounts).long()
    options = [stride, [0] * dims, dilation, False, [0] * dims]
    total = _tapped(context, IndexSets(state.matrix, numbers), torch.ones(kernel, dtype=torch.bool), options)
    wide = IndexSets(total.matrix, total.index.reshape(out))
    return [wide] * len(context.shapes)


def adaptive(context: DependenceContext) -> State | Sequence[State]:
    """Windows that divide the axes evenly, or else all of each channel."""
    _, state = context.sets()[0]
    sizes = list(context["output_size"])
    shape, dims = tuple(state.index.shape), len(sizes)
    if any(size % part for size, part in zip(shape[-dims:], sizes, strict=True)):
        return behind(len(shape) - dims)(context)
    kernel = [size // part for size, part in zip(shape[-dims:], sizes, strict=True)]
    flat = IndexSets(state.matrix, state.index.reshape(-1, 1, *shape[-dims:]))
    options = [kernel, [0] * dims, [1] * dims, False, [0] * dims]
    total = _tapped(context, flat, torch.ones(kernel, dtype=torch.bool), options)
    wide = IndexSets(total.matrix, total.index.reshape(context.out))
    return [wide] * len(context.shapes)


def _tapped(context: DependenceContext, source: IndexSets, taps: Tensor, options: Sequence[Any]) -> IndexSets:
    """Return the union over the taps of a kernel that are set, of a tensor of (lines, 1, *space)."""
    numbers, moved = source.index.double(), []
    for place in taps.nonzero().tolist():
        kernel = torch.zeros(1, 1, *taps.shape, dtype=torch.float64)
        kernel[(0, 0, *place)] = 1
        context.spend(numbers.numel() * taps.numel())
        moved.append(aten.convolution(numbers, kernel, None, *options, 1).round().long())
    if len(moved) == 1:
        return IndexSets(source.matrix, moved[0])
    shape = tuple(moved[0].shape)
    groups = torch.arange(moved[0].numel()).expand(len(moved), -1)
    return context.gathered(groups, IndexSets(source.matrix, torch.stack(moved)), shape)


def _each(given: Any, default: Sequence[int], dims: int) -> list[int]:
    values = list(given) if given else list(default)
    return values * dims if len(values) == 1 else values
