"""Colored reverse mode: one VJP for all rows of a color."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from autojac.methods.support.colored_sweeps import ColoredSweeps, pull_colors
from autojac.methods.support.costs import chunk_sizes, evaluation_cost, pull_cost
from autojac.methods.support.func_runs import FuncRuns
from autojac.problem.compression import Colors, colors_of, mirrored_rows, nothing_gained
from autojac.problem.decompression import decompressors
from autojac.problem.problem import Compute, Problem, Result


@dataclass(frozen=True)
class ColoredPull(ColoredSweeps):
    """Reverse mode on compressed rows: func runs once, then one VJP per color.

    Attributes:
        coloring: `star` reads a symmetric Jacobian, such as a Hessian, by a star coloring of its rows: of two entries
            that mirror each other one has to stand alone.
    """

    coloring: Literal["star"] | None = None

    runs: ClassVar[FuncRuns] = FuncRuns.ONCE

    def unsupported(self, problem: Problem) -> str | None:
        if self.coloring == "star":
            mirrored, rows = mirrored_rows(problem), nothing_gained(problem, "rows")
            if mirrored is None:
                return "it is not known to be symmetric, with a symmetric pattern that can be star-colored"
            if rows is None and mirrored[0].count >= colors_of(problem, "rows").count:
                return "symmetry saves no color"
            return super().unsupported(problem)
        return nothing_gained(problem, "rows") or super().unsupported(problem)

    def _colors(self, problem: Problem) -> Colors:
        mirrored = mirrored_rows(problem) if self.coloring == "star" else None
        return colors_of(problem, "rows") if mirrored is None else mirrored[0]

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        for first in (cls(), cls(coloring="star")):
            if first.unsupported(problem) is None:
                yield first
                for chunk in chunk_sizes(problem, first._colors(problem).count, depth):
                    yield dataclasses.replace(first, engine="vmap", chunk=chunk)
                    yield dataclasses.replace(first, engine="batched", chunk=chunk)

    def cost(self, problem: Problem) -> float:
        count = self._colors(problem).count
        step = self.step(count)
        return evaluation_cost(problem) + pull_cost(problem, count, step, self.engine)

    def workspace(self, problem: Problem) -> int:
        count = self._colors(problem).count
        compressed = count * problem.item_bytes * problem.batch * problem.in_size
        return compressed + self.step(count) * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        colors = self._colors(problem)
        mirrored = mirrored_rows(problem) if self.coloring == "star" else None
        swapped = None if mirrored is None else mirrored[1]
        readers = decompressors(problem, (colors,), swapped=swapped)

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            values, compressed = pull_colors(problem, colors, self, leaves, kwargs)
            return Result(
                values,
                tuple(tuple(read([c]) for read, c in zip(row, compressed, strict=True)) for row in readers),
            )

        return compute
