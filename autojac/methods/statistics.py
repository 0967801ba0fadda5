"""Batch statistics: samples that meet only in tensors which all of them share, such as a batch's mean and variance."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from autojac import seeds
from autojac.autodiff import Pullback
from autojac.cuts import Pool, aligned, pool, readers
from autojac.flow import Flow
from autojac.graph import Graph
from autojac.layouts import embed, from_blocks
from autojac.linearize import Engine, puller, pusher
from autojac.methods.base import Method, build, dispatch_cost, traffic_cost
from autojac.outline import Cutter
from autojac.problem import Compute, Problem, Result
from autojac.recorder import without_autocast

CHUNK = 256
Special = Callable[[Mapping[int, Tensor]], Tensor]


@dataclass(frozen=True)
class Shared:
    """A pool in one graph, with the operators that read it and how copies of its tensors stand in there."""

    pool: Pool
    stand_ins: tuple[tuple[int, tuple[tuple[int, str, tuple[int, ...], int], ...]], ...]


@dataclass(frozen=True)
class Statistics(Method):
    """Exact Jacobians of y_b = g(x_b, s) with shared s = S(x): ∂y_b/∂x_c = [b = c] ∂g/∂x_b + ∂g/∂s · ∂s/∂x_c.

    Given s the samples are independent, so one seed serves them all; s has no batch, so one pull an element does.

    Attributes:
        local: how ∂g/∂s is computed for each sample: `copies` gives each sample its own s and pulls the coordinates of
            y; `push` pushes the elements of s, as few as a minimum cut finds.
        engine: as in `Pull`.
        chunk: elements of s per pass.
    """

    local: Literal["copies", "push"] = "copies"
    engine: Engine = "vmap"
    chunk: int = CHUNK

    repeats_func: ClassVar[bool] = False

    @property
    def traceable(self) -> bool:
        return False

    def unsupported(self, problem: Problem) -> str | None:
        if problem.structure.coupling != "statistics":
            return "samples do not meet in shared statistics alone"
        if problem.shared_input:
            return "an input is shared by all samples, so its rows would be added up over the batch"
        if problem.outline is None:
            return "there is no function that could be recorded"
        if problem.outline.reason:
            return problem.outline.reason
        found = self._found(problem)
        if found is None:
            return "samples meet elsewhere than in tensors that all of them share"
        if self.local == "copies" and not found.expandable:
            return "a shared tensor is used by an operator that takes no copy of it for each sample"
        return super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        found = [method for method in (cls("copies"), cls("push")) if method.unsupported(problem) is None]
        for method in found:
            yield method
            yield cls(method.local, "batched")
            if depth or problem.batch >= 4096:
                yield cls(method.local, "vmap", 16)
                yield cls(method.local, "loop")

    def _found(self, problem: Problem) -> Pool | None:
        outline = problem.outline
        if outline is None:
            return None
        return outline.read_pool if self.local == "copies" else outline.least_pool

    def _passes(self, problem: Problem) -> int:
        found = self._found(problem)
        size = found.size if found is not None else problem.out_size * problem.batch
        return problem.out_size + size * (1 if self.local == "copies" else 2)

    def cost(self, problem: Problem) -> float:
        count = self._passes(problem)
        step = 1 if self.engine == "loop" else min(self.chunk, count)
        return 3 * dispatch_cost(-(-count // step), self.engine == "vmap") + traffic_cost(problem, count, step)

    def workspace(self, problem: Problem) -> int:
        count = self._passes(problem)
        step = 1 if self.engine == "loop" else min(self.chunk, count)
        local = problem.item_bytes * problem.batch * problem.out_size * count if self.local == "copies" else 0
        return local + step * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        batched = [leaf.batched for leaf in problem.leaves]
        cutter = Cutter(problem.fn, problem.inputs, batched, problem.batch, self.shared, problem.differentiable)
        fallback: Any = build({"method": "Pull", "seeds": "identity", "engine": "loop"})

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            recording, shared = cutter(leaves, kwargs)
            if shared is None or recording.graph is None:
                # another branch than the one that was planned for: what was recorded is still a graph of autograd's
                pullback = Pullback.of_graph(recording.values, recording.inputs, problem.differentiable)
                result: Result = fallback.of_graph(problem, pullback)
                return result
            values = recording.values if problem.differentiable else tuple(y.detach() for y in recording.values)
            graph = recording.graph
            # its graph of autograd is not needed any more
            del recording
            with without_autocast(leaves[0]):
                return Result(values, self._jacobians(problem, graph, shared, leaves))

        return compute

    def shared(self, flow: Flow, inputs: Sequence[int]) -> Shared | None:
        """The pool of a graph, if this method's way applies to it."""
        found = pool(flow, inputs, least=self.local == "push")
        if found is None or (self.local == "copies" and not found.expandable):
            return None
        stand_ins = []
        if self.local == "copies":
            for place in readers(flow, found.tensors):
                operation = flow.graph.operations[place]
                ways = ((number, aligned(flow, operation, number)) for number in set(operation.sources))
                chosen = [(n, *way) for n, way in ways if n in found.tensors and way is not None]
                stand_ins.append((place, tuple(chosen)))
        return Shared(found, tuple(stand_ins))

    def _jacobians(
        self, problem: Problem, graph: Graph, shared: Shared, leaves: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], ...]:
        blocks, pieces = self.pieces(problem, graph, shared, leaves)
        jacobians = [
            [self._laid_out(problem, part, event) for part in row]
            for event, row in zip(problem.outputs, blocks, strict=True)
        ]
        for felt, reached in pieces:
            for output, event in enumerate(problem.outputs):
                for order, position in enumerate(problem.inputs):
                    through = self._through(problem, felt[output], reached[order], event, position)
                    jacobians[output][order] = jacobians[output][order] + through
        return tuple(tuple(row) for row in jacobians)

    def pieces(
        self, problem: Problem, graph: Graph, shared: Shared, leaves: Sequence[Tensor]
    ) -> tuple[list[list[Tensor]], Iterator[tuple[list[Tensor], Sequence[Tensor]]]]:
        """∂g/∂x as blocks; and for some elements of s at a time ∂g/∂s (k, B, m) and ∂s/∂x (k, B, *in)."""
        tensors, still = shared.pool.tensors, shared.pool.still
        base = dict(zip(graph.inputs, leaves, strict=True))
        inputs = [graph.inputs[position] for position in problem.inputs]
        xs = [leaves[position] for position in problem.inputs]

        def gather(*given: Tensor) -> tuple[Tensor, ...]:
            return graph.run(tensors, base | dict(zip(inputs, given, strict=True)))

        s, pull_s = puller(gather, xs, self.engine, problem.differentiable) if tensors else ((), None)
        held = base | dict(zip(still, graph.run(still, base), strict=True))
        special = {place: _with_copies(graph, place, ways) for place, ways in shared.stand_ins}

        def local(*given: Tensor) -> tuple[Tensor, ...]:
            own = zip((*inputs, *tensors), given, strict=True)
            return graph.run(graph.outputs, held | dict(own), special)

        copies = [t.expand(problem.batch, *t.shape) for t in s] if self.local == "copies" else list(s)
        values, pull = puller(local, (*xs, *copies), self.engine, problem.differentiable)
        parts = [self._each(pull, output, _coordinates(value)) for output, value in enumerate(values)]
        blocks = [
            [
                rows[order].movedim(0, 1).reshape(problem.batch, *event, *problem.leaves[position].event_shape)
                for order, position in enumerate(problem.inputs)
            ]
            for event, rows in zip(problem.outputs, parts, strict=True)
        ]
        push = pusher(lambda *given: local(*xs, *given), list(s), "loop" if self.engine == "loop" else "vmap")

        def through() -> Iterator[tuple[list[Tensor], Sequence[Tensor]]]:
            for number, tensor in enumerate(s):
                for start, stop in seeds.spans(tensor.numel(), 1 if self.engine == "loop" else self.chunk):
                    elements = seeds.identity(tuple(tensor.shape), start, stop, tensor)
                    assert pull_s is not None
                    reached = pull_s(number, elements)
                    if self.local == "copies":
                        own = [rows[len(xs) + number] for rows in parts]
                        felt = [part.reshape(*part.shape[:2], -1)[..., start:stop].permute(2, 1, 0) for part in own]
                    else:
                        felt = [part.reshape(*part.shape[:2], -1) for part in push(number, elements)]
                    yield felt, reached

        return blocks, through()

    def _each(self, pull: Any, output: int, cotangents: Tensor) -> list[Tensor]:
        step = 1 if self.engine == "loop" else self.chunk
        parts = [pull(output, cotangents[a:b]) for a, b in seeds.spans(len(cotangents), step)]
        return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]

    @staticmethod
    def _laid_out(problem: Problem, blocks: Tensor, event: tuple[int, ...]) -> Tensor:
        """∂g/∂x, given s, in the layout asked for."""
        if problem.layout == "full":
            return embed(blocks, len(event))
        return from_blocks(problem.layout, blocks, event, batched=True)

    @staticmethod
    def _through(problem: Problem, felt: Tensor, reached: Tensor, event: tuple[int, ...], position: int) -> Tensor:
        """What comes by way of some elements of s: ∂g/∂s (k, B, m) times ∂s/∂x (k, B, *in)."""
        leaf = problem.leaves[position]
        reached = reached.flatten(2) if reached.dim() > 2 else reached[..., None]
        felt = felt.to(reached.dtype)
        if problem.layout == "full":
            return torch.einsum("kbm,kcn->bmcn", felt, reached).reshape(problem.batch, *event, *leaf.shape)
        if problem.layout == "diagonal":
            return torch.einsum("kbm,kbm->bm", felt, reached)
        return torch.einsum("kbm,kbn->bmn", felt, reached).reshape(problem.batch, *event, *leaf.event_shape)


def _coordinates(value: Tensor) -> Tensor:
    return seeds.shared(tuple(value.shape[1:]), len(value), value)


def _with_copies(graph: Graph, place: int, ways: Sequence[tuple[int, str, tuple[int, ...], int]]) -> Special:
    """An operator that reads, for some shared tensors, the copy (B, *shape) that each sample has."""
    operation = graph.operations[place]

    def run(env: Mapping[int, Tensor]) -> Tensor:
        given: dict[int, Tensor] = {}
        for number, way, shape, axis in ways:
            copies = env[number]
            if way == "broadcast":
                # the batch changes places with an axis of length one
                given[number] = copies.reshape(len(copies), *shape).transpose(0, axis + 1).squeeze(0)
                continue
            left = env[operation.sources[0]]
            made = left.unsqueeze(1) @ copies if way == "mm" else (left * copies).sum(-1, keepdim=True)
            return made.squeeze(1)
        made = operation(ChainMap(given, dict(env)))[0]
        assert isinstance(made, Tensor)
        return made

    return run
