"""The derivatives of y_b = g(x_b, s) with s = S(x) from one recorded call: of g in x and s, and of S in x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from autojac.autodiff import seeds
from autojac.graph.cuts.shared_tensors import SharedTensors
from autojac.graph.ir import Graph
from autojac.methods.support.engines import Engine, each, puller, pusher
from autojac.problem.problem import Problem

Local = Literal["copies", "mixed", "push"]
Piece = tuple[list[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class SharedStatistics:
    """One recorded call and what its samples share.

    Attributes:
        problem, graph, pool, leaves: of the call.
        local, engine, chunk: as in `Statistics`.
    """

    problem: Problem
    graph: Graph
    pool: SharedTensors
    leaves: Sequence[Tensor]
    local: Local
    engine: Engine
    chunk: int

    @property
    def step(self) -> int:
        return 1 if self.engine == "loop" else self.chunk

    def pieces(self) -> tuple[list[list[Tensor]], Iterator[Piece]]:
        """Return ∂g/∂x as blocks; and for some elements of s at a time ∂g/∂s (k, B, m) and ∂s/∂x (k, B, *in).

        For an input without a batch ∂g/∂x is (B, *out, *in), and ∂s/∂x (k, *in).
        """
        problem, graph, pool, batch = self.problem, self.graph, self.pool, self.problem.batch
        base = dict(zip(graph.inputs, self.leaves, strict=True))
        numbers = [graph.inputs[position] for position in problem.inputs]
        xs = [self.leaves[position] for position in problem.inputs]

        def gather(*given: Tensor) -> tuple[Tensor, ...]:
            return graph.run(pool.tensors, {**base, **dict(zip(numbers, given, strict=True))})

        pulls_s = puller(gather, xs, self.engine, problem.differentiable) if pool.tensors else None
        s = () if pulls_s is None else pulls_s.values
        fixed = {**base, **dict(zip(pool.without_derivative, graph.run(pool.without_derivative, base), strict=True))}
        carriers = [order for order, position in enumerate(problem.inputs) if problem.leaves[position].batched]
        own = [xs[order] for order in carriers]
        weights = [w.expand(batch, *w.shape) for w in graph.run(pool.weights, base)]
        local = pool.as_function_of(graph, fixed, [numbers[order] for order in carriers], copies=self.local == "copies")
        if self.local == "push":
            blocks, parts = self._push(local, own, s), []
        else:
            copies = [t.expand(batch, *t.shape) for t in s] if self.local == "copies" else list(s)
            pulls = puller(local, (*own, *weights, *copies), self.engine, problem.differentiable)
            parts = [
                each(partial(pulls.one, output), _coordinates(value), self.step)
                for output, value in enumerate(pulls.values)
            ]
            blocks = [self._blocks(rows, event, base) for event, rows in zip(problem.outputs, parts, strict=True)]
        push = pusher(
            lambda *given: local(*own, *weights, *given), list(s), "loop" if self.engine == "loop" else "vmap"
        )

        def through() -> Iterator[Piece]:
            for number, tensor in enumerate(s):
                for start, stop in seeds.spans(tensor.numel(), self.step):
                    elements = seeds.identity(tuple(tensor.shape), start, stop, tensor)
                    assert pulls_s is not None
                    ds_dx = pulls_s.one(number, elements)
                    if self.local == "copies":
                        rows = [part[len(own) + len(weights) + number] for part in parts]
                        dg_ds = [part.reshape(*part.shape[:2], -1)[..., start:stop].permute(2, 1, 0) for part in rows]
                    else:
                        dg_ds = [part.reshape(*part.shape[:2], -1) for part in push(number, elements)]
                    yield dg_ds, ds_dx

        return blocks, through()

    def _push(
        self, local: Callable[..., tuple[Tensor, ...]], own: Sequence[Tensor], s: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """Return ∂g/∂x by one push for each coordinate of x: given s, one serves all samples."""
        problem = self.problem
        push = pusher(lambda *given: local(*given, *s), own, "loop" if self.engine == "loop" else "vmap")
        columns = [each(partial(push, order), _coordinates(x), self.step) for order, x in enumerate(own)]
        return [
            [
                part[output]
                .movedim(0, -1)
                .reshape(problem.batch, *event, *problem.leaves[position].event_shape)
                .to(x.dtype)
                for part, x, position in zip(columns, own, problem.inputs, strict=True)
            ]
            for output, event in enumerate(problem.outputs)
        ]

    def _blocks(self, rows: Sequence[Tensor], event: tuple[int, ...], base: Mapping[int, Tensor]) -> list[Tensor]:
        """Make the blocks of every input from rows (m, B, *shape) of inputs with a batch and of copies of weights."""
        problem, rest = self.problem, iter(rows)
        blocks: list[Tensor | None] = []
        for position in problem.inputs:
            leaf = problem.leaves[position]
            blocks.append(
                next(rest).movedim(0, 1).reshape(problem.batch, *event, *leaf.event_shape) if leaf.batched else None
            )
        for number in self.pool.weights:
            cotangents = next(rest).movedim(0, 1).flatten(0, 1)
            for order, pulled in self._pull_to_inputs(number, cotangents, base):
                part = pulled.reshape(problem.batch, *event, *pulled.shape[1:])
                before = blocks[order]
                blocks[order] = part if before is None else before + part
        return [
            block
            if block is not None
            else self.leaves[position].new_zeros(problem.batch, *event, *problem.leaves[position].event_shape)
            for position, block in zip(problem.inputs, blocks, strict=True)
        ]

    def _pull_to_inputs(
        self, number: int, cotangents: Tensor, base: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Return cotangents of what is read of weights, (c, *shape), as those of the inputs that it is made of."""
        graph = self.graph
        order_of = {
            graph.inputs[p]: order for order, p in enumerate(self.problem.inputs) if not self.problem.leaves[p].batched
        }
        if number in order_of:
            yield order_of[number], cotangents
            return
        needed = (graph.operations[place] for place in graph.find_needed((number,), frozenset()))
        made_of = {source for operation in needed for source in operation.sources}
        weights = [n for n in order_of if n in made_of]

        def read(*given: Tensor) -> tuple[Tensor, ...]:
            return graph.run((number,), {**base, **dict(zip(weights, given, strict=True))})

        engine: Engine = "vmap" if self.engine == "vmap" else "batched"
        pulls = puller(read, [base[n] for n in weights], engine, self.problem.differentiable)
        yield from zip((order_of[n] for n in weights), pulls.one(0, cotangents), strict=True)


def _coordinates(value: Tensor) -> Tensor:
    return seeds.shared_seeds(tuple(value.shape[1:]), len(value), value)
