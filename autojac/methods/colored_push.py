"""Colored forward mode: one JVP for all columns of a color."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from autojac.autodiff.primitives import load_forward_rules
from autojac.methods.base import Method, chunk_sizes
from autojac.methods.support.colored_sweeps import SweepOptions, push_colors
from autojac.methods.support.costs import assembly_cost, push_cost
from autojac.methods.support.func_runs import FuncRuns
from autojac.problem.compression import colors_of, nothing_gained
from autojac.problem.decompression import decompressor
from autojac.problem.problem import Compute, Problem, Result


@dataclass(frozen=True)
class ColoredPush(Method):
    """Forward mode on compressed columns: one JVP per color.

    Attributes:
        engine: as in `Push`.
        chunk: seeds per pass; None for all.
    """

    engine: Literal["loop", "vmap"] = "loop"
    chunk: int | None = None

    runs: ClassVar[FuncRuns] = FuncRuns.WHOLE_BATCH

    @property
    def makes_sparse(self) -> bool:
        return True

    @property
    def trusts_zeros(self) -> bool:
        return True

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
        step = 1 if self.engine == "loop" else self.chunk or count or 1
        return assembly_cost(problem) + push_cost(problem, count, step, self.engine)

    def workspace(self, problem: Problem) -> int:
        count = colors_of(problem, "columns").count
        compressed = count * problem.item_bytes * problem.batch * problem.out_size
        return compressed + (1 if self.engine == "loop" else self.chunk or count) * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        if self.engine == "vmap":
            load_forward_rules()
        colors = colors_of(problem, "columns")
        readers = [
            [decompressor(problem, (colors,), output, position) for position in problem.inputs]
            for output in range(len(problem.outputs))
        ]

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            values, compressed = push_colors(problem, colors, SweepOptions(self.engine, self.chunk), leaves, kwargs)
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
