"""Reverse mode: one VJP a seed, many seeds at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.primitives import functional_vjp, vmap
from autojac.autodiff.pullback import Pullback
from autojac.autodiff.seeds import SeedKind, SharedSeeds
from autojac.methods.base import Method, chunk_sizes, dispatch_cost, traffic_cost
from autojac.problem.layouts import from_blocks, own_coordinate, own_coordinates, own_sample
from autojac.problem.problem import Compute, Problem, Result, bind, recorded

Engine = Literal["loop", "vmap", "batched"]
PullMany = Callable[[int, Tensor, bool], Sequence[Tensor]]


@dataclass(frozen=True)
class Pull(Method):
    """Reverse mode: func runs once, then one VJP a seed.

    Attributes:
        seeds: `shared` pulls one seed per output coordinate through all samples at once, which is exact for
            independent samples; `identity` pulls one per output element and is exact whatever the coupling.
        engine: `loop` over plain VJPs, `vmap` over torch.func.vjp, or `batched` for `is_grads_batched`.
        chunk: seeds per pass; None for all.
    """

    seeds: SeedKind
    engine: Engine = "loop"
    chunk: int | None = None

    repeats_func: ClassVar[bool] = False

    @property
    def makes_sparse(self) -> bool:
        return self.seeds == "identity"

    def unsupported(self, problem: Problem) -> str | None:
        if self.seeds == "shared" and not problem.structure.independent:
            return "samples are coupled, so pulling one seed through all of them would add up their rows"
        if self.seeds == "shared" and problem.shared_input:
            return "an input is shared by all samples, so its rows would be added up over the batch"
        return super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        kind: SeedKind = "identity"
        if problem.structure.independent and not problem.shared_input:
            kind = "shared"
        count = max(seeds.size(shape) for shape in problem.outputs) * (problem.batch if kind == "identity" else 1)
        yield cls(kind, "loop")
        for chunk in chunk_sizes(problem, count, depth):
            yield cls(kind, "vmap", chunk)
            yield cls(kind, "batched", chunk)

    def cost(self, problem: Problem) -> float:
        count = self._seed_count(problem)
        step = 1 if self.engine == "loop" else self.chunk or count
        return dispatch_cost(-(-count // step), functional=self.engine == "vmap") + traffic_cost(problem, count, step)

    def workspace(self, problem: Problem) -> int:
        step = 1 if self.engine == "loop" else self.chunk or self._seed_count(problem)
        return step * problem.seed_bytes

    def _seed_count(self, problem: Problem) -> int:
        return problem.out_size * (problem.batch if self.seeds == "identity" else 1)

    def prepare(self, problem: Problem) -> Compute:
        made = SharedSeeds()

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            return self._sweep(problem, *self._record(problem, leaves, kwargs), made)

        return compute

    def of_graph(self, problem: Problem, pullback: Pullback) -> Result:
        """The Jacobian of a graph that exists already; the engine must not be `vmap`, which records its own."""
        return self._sweep(problem, pullback.outputs, self._pull_many(pullback), SharedSeeds())

    def _sweep(self, problem: Problem, values: tuple[Tensor, ...], pull: PullMany, made: SharedSeeds) -> Result:
        step = 1 if self.engine == "loop" else self.chunk
        rows = functools.partial(self._shared_rows, made) if self.seeds == "shared" else self._identity_rows
        return Result(values, tuple(rows(problem, index, values, pull, step) for index in range(len(values))))

    def _record(
        self, problem: Problem, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], PullMany]:
        """The values, and a function from (output, cotangents (c, *output), last) to one (c, *input) an input."""
        if self.engine == "vmap":
            values, vjp = functional_vjp(*bind(problem, leaves, kwargs))

            def pull_vmapped(output: int, cotangents: Tensor, last: bool) -> Sequence[Tensor]:
                zeros = [torch.zeros_like(value) for value in values]
                pulled: Sequence[Tensor] = vmap(lambda seed: vjp((*zeros[:output], seed, *zeros[output + 1 :])))(
                    cotangents
                )
                return pulled

            return values, pull_vmapped

        pullback = recorded(problem, leaves, kwargs, problem.differentiable)
        return pullback.outputs, self._pull_many(pullback)

    def _pull_many(self, pullback: Pullback) -> PullMany:
        if self.engine == "batched":
            return lambda output, cotangents, last: pullback(output, cotangents, batched=True, last=last)
        return lambda output, cotangents, last: [
            gradient.unsqueeze(0) for gradient in pullback(output, cotangents[0], last=last)
        ]

    def _shared_rows(
        self,
        made: SharedSeeds,
        problem: Problem,
        output: int,
        values: Sequence[Tensor],
        pull: PullMany,
        step: int | None,
    ) -> tuple[Tensor, ...]:
        event = problem.outputs[output]
        count = seeds.size(event)
        cotangents = made(output, event, problem.batch, values[output])
        final = output == len(values) - 1
        diagonal = problem.layout == "diagonal"
        pulled = []
        for start, stop in seeds.spans(count, step):
            rows = pull(output, cotangents[start:stop], final and stop == count)
            pulled.append([own_coordinates(part, start) for part in rows] if diagonal else rows)
        jacobians = []
        for parts in zip(*pulled, strict=True):
            whole = made.apart(parts[0]) if len(parts) == 1 else torch.cat(parts)
            if diagonal:
                jacobians.append(whole.T)
                continue
            blocks = whole.movedim(0, 1).reshape(problem.batch, *event, *whole.shape[2:])
            jacobians.append(from_blocks(problem.layout, blocks, event, batched=True))
        return tuple(jacobians)

    def _identity_rows(
        self, problem: Problem, output: int, values: Sequence[Tensor], pull: PullMany, step: int | None
    ) -> tuple[Tensor, ...]:
        shape = (problem.batch, *problem.outputs[output])
        count = seeds.size(shape)
        numbers = torch.arange(count, device=values[output].device)
        final = output == len(values) - 1

        def pulled_rows() -> Iterator[tuple[int, int, Sequence[Tensor]]]:
            for start, stop in seeds.spans(count, step):
                cotangents = seeds.identity(shape, start, stop, values[output])
                yield start, stop, pull(output, cotangents, final and stop == count)

        if problem.layout == "sparse":
            kept = [problem.entries(output, position) for position in problem.inputs]
            pieces = [
                [entries.of_rows(rows.flatten(1), start) for entries, rows in zip(kept, pulled, strict=True)]
                for start, _, pulled in pulled_rows()
            ]
            return tuple(map(torch.cat, zip(*pieces, strict=True)))

        def parts() -> Iterator[list[Tensor]]:
            for start, stop, pulled in pulled_rows():
                yield [
                    self._own_part(problem, position, gradient, numbers[start:stop], count // problem.batch)
                    for position, gradient in zip(problem.inputs, pulled, strict=True)
                ]

        arranged = (problem.batch, count // problem.batch) if problem.layout == "diagonal" else shape
        return tuple(rows.unflatten(0, arranged) for rows in seeds.collect(parts(), count, problem.differentiable))

    @staticmethod
    def _own_part(problem: Problem, position: int, gradient: Tensor, numbers: Tensor, size: int) -> Tensor:
        """Of pulled rows (c, *input), what the layout keeps."""
        if problem.layout == "full":
            return gradient
        own = own_sample(gradient, numbers, size) if problem.leaves[position].batched else gradient
        return own_coordinate(own, numbers, size) if problem.layout == "diagonal" else own
