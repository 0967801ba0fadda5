"""How the elements of a sample's outputs and inputs are counted: through all of them, flattened in their order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autojac.probe.sample_pairs import ProbePoint


class Coordinates:
    """The m outputs and n inputs of a sample.

    Args:
        point: the function; its outputs have the batch on axis 0.
        differentiated: indices of the leaves to differentiate; one without the batch counts as a whole.
        outputs: the function's values.
    """

    def __init__(self, point: ProbePoint, differentiated: Sequence[int], outputs: Sequence[Tensor]) -> None:
        self.differentiated = tuple(differentiated)
        self.batched = frozenset((*point.inputs, *point.sides))
        inputs = [point.leaves[position] for position in self.differentiated]
        self.columns = tuple(
            math.prod(leaf.shape[1:] if position in self.batched else leaf.shape)
            for position, leaf in zip(self.differentiated, inputs, strict=True)
        )
        self.rows = tuple(math.prod(value.shape[1:]) for value in outputs)
        self.m, self.n = sum(self.rows), sum(self.columns)

    def numbers(self, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """Return for each leaf the numbers of its elements, of its shape; None for leaves not differentiated."""
        numbers: list[Tensor | None] = [None] * len(leaves)
        start = 0
        for position, size in zip(self.differentiated, self.columns, strict=True):
            shape = leaves[position].shape
            event = (1, *shape[1:]) if position in self.batched else shape
            numbers[position] = torch.arange(start, start + size).reshape(event).expand(shape)
            start += size
        return numbers

    def of_inputs(self, parts: Sequence[Tensor]) -> Tensor:
        """Return which entries of tensors shaped like the differentiated leaves are set in any sample: (n,)."""
        lines = [
            part.reshape(len(part) if position in self.batched else 1, -1).any(0).cpu()
            for position, part in zip(self.differentiated, parts, strict=True)
        ]
        return torch.cat(lines)

    def of_outputs(self, parts: Sequence[Tensor]) -> Tensor:
        """Return which entries of tensors shaped like the outputs are set in any sample: (m,)."""
        return torch.cat([part.reshape(len(part), -1).any(0).cpu() for part in parts])

    def as_inputs(self, mask: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return a mask over inputs (n,) as masks that broadcast over the differentiated leaves."""
        parts = mask.split(list(self.columns))
        shapes = [
            leaves[position].shape[1:] if position in self.batched else leaves[position].shape
            for position in self.differentiated
        ]
        device = leaves[0].device
        return [part.reshape(shape).to(device) for part, shape in zip(parts, shapes, strict=True)]

    def as_outputs(self, mask: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return a mask over outputs (m,) as masks that broadcast over the outputs."""
        parts = mask.split(list(self.rows))
        return [part.reshape(y.shape[1:]).to(y.device) for part, y in zip(parts, outputs, strict=True)]


def few(point: ProbePoint, count: int) -> ProbePoint:
    """Return the function of the first samples."""
    if point.batch <= count:
        return point
    batched = (*point.inputs, *point.sides)
    leaves = tuple(leaf[:count] if position in batched else leaf for position, leaf in enumerate(point.leaves))
    return dataclasses.replace(point, leaves=leaves, batch=count)
