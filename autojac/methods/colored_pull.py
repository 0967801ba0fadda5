"""Colored reverse mode: one VJP for all rows of a color."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from autojac.methods.base import Method, chunk_sizes, dispatch_cost, traffic_cost
from autojac.methods.support.colored_sweeps import SweepOptions, pull_colors
from autojac.methods.support.engines import Engine
from autojac.methods.support.func_runs import FuncRuns
from autojac.problem.compression import colors_of, nothing_gained
from autojac.problem.decompression import decompressor
from autojac.problem.problem import Compute, Problem, Result


@dataclass(frozen=True)
class ColoredPull(Method):
    """Reverse mode on compressed rows: func runs once, then one VJP per color.

    Attributes:
        engine: as in `Pull`.
        chunk: seeds per pass; None for all.
    """

    engine: Engine = "loop"
    chunk: int | None = None

    runs: ClassVar[FuncRuns] = FuncRuns.ONCE

    @property
    def makes_sparse(self) -> bool:
        return True

    @property
    def trusts_zeros(self) -> bool:
        return True

    def unsupported(self, problem: Problem) -> str | None:
        return nothing_gained(problem, "rows") or super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        if cls().unsupported(problem) is not None:
            return
        yield cls("loop")
        for chunk in chunk_sizes(problem, colors_of(problem, "rows").count, depth):
            yield cls("vmap", chunk)
            yield cls("batched", chunk)

    def cost(self, problem: Problem) -> float:
        count = colors_of(problem, "rows").count
        step = 1 if self.engine == "loop" else self.chunk or count or 1
        return dispatch_cost(-(-count // step), self.engine == "vmap") + traffic_cost(problem, count, step)

    def workspace(self, problem: Problem) -> int:
        count = colors_of(problem, "rows").count
        compressed = count * problem.item_bytes * problem.batch * problem.in_size
        return compressed + (1 if self.engine == "loop" else self.chunk or count) * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        colors = colors_of(problem, "rows")
        readers = [
            [decompressor(problem, (colors,), output, position) for position in problem.inputs]
            for output in range(len(problem.outputs))
        ]

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            values, compressed = pull_colors(problem, colors, SweepOptions(self.engine, self.chunk), leaves, kwargs)
            return Result(
                values,
                tuple(tuple(read([c]) for read, c in zip(row, compressed, strict=True)) for row in readers),
            )

        return compute
