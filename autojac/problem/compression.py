"""Compressed Jacobians: one seed for all rows (or columns) of a color, and where each entry is read from the result.

Curtis, Powell & Reid (1974): rows that share no column may be pulled together, since each entry of their sum belongs to
one of them. Samples and features are colored apart, and a seed is a color of samples with a color of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from autojac.core.pattern import Indices, Marks, Pattern
from autojac.problem.problem import Problem
from autojac.sparse.bicoloring import is_read_from_rows
from autojac.sparse.colorings import Colorings, Side
from autojac.sparse.star_coloring import is_symmetric, is_within_reach, mirrored_reading, star

PartOfJacobian = Literal["all", "blocks", "diagonals"]
"""Of the Jacobian of a batch: the whole, each sample's block, or the diagonal of each block."""

MOST_COUPLED = 4096
"""Samples coupled all with all, beyond which no pattern of every pair is made."""


class DeviceIndices:
    """An array of indices as a tensor (int64), copied once to each device that asks for it."""

    def __init__(self, array: Indices) -> None:
        self.tensor = torch.from_numpy(array.astype(np.int64))
        self._copies = {self.tensor.device: self.tensor}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            self._copies[device] = self.tensor.to(device)
        return self._copies[device]


class Colors:
    """The colors of one side of a problem: rows to pull, or columns to push.

    Args:
        side: `rows` (outputs) or `columns` (inputs).
        samples: color of each sample, (B,); None where one serves all.
        features: color of each feature of a sample, counted through all outputs or inputs; -1 where it needs no seed.

    Attributes:
        groups, width: colors of samples, and of features.
        count: seeds in all: number s has samples of color s // width and features of color s % width.
    """

    def __init__(self, side: Side, samples: Indices | None, features: Indices) -> None:
        self.side = side
        self.samples = samples
        self.features = features
        self.groups = 1 if samples is None else int(samples.max(initial=0)) + 1
        self.width = int(features.max(initial=-1)) + 1
        self.count = self.groups * self.width
        self.sample_colors = None if samples is None else DeviceIndices(samples)
        self.feature_colors = DeviceIndices(features)
        self._masks: dict[tuple[torch.device, torch.dtype], tuple[Tensor | None, Tensor]] = {}

    def seeds(self, start: int, stop: int, spans: Sequence[tuple[int, int]], like: Sequence[Tensor]) -> list[Tensor]:
        """Return seeds number `start` to `stop` for several tensors (B, *event): one (c, B, *event) each.

        Args:
            start, stop: which seeds.
            spans: where each tensor's features lie among all, as (start, stop).
            like: the tensors.
        """
        made = []
        for (first, last), tensor in zip(spans, like, strict=True):
            numbers = torch.arange(start, stop, device=tensor.device)
            kind = tensor.device, tensor.dtype
            if kind not in self._masks:
                self._masks[kind] = self._one_hot_colors(tensor)
            samples, features = self._masks[kind]
            seed = features[numbers % self.width, first:last].view(stop - start, 1, *tensor.shape[1:])
            if samples is None:
                made.append(seed.expand(stop - start, *tensor.shape))
                continue
            chosen = samples[numbers // self.width]
            made.append(chosen.view(stop - start, len(tensor), *[1] * (tensor.dim() - 1)) * seed)
        return made

    def _one_hot_colors(self, tensor: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return one-hot colors (colors, B) of samples and (colors, features) of features, like a tensor."""
        samples = None if self.sample_colors is None else _one_hot(self.sample_colors, self.groups, tensor)
        return samples, _one_hot(self.feature_colors, self.width, tensor)


def _one_hot(colors: DeviceIndices, count: int, like: Tensor) -> Tensor:
    numbers = torch.arange(count, device=like.device)
    return (colors.on(like.device)[None] == numbers[:, None]).to(like.dtype)


def colors_of(problem: Problem, side: Side) -> Colors:
    """Return colors for one side of a problem: as few seeds as its layout needs."""
    structure = problem.structure
    samples = structure.samples if problem.batch > 1 else None
    alike = samples is None and not structure.independent
    features = None if structure.sparsity is None else structure.sparsity.features
    part: PartOfJacobian = "blocks" if problem.layout in ("blocks", "diagonal") else "all"
    if problem.layout == "diagonal" and len(problem.outputs) == len(problem.inputs) == 1:
        part = "diagonals"
    count = problem.out_size if side == "rows" else problem.in_size
    return problem.colorings.derive(_colors, side, samples, features, part, count, problem.batch if alike else 1)


def _colors(
    colorings: Colorings,
    side: Side,
    samples: Pattern | None,
    features: Pattern | None,
    part: PartOfJacobian,
    count: int,
    batch: int,
) -> Colors:
    """Return colors that keep apart what reads the same entries.

    Args:
        colorings: makes and keeps them.
        side: rows or columns.
        samples, features: the patterns; all for None of the features.
        part: where only each sample's block is asked for, samples of one color must not reach each other, but may
            reach the same ones; where only diagonals of blocks are, the same goes for features.
        count: number of features.
        batch: number of samples that are coupled all with all, without a graph.
    """
    sample_colors: Indices | None = np.arange(batch, dtype=np.int32) if batch > 1 else None
    if samples is not None:
        sample_colors = colorings.apart(samples) if part != "all" else colorings.orthogonal(samples, side)
    if features is None:
        return Colors(side, sample_colors, np.arange(count, dtype=np.int32))
    colors = colorings.apart(features) if part == "diagonals" else colorings.orthogonal(features, side)
    return Colors(side, sample_colors, colors)


def both_sides(problem: Problem) -> tuple[Colors, Colors, Marks]:
    """Return colors of rows and columns that read every entry of independent samples together, and which read which.

    Returns:
        Rows, columns, and for each entry of the pattern inside a sample whether it is read from the rows, (entries,).
    """
    sparsity = problem.structure.sparsity
    assert sparsity is not None and sparsity.features is not None
    return problem.colorings.derive(_both, sparsity.features)


def _both(colorings: Colorings, features: Pattern) -> tuple[Colors, Colors, Marks]:
    rows, columns = colorings.both(features)
    return Colors("rows", None, rows), Colors("columns", None, columns), is_read_from_rows(features, rows, columns)


def mirrored_rows(problem: Problem) -> tuple[Colors, Marks] | None:
    """Return colors of the rows of a symmetric Jacobian, and which entries are read as their mirror images.

    None where nothing is known to be symmetric, or its pattern is not or is too large.
    """
    sparsity = problem.structure.sparsity
    if not problem.symmetric or not problem.structure.independent or problem.layout == "diagonal":
        return None
    if sparsity is None or sparsity.features is None or len(problem.outputs) > 1 or len(problem.inputs) > 1:
        return None
    return problem.colorings.derive(_color_mirrored_rows, sparsity.features)


def _color_mirrored_rows(colorings: Colorings, features: Pattern) -> tuple[Colors, Marks] | None:
    if not is_symmetric(features) or not is_within_reach(features):
        return None
    colors = star(features)
    swapped = mirrored_reading(features, colors)
    return None if swapped is None else (Colors("rows", None, colors), swapped)


def inapplicable(problem: Problem) -> str | None:
    """Return why a problem can't be colored, as a sentence; None if it can."""
    structure = problem.structure
    if problem.shared_input:
        return "an input is shared by all samples, so what its columns bring would be added up over the batch"
    if structure.sparsity is None and not (problem.layout == "sparse" and not structure.independent):
        return "no zeros are known that colors could save"
    if (structure.samples is None and not structure.independent) and problem.batch > MOST_COUPLED:
        return f"samples are coupled without a graph, and {problem.batch} of them are too many to color one by one"
    return None


def nothing_gained(problem: Problem, side: Side) -> str | None:
    """Return why colors of one side are of no use to a problem, as a sentence; None if they are."""
    reason = inapplicable(problem)
    if reason is not None:
        return reason
    structure = problem.structure
    kind = "VJPs of rows" if side == "rows" else "JVPs of columns"
    plain = (problem.out_size if side == "rows" else problem.in_size) * (1 if structure.independent else problem.batch)
    if colors_of(problem, side).count >= plain and problem.layout != "sparse":
        return f"colors save none of the {plain} {kind}"
    return None


def describe_colors(problem: Problem) -> list[str]:
    """Return what colors save, human-readable."""
    if problem.structure.sparsity is None or problem.shared_input:
        return []
    samples = 1 if problem.structure.independent else problem.batch
    plain = {"rows": problem.out_size * samples, "columns": problem.in_size * samples}
    sides: tuple[Side, Side] = ("rows", "columns")
    counts = [f"{colors_of(problem, side).count} of {plain[side]} {side}" for side in sides]
    cost = f", found in {1e3 * problem.colorings.seconds:.3g} ms" if problem.colorings.seconds else ""
    return [f"colors: passes for {' or '.join(counts)}{cost}"]
