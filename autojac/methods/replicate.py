"""Tile the batch once per seed and differentiate one plain pass: needs no vmap rule of any operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.primitives import Mode, push_dual
from autojac.autodiff.pullback import Pullback
from autojac.methods.base import Method
from autojac.methods.support.costs import assembly_cost
from autojac.problem.layouts import from_blocks
from autojac.problem.problem import Compute, Problem, Result, bind


@dataclass(frozen=True)
class Replicate(Method):
    """One pass over a batch of (seeds × B) samples, each replica of the batch with its own seed.

    Attributes:
        mode: `reverse` pulls one seed per output coordinate, `forward` pushes one per input coordinate.
    """

    mode: Mode

    @property
    def pushes(self) -> bool:
        return self.mode == "forward"

    def unsupported(self, problem: Problem) -> str | None:
        if not problem.structure.independent:
            return "samples are coupled, so a tiled batch has other outputs than the batch"
        if not problem.structure.sliceable:
            return "func of a tiled batch is not the tiled output: it depends on the rest of the batch"
        if problem.batch == 1 and problem.structure.assurance == "observed":
            return "a batch of one shows nothing of how samples are coupled, and in a tiled one they would be"
        if problem.shared_input:
            return "an input is shared by all samples, so it can't be tiled with the batch"
        return super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        yield cls("reverse")
        yield cls("forward")

    def _seed_count(self, problem: Problem) -> int:
        return problem.out_size if self.mode == "reverse" else problem.in_size

    def cost(self, problem: Problem) -> float:
        count = self._seed_count(problem)
        machine, work = problem.machine, problem.work
        each = machine.dual_s if self.mode == "forward" else machine.recorded_s + machine.pulled_s
        return assembly_cost(problem) + each * work.operators + 2 * machine.seconds(work, count)

    def workspace(self, problem: Problem) -> int:
        return self._seed_count(problem) * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        count = self._seed_count(problem)

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            tiled = [
                # a copy always: dual numbers refuse tensors whose samples share memory
                x.repeat(count, *[1] * len(leaf.event_shape)) if leaf.batched else x
                for x, leaf in zip(leaves, problem.leaves, strict=True)
            ]
            bound, inputs = bind(problem, tiled, kwargs)
            sweep = self._reverse if self.mode == "reverse" else self._forward
            values, jacobians = sweep(problem, bound, inputs)
            rows = zip(jacobians, problem.outputs, strict=True)
            return Result(
                tuple(value[: problem.batch] for value in values),
                tuple(
                    tuple(from_blocks(problem.layout, blocks, event, batched=True) for blocks in row)
                    for row, event in rows
                ),
            )

        return compute

    def _reverse(self, problem: Problem, bound: Any, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        pullback = Pullback(bound, inputs, problem.differentiable, not problem.structure.effects)
        values = pullback.outputs
        cotangents = [
            seed.reshape(-1, *event)
            for seed, event in zip(self._diagonal(problem.outputs, problem.batch, values), problem.outputs, strict=True)
        ]
        gradients = pullback.pull(pullback.recorded, cotangents, last=True)
        replicas = [gradient.view(-1, problem.batch, *gradient.shape[1:]) for gradient in gradients]
        jacobians, start = [], 0
        for event in problem.outputs:
            stop = start + seeds.size(event)
            rows = [replica[start:stop].movedim(0, 1) for replica in replicas]
            jacobians.append([row.reshape(problem.batch, *event, *row.shape[2:]) for row in rows])
            start = stop
        return values, jacobians

    def _forward(self, problem: Problem, bound: Any, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        events = [problem.leaves[position].event_shape for position in problem.inputs]
        tangents = [
            seed.reshape(-1, *event)
            for seed, event in zip(self._diagonal(events, problem.batch, inputs), events, strict=True)
        ]
        values, pushed = push_dual(bound, inputs, tangents)
        replicas = [tangent.view(-1, problem.batch, *tangent.shape[1:]) for tangent in pushed]
        jacobians: list[list[Tensor]] = [[] for _ in values]
        start = 0
        for event, tensor in zip(events, inputs, strict=True):
            stop = start + seeds.size(event)
            for row, replica in zip(jacobians, replicas, strict=True):
                columns = replica[start:stop].movedim(0, -1).to(tensor.dtype)
                row.append(columns.reshape(*columns.shape[:-1], *event))
            start = stop
        return values, jacobians

    def _diagonal(self, events: Sequence[tuple[int, ...]], batch: int, like: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield for each event its seeds (count, B, *event): one-hot in its own replicas, zero in the others."""
        before, total = 0, sum(map(seeds.size, events))
        for event, tensor in zip(events, like, strict=True):
            ones = seeds.shared_seeds(event, batch, tensor)
            after = total - before - len(ones)
            zeros = [ones.new_zeros(1, *ones.shape[1:]).expand(length, *ones.shape[1:]) for length in (before, after)]
            yield torch.cat([zeros[0], ones, zeros[1]]) if len(events) > 1 else ones
            before += len(ones)
