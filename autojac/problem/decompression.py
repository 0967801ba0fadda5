"""Read the entries of a Jacobian from what the seeds of its colors brought: by index, without a loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from autojac.core.pattern import Marks
from autojac.problem.compression import Colors, DeviceIndices
from autojac.problem.layouts import embed
from autojac.problem.problem import Problem

Decompress = Callable[[Sequence[Tensor]], Tensor]
"""From compressed tensors, (seeds, B, *event) for each side, to the Jacobian of one output and input."""


def decompressors(
    problem: Problem, sides: Sequence[Colors], from_rows: Marks | None = None, swapped: Marks | None = None
) -> list[list[Decompress]]:
    """Prepare the reading of all Jacobians, by output and input.

    Args:
        problem: its layout says what is read.
        sides: the colors that were pulled, pushed, or both.
        from_rows: for each entry of the pattern inside a sample whether it is read from the side of the rows,
            (entries,) bool; needed where there are two sides.
        swapped: for each entry of a symmetric Jacobian whether its mirror image is read, (entries,) bool.
    """

    def prepare(output: int, position: int) -> Decompress:
        if problem.structure.independent or problem.layout in ("blocks", "diagonal"):
            return _OwnBlocks(problem, sides, (output, position), from_rows, swapped)
        assert len(sides) == 1
        return _WholeBatch(problem, sides[0], output, position)

    return [[prepare(output, position) for position in problem.inputs] for output in range(len(problem.outputs))]


class _OwnBlocks:
    """Every sample has the same entries, all in its own block."""

    def __init__(
        self,
        problem: Problem,
        sides: Sequence[Colors],
        pair: tuple[int, int],
        from_rows: Marks | None,
        swapped: Marks | None,
    ) -> None:
        output, position = pair
        self.problem, self.sides = problem, sides
        self.event, self.leaf = problem.outputs[output], problem.leaves[position]
        pattern = problem.patterns(output, position)[1]
        rows, columns = pattern.rows.astype(np.int64), pattern.columns.astype(np.int64)
        taken = np.ones(pattern.count, dtype=bool) if from_rows is None else _part(problem, output, position, from_rows)
        self.width = pattern.shape[0] * pattern.shape[1]
        places = pattern.places
        if problem.layout == "diagonal":
            own = rows == columns
            rows, columns, taken, places, self.width = rows[own], columns[own], taken[own], rows[own], pattern.shape[0]
        self.places = DeviceIndices(places)
        if swapped is not None:
            rows, columns = np.where(swapped, columns, rows), np.where(swapped, rows, columns)
        self.sources: list[tuple[Colors, list[DeviceIndices]]] = []
        marks = []
        for side in sides:
            mine = np.flatnonzero(taken == (side.side == "rows")) if from_rows is not None else np.arange(len(rows))
            colored, read, at, width = rows[mine], columns[mine], problem.rows(output)[0], pattern.shape[1]
            if side.side == "columns":
                colored, read, at, width = columns[mine], rows[mine], problem.columns(position)[0], pattern.shape[0]
            seeds = side.features[at + colored].astype(np.int64)
            chosen = [seeds * width + read] if side.sample_colors is None else [seeds, read]
            self.sources.append((side, [DeviceIndices(indices) for indices in chosen]))
            marks.append(mine)
        self.order = DeviceIndices(np.argsort(np.concatenate(marks)))

    def __call__(self, compressed: Sequence[Tensor]) -> Tensor:
        parts = [self._read(rows, *source) for rows, source in zip(compressed, self.sources, strict=True)]
        values = parts[0] if len(parts) == 1 else torch.cat(parts, 1)[:, self.order.on(parts[0].device)]
        problem = self.problem
        if problem.layout == "sparse":
            return values.reshape(-1)
        if values.shape[1] < self.width:
            blank = values.new_zeros(problem.batch, self.width)
            values = blank.index_copy(1, self.places.on(values.device), values)
        if problem.layout == "diagonal":
            return values
        blocks = values.reshape(problem.batch, *self.event, *self.leaf.event_shape)
        return embed(blocks, len(self.event)) if problem.layout == "full" else blocks

    def _read(self, compressed: Tensor, side: Colors, chosen: Sequence[DeviceIndices]) -> Tensor:
        """Return the entries (B, entries) of one side."""
        count, batch = compressed.shape[:2]
        if side.sample_colors is None:
            (places,) = chosen
            # sample by sample, as they are written: gathered for all samples at a time, they would lie the other way
            return compressed.movedim(1, 0).reshape(batch, -1).index_select(1, places.on(compressed.device))
        rows = compressed.reshape(count, batch, math.prod(compressed.shape[2:]))
        seeds, read = (indices.on(rows.device) for indices in chosen)
        first = side.sample_colors.on(rows.device) * side.width
        return rows[first[:, None] + seeds, torch.arange(batch, device=rows.device)[:, None], read]


class _WholeBatch:
    """Entries between samples of a graph."""

    def __init__(self, problem: Problem, side: Colors, output: int, position: int) -> None:
        self.problem, self.event, self.leaf = problem, problem.outputs[output], problem.leaves[position]
        pattern = problem.entries(output, position).pattern
        rows, columns = pattern.rows.astype(np.int64), pattern.columns.astype(np.int64)
        (first, last), (start, stop) = problem.rows(output), problem.columns(position)
        colored, read, features, at = rows, columns, last - first, first
        if side.side == "columns":
            colored, read, features, at = columns, rows, stop - start, start
        samples, own = np.divmod(colored, features)
        seeds = side.features[at + own].astype(np.int64)
        if side.samples is not None:
            seeds += side.samples[samples].astype(np.int64) * side.width
        across = pattern.shape[1] if side.side == "rows" else pattern.shape[0]
        self.index = DeviceIndices(seeds * across + read)
        self.places = DeviceIndices(pattern.places) if problem.layout == "full" else None

    def __call__(self, compressed: Sequence[Tensor]) -> Tensor:
        values = compressed[0].reshape(-1)[self.index.on(compressed[0].device)]
        if self.places is None:
            return values
        shape = (self.problem.batch, *self.event, *self.leaf.shape)
        blank = values.new_zeros(math.prod(shape))
        return blank.index_copy(0, self.places.on(values.device), values).reshape(shape)


def _part(problem: Problem, output: int, position: int, from_rows: Marks) -> Marks:
    """Return those of the marks on all entries inside a sample that belong to one output and input."""
    sparsity = problem.structure.sparsity
    assert sparsity is not None and sparsity.features is not None
    marks = sparsity.features.scipy()
    marks.data = from_rows.astype(np.int8) + 1
    (first, last), (start, stop) = problem.rows(output), problem.columns(position)
    part = marks[first:last, start:stop].tocsr()
    part.sort_indices()
    taken: Marks = part.data == 2
    return taken
