"""Colored forward mode: one JVP for all columns of a color."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from autojac import seeds
from autojac.autodiff import functional_jvp, load_forward_rules, push_dual, vmap
from autojac.compression import Colors, colors_of, nothing_gained
from autojac.decompression import decompressor
from autojac.methods.base import Method, chunk_sizes, collect, dispatch_cost, traffic_cost
from autojac.methods.push import Engine
from autojac.problem import Compute, Problem, Result, bind


@dataclass(frozen=True)
class ColoredPush(Method):
    """Forward mode on compressed columns: one JVP a color.

    Attributes:
        engine: as in `Push`.
        chunk: seeds per pass; None for all.
    """

    engine: Engine = "loop"
    chunk: int | None = None

    whole_batch: ClassVar[bool] = True

    @property
    def makes_sparse(self) -> bool:
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
        step = 1 if self.engine == "loop" else self.chunk or count
        # every pass evaluates func again, and dual numbers double its operators
        return 2 * dispatch_cost(-(-count // step), self.engine == "vmap") + traffic_cost(problem, count, step)

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
            values, compressed = self.compress(problem, colors, leaves, kwargs)
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

    def compress(
        self, problem: Problem, colors: Colors, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The values, and for each output what all seeds brought: (seeds, B, *event)."""
        bound, inputs = bind(problem, leaves, kwargs)
        # dual numbers refuse expanded tensors, whose elements share memory
        inputs = tuple(x.contiguous() for x in inputs)
        spans = [problem.columns(position) for position in problem.inputs]
        values: tuple[Tensor, ...] = ()

        def parts() -> Iterator[Sequence[Tensor]]:
            nonlocal values
            for start, stop in seeds.spans(colors.count, 1 if self.engine == "loop" else self.chunk):
                tangents = colors.seeds(start, stop, spans, inputs)
                if self.engine == "loop":
                    found, pushed = push_dual(bound, inputs, [t[0] for t in tangents])
                    values = tuple(found)
                    yield [one[None] for one in pushed]
                    continue
                # a draw belongs to the batch, not to a tangent
                push = vmap(lambda *own: functional_jvp(bound, inputs, own), draws=problem.structure.draws)
                found, pushed = push(*tangents)
                values = tuple(value[0] for value in found)
                yield list(pushed)

        if not colors.count:
            values = problem.fn(leaves, kwargs)
            return values, [y.new_zeros(0, *y.shape) for y in values]
        compressed = collect(parts(), colors.count, problem.differentiable)
        return values, compressed
