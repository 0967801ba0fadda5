"""Forward mode: one JVP per seed, many seeds at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.primitives import Bound, load_forward_rules
from autojac.autodiff.seeds import SeedKind, SharedSeeds
from autojac.methods.base import Method
from autojac.methods.support.costs import assembly_cost, chunk_sizes, push_cost
from autojac.methods.support.engines import of_one_input, push
from autojac.methods.support.func_runs import FuncRuns
from autojac.problem.layouts import from_blocks, own_coordinate, own_coordinates, own_sample
from autojac.problem.problem import Compute, Problem, Result, bind

Engine = Literal["loop", "vmap"]


@dataclass(frozen=True)
class Push(Method):
    """Forward mode: one JVP per seed.

    Attributes:
        seeds: `shared` pushes one seed per input coordinate through all samples at once, which is exact for
            independent samples; `identity` pushes one per input element and is exact whatever the coupling.
        engine: `loop` over plain dual numbers, or `vmap` over torch.func.jvp.
        chunk: seeds per pass; None for all.
    """

    seeds: SeedKind
    engine: Engine = "loop"
    chunk: int | None = None

    runs: ClassVar[FuncRuns] = FuncRuns.WHOLE_BATCH

    @property
    def pushes(self) -> bool:
        return True

    def unsupported(self, problem: Problem) -> str | None:
        if self.seeds == "shared" and not problem.structure.independent:
            return "samples are coupled, so pushing one seed through all of them would add up their columns"
        return super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        kind: SeedKind = "shared" if problem.structure.independent else "identity"
        yield cls(kind, "loop")
        count = max(seeds.size(cls._seed_shape(problem, position, kind)) for position in problem.inputs)
        for chunk in chunk_sizes(problem, count, depth):
            yield cls(kind, "vmap", chunk)

    def cost(self, problem: Problem) -> float:
        count = self._seed_count(problem)
        step = 1 if self.engine == "loop" else self.chunk or count
        return assembly_cost(problem) + push_cost(problem, count, step, self.engine)

    def workspace(self, problem: Problem) -> int:
        step = 1 if self.engine == "loop" else self.chunk or self._seed_count(problem)
        return step * problem.seed_bytes

    def _seed_count(self, problem: Problem) -> int:
        return sum(seeds.size(self._seed_shape(problem, position, self.seeds)) for position in problem.inputs)

    @staticmethod
    def _seed_shape(problem: Problem, position: int, kind: SeedKind) -> tuple[int, ...]:
        """Return the shape whose elements are numbered by the seeds of one input."""
        leaf = problem.leaves[position]
        return leaf.event_shape if kind == "shared" else leaf.shape

    def prepare(self, problem: Problem) -> Compute:
        if self.engine == "vmap":
            load_forward_rules()

        made = SharedSeeds()

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            bound, inputs = bind(problem, leaves, kwargs)
            # dual numbers refuse expanded tensors, whose elements share memory
            inputs = tuple(x.contiguous() for x in inputs)
            values: tuple[Tensor, ...] = ()
            columns = []
            for order, position in enumerate(problem.inputs):
                values, column = self._columns(problem, bound, inputs, order, position, made)
                columns.append(column)
            return Result(values, tuple(zip(*columns, strict=True)))

        return compute

    def _columns(
        self,
        problem: Problem,
        bound: Bound,
        inputs: tuple[Tensor, ...],
        order: int,
        position: int,
        made: SharedSeeds,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return all values, and the Jacobian of each output with respect to one input."""
        leaf = problem.leaves[position]
        shape = self._seed_shape(problem, position, self.seeds)
        count = seeds.size(shape)
        whole_batch = self.seeds == "identity" and leaf.batched
        tangents = made(order, shape, problem.batch, inputs[order]) if leaf.batched and not whole_batch else None
        numbers = torch.arange(count, device=inputs[order].device)
        size = seeds.size(leaf.event_shape)
        diagonal = problem.layout == "diagonal"
        values: tuple[Tensor, ...] = ()

        alone = of_one_input(bound, inputs, order)

        def parts() -> Iterator[Sequence[Tensor]]:
            nonlocal values
            for start, stop in seeds.spans(count, 1 if self.engine == "loop" else self.chunk):
                chosen = tangents[start:stop] if tangents is not None else None
                chosen = seeds.identity(shape, start, stop, inputs[order]) if chosen is None else chosen
                values, pushed = push(alone, (inputs[order],), (chosen,), self.engine, problem.structure.draws)
                if whole_batch and problem.layout != "full":
                    pushed = [own_sample(rows, numbers[start:stop], size) for rows in pushed]
                    if diagonal:
                        pushed = [own_coordinate(rows, numbers[start:stop], size) for rows in pushed]
                elif diagonal:
                    pushed = [own_coordinates(rows, start) for rows in pushed]
                yield pushed

        pushed_all = [made.apart(rows) for rows in seeds.collect(parts(), count, problem.differentiable)]
        return values, tuple(
            # like reverse mode, whatever func's output is
            self._arrange(problem, rows.to(inputs[order].dtype), event, position)
            for rows, event in zip(pushed_all, problem.outputs, strict=True)
        )

    def _arrange(self, problem: Problem, rows: Tensor, event: tuple[int, ...], position: int) -> Tensor:
        """Return columns, in the order of the seeds, as a Jacobian of the problem's layout."""
        leaf, batch = problem.leaves[position], problem.batch
        if problem.layout == "diagonal":
            return rows.T if rows.dim() == 2 else rows.view(batch, -1)
        if self.seeds == "identity" and leaf.batched and problem.layout == "blocks":
            per_sample = rows.view(batch, -1, *event)
            return per_sample.movedim(1, -1).reshape(batch, *event, *leaf.event_shape)
        if self.seeds == "identity" and leaf.batched:
            return rows.movedim(0, -1).reshape(batch, *event, *leaf.shape)
        blocks = rows.movedim(0, -1).reshape(batch, *event, *leaf.event_shape)
        return from_blocks(problem.layout, blocks, event, leaf.batched)
