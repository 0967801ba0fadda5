"""How one view of some memory becomes another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autojac.replay.passes.node_facts import overlapping

aten = torch.ops.aten


def moves(value: Tensor, wanted: Tensor) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield operators that might make one view of another."""
    if value.numel() == wanted.numel():
        if value.dim() == wanted.dim():
            axes = _axes(value, wanted)
            if axes is not None:
                yield (aten.t.default, ()) if axes == [1, 0] else (aten.permute.default, (axes,))
        yield aten.view.default, (list(wanted.shape),)
    elif value.dim() <= wanted.dim() and overlapping(wanted):
        yield aten.expand.default, (list(wanted.shape),)
    if value.dim() == wanted.dim() + 1 or value.dim() == wanted.dim():
        yield from _cut(value, wanted)


def _axes(value: Tensor, wanted: Tensor) -> list[int] | None:
    there = sorted(range(value.dim()), key=lambda axis: (value.size(axis), value.stride(axis)))
    here = sorted(range(wanted.dim()), key=lambda axis: (wanted.size(axis), wanted.stride(axis)))
    axes = [0] * value.dim()
    for axis, origin in zip(here, there, strict=True):
        if value.size(origin) != wanted.size(axis):
            return None
        axes[axis] = origin
    return axes


def _cut(value: Tensor, wanted: Tensor) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield one entry of an axis, or a range of it."""
    first = wanted.storage_offset() - value.storage_offset()
    for axis, (size, step) in enumerate(zip(value.shape, value.stride(), strict=True)):
        rest = (*value.shape[:axis], *value.shape[axis + 1 :])
        start = first // step if step else 0
        if not 0 <= start < size:
            continue
        if value.dim() > wanted.dim():
            if rest == wanted.shape:
                yield aten.select.int, (axis, start)
        elif rest == (*wanted.shape[:axis], *wanted.shape[axis + 1 :]) and wanted.size(axis) < size:
            yield aten.slice.Tensor, (axis, start, start + wanted.size(axis))
