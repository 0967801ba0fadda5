"""Colored reverse mode: one VJP for all rows of a color."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from autojac import seeds
from autojac.autodiff import Pullback, functional_vjp, vmap
from autojac.compression import Colors, colors_of, nothing_gained
from autojac.decompression import decompressor
from autojac.methods.base import Method, chunk_sizes, collect, dispatch_cost, traffic_cost
from autojac.methods.pull import Engine
from autojac.problem import Compute, Problem, Result, bind


@dataclass(frozen=True)
class ColoredPull(Method):
    """Reverse mode on compressed rows: func runs once, then one VJP a color.

    Attributes:
        engine: as in `Pull`.
        chunk: seeds per pass; None for all.
    """

    engine: Engine = "loop"
    chunk: int | None = None

    repeats_func: ClassVar[bool] = False

    @property
    def makes_sparse(self) -> bool:
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
        step = 1 if self.engine == "loop" else self.chunk or count
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
            values, compressed = self.compress(problem, colors, leaves, kwargs)
            return Result(
                values,
                tuple(tuple(read([c]) for read, c in zip(row, compressed, strict=True)) for row in readers),
            )

        return compute

    def compress(
        self, problem: Problem, colors: Colors, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The values, and for each input what all seeds brought: (seeds, B, *event)."""
        bound, inputs = bind(problem, leaves, kwargs)
        spans = [problem.rows(output) for output in range(len(problem.outputs))]
        if self.engine == "vmap":
            values, vjp = functional_vjp(bound, inputs)

            def pull(cotangents: list[Tensor], last: bool) -> Sequence[Tensor]:
                pulled: Sequence[Tensor] = vmap(lambda *own: vjp(own))(*cotangents)
                return pulled
        else:
            pullback = Pullback(bound, inputs, problem.differentiable)
            values = pullback.outputs

            def pull(cotangents: list[Tensor], last: bool) -> Sequence[Tensor]:
                if self.engine == "batched":
                    return pullback.pull(pullback.recorded, cotangents, batched=True, last=last)
                return [one[None] for one in pullback.pull(pullback.recorded, [c[0] for c in cotangents], last=last)]

        def parts() -> Iterator[Sequence[Tensor]]:
            for start, stop in seeds.spans(colors.count, 1 if self.engine == "loop" else self.chunk):
                yield pull(colors.seeds(start, stop, spans, values), stop == colors.count)

        if not colors.count:
            return values, [x.new_zeros(0, *x.shape) for x in inputs]
        return values, collect(parts(), colors.count, problem.differentiable)
