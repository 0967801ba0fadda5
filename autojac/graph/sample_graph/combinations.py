"""What scatters, windows and products, which combine slices along a tracked axis, do to the samples behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autojac.graph.ir import Value
from autojac.graph.operator_facts import Axes, Kind
from autojac.graph.sample_graph.operators import SampleContext, is_uniform, numbers_in
from autojac.graph.sample_graph.slices import MOST_SLICES, MOST_WORK, SliceSamples, TooDense, incidence, united

aten = torch.ops.aten


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
    pick, alone = _picker(context, tracked)
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


def _picker(context: SampleContext, tracked: set[int]) -> tuple[Callable[[Tensor], Tensor], set[int]]:
    """Return what picks the places that the source goes to, and the axes, from the end, which it leaves alone."""
    facts, call = context.facts, context.call
    (target,) = numbers_in(call["self"])
    dims = len(context.shape(target))
    if "indices" in facts.selectors:
        indices = [None if index is None else context.fixed(index.number).cpu() for index in call["indices"]]
        used = [axis for axis, index in enumerate(indices) if index is not None]
        alone = {axis - dims for axis in range(used[-1] + 1, dims)} if used == list(range(len(used))) else set()
        return lambda places: aten.index.Tensor(places, indices), alone
    (number,) = numbers_in(call["index"])
    index = context.fixed(number).cpu()
    axis = call["dim"] % max(dims, 1)
    alone = {other - dims for other in range(dims) if other != axis}
    if facts.axes is not Axes.INDEXED:
        return lambda places: places.index_select(axis, index), alone
    alone = {other for other in alone if is_uniform(context, other)}
    for other in alone - tracked:
        index = index.narrow(other, 0, 1)
    return lambda places: places.gather(axis, index), alone


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


def _each(given: Any, count: int) -> list[int]:
    """A size for each axis, from one for all or from a list."""
    sizes = list(given) if isinstance(given, (tuple, list)) else [given]
    return sizes * count if len(sizes) == 1 else sizes
