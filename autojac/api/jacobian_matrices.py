"""The Jacobians of several outputs in several inputs as one matrix per sample, and their rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from autojac.api.product_arguments import CallShapes
from autojac.autodiff.seeds import identity as one_hot
from autojac.core.nests import tensor_leaves


class MatrixSizes(NamedTuple):
    """The sizes of the matrices that a Jacobian consists of."""

    matrices: int
    rows: int
    columns: int
    item_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return self.matrices * self.rows * self.columns * self.item_bytes

    @classmethod
    def of(cls, shapes: CallShapes, whole: bool) -> Self:
        """Return the sizes of one matrix per sample, or of a single one for the whole batch."""
        rows = sum(map(prod, shapes.outputs))
        if shapes.batch is None or not whole:
            return cls(prod(shapes.lead), rows, sum(map(prod, shapes.inputs)), shapes.item_bytes)
        each = zip(shapes.differentiated, shapes.inputs, strict=True)
        columns = sum(prod(shape) * (1 if shapes.axes[position] is None else shapes.batch) for position, shape in each)
        return cls(1, rows * shapes.batch, columns, shapes.item_bytes)


def as_one_matrix(jacobian: Any, shapes: CallShapes, whole: bool) -> Tensor:
    """Return the Jacobians of all outputs in all inputs as one matrix per sample, or one for the whole batch."""
    flat = tensor_leaves(jacobian)
    rows = []
    for number, event in enumerate(shapes.outputs):
        row = flat[number * len(shapes.inputs) : (number + 1) * len(shapes.inputs)]
        if shapes.batch is None:
            lead: tuple[int, ...] = (prod(event),)
        elif whole:
            lead = (shapes.batch * prod(event),)
        else:
            lead = (shapes.batch, prod(event))
        rows.append(torch.cat([J.reshape(*lead, J.numel() // prod(lead) if prod(lead) else 0) for J in row], -1))
    return torch.cat(rows, -2)


def one_hot_seeds(
    shapes: CallShapes, args: Sequence[Any], start: int, stop: int, columns: bool, whole: bool
) -> list[Tensor]:
    """Return unit vectors number `start` to `stop` as tangents of inputs or cotangents of outputs.

    For one matrix per sample each of them repeats one vector for all samples.
    """
    events = shapes.inputs if columns else shapes.outputs
    axes: list[int | None] = [shapes.axes[p] for p in shapes.differentiated] if columns else [0] * len(events)
    tensors = tensor_leaves(tuple(args))
    chosen = [tensors[position] for position in shapes.differentiated]
    likes = chosen if columns else [chosen[0]] * len(events)
    lead = shapes.lead
    sizes = [
        prod(event) * (prod(lead) if whole and axis is not None else 1)
        for event, axis in zip(events, axes, strict=True)
    ]
    flat = one_hot((sum(sizes),), start, stop, chosen[0].detach()).split(sizes, 1)
    seeds = []
    for part, event, axis, like in zip(flat, events, axes, likes, strict=True):
        seed = part.to(like.dtype)
        if axis is None or not lead:
            seeds.append(seed.reshape(-1, *event))
        elif whole:
            seeds.append(seed.reshape(stop - start, *lead, *event).movedim(1, 1 + axis))
        else:
            each = seed.reshape(stop - start, 1, *event).expand(-1, *lead, *([-1] * len(event)))
            seeds.append(each.movedim(1, 1 + axis))
    return seeds
