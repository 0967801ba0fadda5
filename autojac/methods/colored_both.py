"""Colored rows and columns together: each entry is read from the side that has it alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from autojac.autodiff.primitives import load_forward_rules
from autojac.methods.support.colored_sweeps import ColoredSweeps, pull_colors, push_colors
from autojac.methods.support.costs import evaluation_cost, pull_cost, push_cost
from autojac.methods.support.func_runs import FuncRuns
from autojac.problem.compression import both_sides, colors_of, inapplicable
from autojac.problem.decompression import decompressors
from autojac.problem.problem import Compute, Problem, Result


@dataclass(frozen=True)
class ColoredBoth(ColoredSweeps):
    """Some rows pulled and some columns pushed, where one side alone would need more colors, as for an arrowhead.

    Star bicoloring, after Coleman & Verma (1998) and Hossain & Steihaug (1998).
    """

    runs: ClassVar[FuncRuns] = FuncRuns.WHOLE_BATCH

    @property
    def pushes(self) -> bool:
        return True

    def unsupported(self, problem: Problem) -> str | None:
        if not problem.structure.independent:
            return "samples are coupled: their graph is colored from one side"
        if problem.layout == "diagonal":
            return "a diagonal is read from one side"
        if problem.structure.sparsity is None or problem.structure.sparsity.features is None:
            return "no zeros inside a sample are known that colors could save"
        reason = inapplicable(problem)
        if reason is None and _count(problem) >= min(colors_of(problem, side).count for side in ("rows", "columns")):
            reason = "one side alone needs no more colors"
        return reason or super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        if cls().unsupported(problem) is None:
            yield cls("loop")
            yield cls("vmap")

    def cost(self, problem: Problem) -> float:
        count = _count(problem)
        step = self.step(count)
        pulled = pull_cost(problem, count // 2, step, self.engine)
        return evaluation_cost(problem) + pulled + push_cost(problem, -(-count // 2), step, self.engine)

    def workspace(self, problem: Problem) -> int:
        rows, columns, _ = both_sides(problem)
        compressed = rows.count * problem.in_size + columns.count * problem.out_size
        step = self.step(max(rows.count, columns.count))
        return compressed * problem.item_bytes * problem.batch + step * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        if self.engine == "vmap":
            load_forward_rules()
        rows, columns, from_rows = both_sides(problem)
        readers = decompressors(problem, (rows, columns), from_rows)

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            values, pulled = pull_colors(problem, rows, self, leaves, kwargs)
            _, pushed = push_colors(problem, columns, self, leaves, kwargs)
            return Result(
                values,
                tuple(
                    tuple(read([p, q.to(p.dtype)]) for read, p in zip(row, pulled, strict=True))
                    for row, q in zip(readers, pushed, strict=True)
                ),
            )

        return compute


def _count(problem: Problem) -> int:
    rows, columns, _ = both_sides(problem)
    return rows.count + columns.count
