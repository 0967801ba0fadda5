"""Colored reverse mode: one VJP for all rows of a color."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from autojac.methods.base import chunk_sizes
from autojac.methods.support.colored_sweeps import ColoredSweeps, pull_colors
from autojac.methods.support.costs import evaluation_cost, pull_cost
from autojac.methods.support.func_runs import FuncRuns
from autojac.problem.compression import Colors, SymmetricColoring, colors_of, nothing_gained, symmetric_rows
from autojac.problem.decompression import decompressors
from autojac.problem.problem import Compute, Problem, Result
from autojac.sparse.symmetric_coloring import Substitution


@dataclass(frozen=True)
class ColoredPull(ColoredSweeps):
    """Reverse mode on compressed rows: func runs once, then one VJP per color.

    Attributes:
        coloring: of the rows of a symmetric Jacobian, such as a Hessian. `star`: of two entries that mirror each other
            one has to stand alone. `acyclic`: one of them has to once others are subtracted, at most 15 of them.
            Between half and all of the seeds remain; small entries lose the digits by which the subtracted ones are
            larger. So it competes only where it has fewer seeds, in float64, whose digits outlast that, and is
            verified like every candidate.
    """

    coloring: SymmetricColoring | None = None

    runs: ClassVar[FuncRuns] = FuncRuns.ONCE

    def unsupported(self, problem: Problem) -> str | None:
        if self.coloring is None:
            return nothing_gained(problem, "rows") or super().unsupported(problem)
        symmetric = symmetric_rows(problem, self.coloring)
        if symmetric is None:
            return "it is not known to be symmetric, with a symmetric pattern that can be colored"
        if nothing_gained(problem, "rows") is None and symmetric[0].count >= colors_of(problem, "rows").count:
            return "symmetry saves no color"
        star = symmetric_rows(problem, "star") if self.coloring == "acyclic" else None
        if star is not None and any(leaf.dtype != "float64" for leaf in problem.leaves):
            return "what is subtracted would take small entries more digits than single precision has"
        if star is not None and symmetric[0].count >= star[0].count:
            return f"a star coloring needs no more than {symmetric[0].count} colors, and nothing is subtracted"
        return super().unsupported(problem)

    def _colors(self, problem: Problem) -> tuple[Colors, Substitution | None]:
        symmetric = None if self.coloring is None else symmetric_rows(problem, self.coloring)
        return (colors_of(problem, "rows"), None) if symmetric is None else symmetric

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        for first in (cls(), cls(coloring="star"), cls(coloring="acyclic")):
            if first.unsupported(problem) is None:
                yield first
                for chunk in chunk_sizes(problem, first._colors(problem)[0].count, depth):
                    yield dataclasses.replace(first, engine="vmap", chunk=chunk)
                    yield dataclasses.replace(first, engine="batched", chunk=chunk)

    def cost(self, problem: Problem) -> float:
        count = self._colors(problem)[0].count
        step = self.step(count)
        return evaluation_cost(problem) + pull_cost(problem, count, step, self.engine)

    def workspace(self, problem: Problem) -> int:
        count = self._colors(problem)[0].count
        compressed = count * problem.item_bytes * problem.batch * problem.in_size
        return compressed + self.step(count) * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        colors, reading = self._colors(problem)
        readers = decompressors(problem, (colors,), reading=reading)

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            values, compressed = pull_colors(problem, colors, self, leaves, kwargs)
            return Result(
                values,
                tuple(tuple(read([c]) for read, c in zip(row, compressed, strict=True)) for row in readers),
            )

        return compute
