"""How one view of some memory becomes another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autojac.replay.passes.node_facts import overlapping

aten = torch.ops.aten


def moves(held: Tensor, wanted: Tensor) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield operators that might make one view of another."""
    if held.numel() == wanted.numel():
        if held.dim() == wanted.dim():
            axes = _axes(held, wanted)
            if axes is not None:
                yield (aten.t.default, ()) if axes == [1, 0] else (aten.permute.default, (axes,))
        yield aten.view.default, (list(wanted.shape),)
    elif held.dim() <= wanted.dim() and overlapping(wanted):
        yield aten.expand.default, (list(wanted.shape),)
    if held.dim() == wanted.dim() + 1 or held.dim() == wanted.dim():
        yield from _cut(held, wanted)


def _axes(held: Tensor, wanted: Tensor) -> list[int] | None:
    there = sorted(range(held.dim()), key=lambda axis: (held.size(axis), held.stride(axis)))
    here = sorted(range(wanted.dim()), key=lambda axis: (wanted.size(axis), wanted.stride(axis)))
    axes = [0] * held.dim()
    for axis, origin in zip(here, there, strict=True):
        if held.size(origin) != wanted.size(axis):
            return None
        axes[axis] = origin
    return axes


def _cut(held: Tensor, wanted: Tensor) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield one entry of an axis, or a range of it."""
    first = wanted.storage_offset() - held.storage_offset()
    for axis, (size, step) in enumerate(zip(held.shape, held.stride(), strict=True)):
        rest = (*held.shape[:axis], *held.shape[axis + 1 :])
        start = first // step if step else 0
        if not 0 <= start < size:
            continue
        if held.dim() > wanted.dim():
            if rest == wanted.shape:
                yield aten.select.int, (axis, start)
        elif rest == (*wanted.shape[:axis], *wanted.shape[axis + 1 :]) and wanted.size(axis) < size:
            yield aten.slice.Tensor, (axis, start, start + wanted.size(axis))
