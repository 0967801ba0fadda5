"""Colored forward mode: one JVP for all columns of a color."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from autojac.autodiff.primitives import load_forward_rules
from autojac.methods.support.colored_sweeps import ColoredSweeps, push_colors
from autojac.methods.support.costs import assembly_cost, chunk_sizes, push_cost
from autojac.methods.support.func_runs import FuncRuns
from autojac.problem.compression import colors_of, nothing_gained
from autojac.problem.decompression import decompressors
from autojac.problem.problem import Compute, Problem, Result


@dataclass(frozen=True)
class ColoredPush(ColoredSweeps):
    """Forward mode on compressed columns: one JVP per color."""

    runs: ClassVar[FuncRuns] = FuncRuns.WHOLE_BATCH

    @property
    def pushes(self) -> bool:
        return True

    def unsupported(self, problem: Problem) -> str | None:
        return nothing_gained(problem, "columns") or super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        if cls().unsupported(problem) is not None:
            return
        yield cls("loop")
        for chunk in chunk_sizes(problem, colors_of(problem, "columns").count, depth):
            yield cls("vmap", chunk)

    def cost(self, problem: Problem) -> float:
        count = colors_of(problem, "columns").count
        step = self.step(count)
        return assembly_cost(problem) + push_cost(problem, count, step, self.engine)

    def workspace(self, problem: Problem) -> int:
        count = colors_of(problem, "columns").count
        compressed = count * problem.item_bytes * problem.batch * problem.out_size
        return compressed + self.step(count) * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        if self.engine == "vmap":
            load_forward_rules()
        colors = colors_of(problem, "columns")
        readers = decompressors(problem, (colors,))

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            values, compressed = push_colors(problem, colors, self, leaves, kwargs)
            # like reverse mode, whatever func's output is
            dtypes = [leaves[position].dtype for position in problem.inputs]
            return Result(
                values,
                tuple(
                    tuple(read([c]).to(dtype) for read, dtype in zip(row, dtypes, strict=True))
                    for row, c in zip(readers, compressed, strict=True)
                ),
            )

        return compute
