"""Cuts: the chain rule through the narrowest tensors between inputs and outputs, each side pushed or pulled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from autojac.autodiff.primitives import Bound
from autojac.graph.batch_axis.propagation import BatchFlow
from autojac.graph.cuts.accumulation import (
    Accumulation,
    AccumulationTree,
    ChainProduct,
    JacobianSweep,
    accumulate,
    sweeps,
)
from autojac.graph.ir import Graph
from autojac.graph.operators import forward_once
from autojac.methods.base import Method
from autojac.methods.support.costs import cutting_cost, pull_cost
from autojac.methods.support.engines import Engine, by_sample, coordinates, each, puller, pusher
from autojac.methods.support.func_runs import FuncRuns
from autojac.methods.support.recorded_call import by_cut, why_unrecorded
from autojac.problem.layouts import from_blocks
from autojac.problem.problem import Compute, Problem

LEAST_WIDTH = 4
"""Below so many rows and columns no cut pays for being looked for."""
Factor = dict[tuple[int, int], Tensor]
"""For each target and source (B, elements of the target, elements of the source)."""


@dataclass(frozen=True)
class Bottleneck(Method):
    """J = J_{y←h} · J_{h←x} for the narrowest h that all paths run through.

    func runs once and is recorded; each side runs on its graph, in the direction that takes fewer seeds.

    Attributes:
        engine: as in `Pull`; what is pushed takes `vmap` over JVPs for `vmap` and `batched`.
        chunk: seeds per pass; None for all.
        cuts: `one`, or `several` where cutting sides again pays, which takes several outputs or inputs (see
            `autojac.graph.cuts.accumulation`).
        sides: pushed or pulled, `either` as it takes fewer seeds; or `pull` all, for operators without forward mode.
    """

    engine: Engine = "vmap"
    chunk: int | None = None
    cuts: Literal["one", "several"] = "one"
    sides: Literal["either", "pull"] = "either"

    runs: ClassVar[FuncRuns] = FuncRuns.RECORDED

    @property
    def pushes(self) -> bool:
        return self.sides == "either"

    def unsupported(self, problem: Problem) -> str | None:
        if not problem.structure.independent:
            return "samples are coupled, so a narrow place of one sample is not all that leads to its output"
        if problem.shared_input:
            return "an input is shared by all samples, so its rows would be added up over the batch"
        if min(problem.in_size, problem.out_size) < LEAST_WIDTH:
            return f"inputs or outputs have fewer than {LEAST_WIDTH} elements, so nothing narrower is worth a cut"
        unrecorded = why_unrecorded(problem)
        if unrecorded:
            return unrecorded
        if self._find(problem) is None:
            return "nothing between inputs and outputs is narrower than they are"
        return super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        for first in (cls(cuts=cuts, sides=sides) for sides in ("either", "pull") for cuts in ("one", "several")):
            if first.unsupported(problem) is not None:
                continue
            accumulation = first._find(problem)
            assert accumulation is not None
            if first.sides == "pull":
                if depth or (problem.differentiable and problem.forward_once(recorded=True)):
                    yield from (dataclasses.replace(first, engine=engine) for engine in ("vmap", "loop"))
                continue
            for engine in ("vmap", "batched", "loop") if depth else ("vmap", "batched"):
                yield dataclasses.replace(first, engine=engine)
                if accumulation.width > 16:
                    yield dataclasses.replace(first, engine=engine, chunk=16)

    def _find(self, problem: Problem) -> Accumulation | None:
        analysis = problem.analysis
        return analysis.chain(self.cuts == "several", self.sides == "either") if analysis is not None else None

    def cost(self, problem: Problem) -> float:
        accumulation = self._find(problem)
        if accumulation is None:
            return float("inf")
        machine, passes = problem.machine, sum(sweep.passes for sweep in sweeps(accumulation.tree))
        # each sweep runs a part of func, and multiplies: one operator at every cut
        share = accumulation.seeds / max(passes, 1)
        products = 2 * problem.result_bytes / problem.item_bytes * accumulation.width / machine.flops_per_s
        swept = share * pull_cost(problem, passes, self._step(passes), self.engine)
        return cutting_cost(problem) + swept + products

    def workspace(self, problem: Problem) -> int:
        accumulation = self._find(problem)
        if accumulation is None:
            return 0
        factors = problem.item_bytes * problem.batch * accumulation.width * (problem.in_size + problem.out_size)
        return factors + max(self._step(sweep.passes) for sweep in sweeps(accumulation.tree)) * problem.seed_bytes

    def _step(self, count: int) -> int:
        return 1 if self.engine == "loop" else min(self.chunk or count, count) or 1

    def prepare(self, problem: Problem) -> Compute:
        def find(flow: BatchFlow, ends: Sequence[int]) -> Accumulation | None:
            forward = self.pushes and not (problem.differentiable and forward_once(flow.graph))
            return accumulate(flow, ends, recursive=self.cuts == "several", forward=forward)

        return by_cut(problem, find, functools.partial(self._jacobians, problem), "shared")

    def _jacobians(
        self, problem: Problem, graph: Graph, accumulation: Accumulation, leaves: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], ...]:
        base = dict(zip(graph.inputs, leaves, strict=True))
        factor = _Accumulator(self, problem, graph, accumulation, base).factor(accumulation.tree)
        jacobians = []
        for output, event in zip(graph.outputs, problem.outputs, strict=True):
            row = []
            for position in problem.inputs:
                leaf = problem.leaves[position]
                shape = (problem.batch, *event, *leaf.event_shape)
                blocks = factor.get((output, graph.inputs[position]))
                if blocks is None:
                    blocks = leaves[position].new_zeros(shape)
                # what is pushed has the dtype of the output
                blocks = blocks.to(leaves[position].dtype).reshape(shape)
                row.append(from_blocks(problem.layout, blocks, event, batched=True))
            jacobians.append(tuple(row))
        return tuple(jacobians)


class _Accumulator:
    """Multiplies out the chain rule over one recorded call."""

    def __init__(
        self, method: Bottleneck, problem: Problem, graph: Graph, accumulation: Accumulation, base: Mapping[int, Tensor]
    ) -> None:
        self.method = method
        self.batch = problem.batch
        self.differentiable = problem.differentiable
        self.graph = graph
        self.states = accumulation.states
        self.base = dict(base)
        self.values = {number: self.base[number] for number in (graph.inputs[position] for position in problem.inputs)}

    def factor(self, tree: AccumulationTree) -> Factor:
        if isinstance(tree, JacobianSweep):
            return self._pull(tree) if tree.mode == "pull" else self._push(tree)
        if isinstance(tree, ChainProduct):
            # first, because it leaves the values at which the later one starts
            early = self.factor(tree.early)
            return self._product(tree, self.factor(tree.late), early)
        return {pair: blocks for part in tree.parts for pair, blocks in self.factor(part).items()}

    def _product(self, tree: ChainProduct, late: Factor, early: Factor) -> Factor:
        # one product over all tensors of the cut: adding up several would cost a pass over the Jacobian each
        left = {t: _join([late[t, h] for h in tree.cut], 2) for t in tree.targets if t not in tree.cut}
        right = {s: _join([early[h, s] for h in tree.cut], 1) for s in tree.sources}
        made = {(t, s): left[t] @ right[s].to(left[t].dtype) for t in left for s in right}
        return made | {(t, s): early[t, s] for t in tree.targets if t in tree.cut for s in right}

    def _pull(self, sweep: JacobianSweep) -> Factor:
        sources, wanted = sweep.sources, [t for t in sweep.targets if t not in sweep.sources]
        factors = self._trivial(sweep)
        if not wanted:
            return factors
        # functorch pulls through all targets of one function, even with nothing but zeros
        for group in [[t] for t in wanted] if self.method.engine == "vmap" else [wanted]:
            pulls = puller(self._between(sources, group), self._at(sources), self.method.engine, self.differentiable)
            self.values.update(zip(group, pulls.values, strict=True))
            for order, target in enumerate(group):
                rows = self._each(functools.partial(pulls.one, order), pulls.values[order], target)
                for source, part in zip(sources, rows, strict=True):
                    factors[target, source] = by_sample(part, self.states[source], self.batch).transpose(0, 1)
        return factors

    def _push(self, sweep: JacobianSweep) -> Factor:
        sources, targets = sweep.sources, [t for t in sweep.targets if t not in sweep.sources]
        factors = self._trivial(sweep)
        if not targets:
            return factors
        engine: Engine = "loop" if self.method.engine == "loop" else "vmap"
        given = self._at(sources)
        push = pusher(self._between(sources, targets), given, engine)
        for order, source in enumerate(sources):
            columns = self._each(functools.partial(push, order), given[order], source)
            for target, part in zip(targets, columns, strict=True):
                factors[target, source] = by_sample(part, self.states[target], self.batch).permute(1, 2, 0)
        return factors

    def _trivial(self, sweep: JacobianSweep) -> Factor:
        """Return the derivatives of sources that are targets as well."""
        factors: Factor = {}
        for target in set(sweep.targets) & set(sweep.sources):
            size = self.values[target].numel() // self.batch
            for source in sweep.sources:
                like = self.values[source]
                if source == target:
                    eye = torch.eye(size, dtype=like.dtype, device=like.device)
                    factors[target, source] = eye.expand(self.batch, size, size)
                else:
                    factors[target, source] = like.new_zeros(1).expand(self.batch, size, like.numel() // self.batch)
        return factors

    def _at(self, tensors: Sequence[int]) -> list[Tensor]:
        """Return their values, computed where no sweep has left them."""
        missing = [number for number in tensors if number not in self.values]
        self.values.update(zip(missing, self.graph.run(missing, self.base), strict=True))
        return [self.values[number] for number in tensors]

    def _between(self, sources: Sequence[int], targets: Sequence[int]) -> Bound:
        return lambda *given: self.graph.run(targets, self.base | dict(zip(sources, given, strict=True)))

    def _each(self, run: Callable[[Tensor], Sequence[Tensor]], tensor: Tensor, number: int) -> list[Tensor]:
        return each(run, coordinates(tensor, self.states[number], self.batch), self.method.chunk)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    # torch copies a single one too
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
