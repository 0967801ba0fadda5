"""Cut: the chain rule through the narrowest tensors between inputs and outputs, one side pulled and one pushed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from autojac import cuts, seeds
from autojac.autodiff import Pullback
from autojac.layouts import from_blocks
from autojac.linearize import Engine, puller, pusher
from autojac.methods.base import BYTES_PER_SECOND, Method, build, dispatch_cost, traffic_cost
from autojac.outline import Cutter
from autojac.problem import Compute, Problem, Result
from autojac.recorder import without_autocast

LEAST_WIDTH = 4
"""Below so many rows and columns no cut pays for being looked for."""


@dataclass(frozen=True)
class Bottleneck(Method):
    """J = J_{y←h} · J_{h←x} for the narrowest h that all paths run through.

    func runs once and is recorded; both sides run on its graph.

    Attributes:
        head: how J_{y←h} is computed: `push` the coordinates of h, or `pull` those of y.
        engine: as in `Pull`; a pushing head takes `vmap` over JVPs for `vmap` and `batched`.
        chunk: seeds per pass; None for all.
    """

    head: Literal["push", "pull"] = "push"
    engine: Engine = "vmap"
    chunk: int | None = None

    repeats_func: ClassVar[bool] = False

    @property
    def traceable(self) -> bool:
        return False

    def unsupported(self, problem: Problem) -> str | None:
        if not problem.structure.independent:
            return "samples are coupled, so a narrow place of one sample is not all that leads to its output"
        if problem.shared_input:
            return "an input is shared by all samples, so its rows would be added up over the batch"
        if min(problem.in_size, problem.out_size) < LEAST_WIDTH:
            return f"inputs or outputs have fewer than {LEAST_WIDTH} elements, so nothing narrower is worth a cut"
        if problem.outline is None:
            return "there is no function that could be recorded"
        if problem.outline.reason:
            return problem.outline.reason
        width = _width(problem)
        if width is None or width >= min(problem.in_size, problem.out_size):
            return "nothing between inputs and outputs is narrower than they are"
        return super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        if cls().unsupported(problem) is not None:
            return
        width = _width(problem) or 1
        for engine in ("vmap", "batched", "loop") if depth else ("vmap", "batched"):
            yield cls("push", engine)
            if width > 16:
                yield cls("push", engine, 16)
        if depth:
            yield cls("pull", "vmap")
            yield cls("pull", "loop")

    def cost(self, problem: Problem) -> float:
        count = (_width(problem) or 1) + ((_width(problem) or 1) if self.head == "push" else problem.out_size)
        step = 1 if self.engine == "loop" else self.chunk or count
        # the call itself is watched, then both sides run it again
        made = problem.result_bytes / BYTES_PER_SECOND
        return 3 * dispatch_cost(-(-count // step), self.engine == "vmap") + traffic_cost(problem, count, step) + made

    def workspace(self, problem: Problem) -> int:
        width = _width(problem) or 1
        step = 1 if self.engine == "loop" else self.chunk or max(width, problem.out_size if self.head == "pull" else 0)
        factors = problem.item_bytes * problem.batch * width * (problem.in_size + problem.out_size)
        return factors + step * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        batched = [leaf.batched for leaf in problem.leaves]
        cutter = Cutter(problem.fn, problem.inputs, batched, problem.batch, cuts.bottleneck, problem.differentiable)
        fallback: Any = build({"method": "Pull", "seeds": "shared", "engine": "loop"})

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            recording, cut = cutter(leaves, kwargs)
            if cut is None:
                # another branch than the one that was planned for: what was recorded is still a graph of autograd's
                pullback = Pullback.of_graph(recording.values, recording.inputs, problem.differentiable)
                result: Result = fallback.of_graph(problem, pullback)
                return result
            values = recording.values if problem.differentiable else tuple(y.detach() for y in recording.values)
            graph = recording.graph
            # its graph of autograd is not needed any more
            del recording
            with without_autocast(leaves[0]):
                return Result(values, self._blocks(problem, graph, cut, leaves))

        return compute

    def _blocks(
        self, problem: Problem, graph: Any, cut: cuts.Bottleneck, leaves: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], ...]:
        base = dict(zip(graph.inputs, leaves, strict=True))
        inputs = [graph.inputs[position] for position in problem.inputs]

        def tail(*given: Tensor) -> tuple[Tensor, ...]:
            made: tuple[Tensor, ...] = graph.run(cut.tensors, base | dict(zip(inputs, given, strict=True)))
            return made

        def head(*given: Tensor) -> tuple[Tensor, ...]:
            made: tuple[Tensor, ...] = graph.run(graph.outputs, base | dict(zip(cut.tensors, given, strict=True)))
            return made

        narrow, pull = puller(tail, [leaves[p] for p in problem.inputs], self.engine, problem.differentiable)
        columns = [
            self._each(lambda part, order=order: pull(order, part), _coordinates(h, axis))
            for order, (h, axis) in enumerate(zip(narrow, cut.axes, strict=True))
        ]
        rows = self._head(problem, head, narrow, cut)
        jacobians = []
        for output, event in enumerate(problem.outputs):
            row = []
            for order, position in enumerate(problem.inputs):
                leaf = problem.leaves[position]
                # one product over all tensors of the cut: adding up several would cost a pass over the Jacobian each
                left = torch.cat([part[output] for part in rows])
                right = torch.cat([part[order].reshape(len(part[order]), problem.batch, -1) for part in columns])
                blocks = torch.einsum("kbm,kbn->bmn", left, right.to(left.dtype))
                blocks = blocks.to(leaves[position].dtype).reshape(problem.batch, *event, *leaf.event_shape)
                row.append(from_blocks(problem.layout, blocks, event, batched=True))
            jacobians.append(tuple(row))
        return tuple(jacobians)

    def _head(self, problem: Problem, head: Any, narrow: Sequence[Tensor], cut: cuts.Bottleneck) -> list[list[Tensor]]:
        """For each tensor of the cut and each output (k, B, m)."""
        if self.head == "push":
            push = pusher(head, narrow, "loop" if self.engine == "loop" else "vmap")
            return [
                [part.flatten(2) if part.dim() > 2 else part[..., None] for part in pushed]
                for pushed in (
                    self._each(lambda part, order=order: push(order, part), _coordinates(h, axis))
                    for order, (h, axis) in enumerate(zip(narrow, cut.axes, strict=True))
                )
            ]
        values, pull = puller(head, narrow, self.engine, problem.differentiable)
        pulled = [
            self._each(lambda part, output=output: pull(output, part), _coordinates(value, 0))
            for output, value in enumerate(values)
        ]
        return [
            [
                rows[order].movedim(axis + 1, 1).reshape(len(rows[order]), problem.batch, -1).permute(2, 1, 0)
                for rows in pulled
            ]
            for order, axis in enumerate(cut.axes)
        ]

    def _each(self, run: Any, coordinates: Tensor) -> list[Tensor]:
        """What `run` makes of all seeds, a chunk at a time."""
        step = self.chunk or len(coordinates)
        parts = [run(coordinates[start:stop]) for start, stop in seeds.spans(len(coordinates), step)]
        return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]


def _coordinates(tensor: Tensor, axis: int) -> Tensor:
    """One-hot seeds (k, *shape) of a tensor that carries the batch on an axis, each for every sample."""
    event = (*tensor.shape[:axis], *tensor.shape[axis + 1 :])
    return seeds.shared(event, tensor.shape[axis], tensor).movedim(1, axis + 1)


def _width(problem: Problem) -> int | None:
    cut = problem.outline.bottleneck if problem.outline is not None else None
    return None if cut is None else cut.width
