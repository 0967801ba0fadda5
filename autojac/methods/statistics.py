"""Batch statistics: samples that meet only in tensors which all of them share, such as a batch's mean and variance."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, get_args

import torch
from torch import Tensor

from autojac.graph.batch_axis.propagation import BatchFlow
from autojac.graph.cuts.shared_tensors import SharedTensors, find_shared_tensors
from autojac.graph.ir import Graph
from autojac.graph.operators import forward_once
from autojac.methods.base import Method
from autojac.methods.support.costs import cutting_cost, pull_cost
from autojac.methods.support.engines import Engine
from autojac.methods.support.func_runs import FuncRuns
from autojac.methods.support.recorded_call import by_cut, why_unrecorded
from autojac.methods.support.shared_statistics import Local, SharedStatistics
from autojac.problem.layouts import from_blocks
from autojac.problem.problem import Compute, Problem

CHUNK = 256


@dataclass(frozen=True)
class Statistics(Method):
    """Exact Jacobians of y_b = g(x_b, s) with shared s = S(x): ∂y_b/∂x_c = [b = c] ∂g/∂x_b + ∂g/∂s · ∂s/∂x_c.

    Given s the samples are independent, so one seed serves them all; s has no batch, so one pull per element does.
    Weights in the place of x, which have no batch either, are pulled as copies that each sample has.

    Attributes:
        local: how g is differentiated: `copies` gives each sample its own s and pulls the coordinates of y; `mixed`
            pulls them for ∂g/∂x and pushes the elements of s, as few as a minimum cut finds; `push` pushes both.
        engine: as in `Pull`.
        chunk: seeds per pass.
    """

    local: Local = "copies"
    engine: Engine = "vmap"
    chunk: int = CHUNK

    runs: ClassVar[FuncRuns] = FuncRuns.RECORDED

    @property
    def pushes(self) -> bool:
        return self.local != "copies"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.structure.coupling != "statistics":
            return "samples do not meet in shared statistics alone"
        unrecorded = why_unrecorded(problem)
        if unrecorded:
            return unrecorded
        shared = self._find(problem)
        if shared is None:
            return "samples meet elsewhere than in tensors that all of them share"
        return self._obstacle(shared) or super().unsupported(problem)

    def _obstacle(self, shared: SharedTensors) -> str | None:
        if self.local == "copies" and shared.copied is None:
            return "a shared tensor is used by an operator that takes no copy of it for each sample"
        if self.local == "push" and shared.weights:
            return "an input is shared by all samples, and pushing its elements would take as many passes"
        if shared.weights_only is None:
            return "an input that is shared is used by an operator that takes no copy of it for each sample"
        return None

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        for method in (cls(local) for local in get_args(Local)):
            if method.unsupported(problem) is not None:
                continue
            yield method
            yield cls(method.local, "batched")
            if depth or problem.batch >= 4096:
                yield cls(method.local, "vmap", 16)
                yield cls(method.local, "loop")

    def _find(self, problem: Problem) -> SharedTensors | None:
        analysis = problem.analysis
        if analysis is None:
            return None
        return analysis.read_pool if self.local == "copies" else analysis.least_pool

    def passes(self, problem: Problem) -> int:
        """Return how many seeds are pulled and pushed."""
        shared = self._find(problem)
        size = shared.size if shared is not None else problem.out_size * problem.batch
        if self.local == "copies":
            return problem.out_size + size
        return (problem.in_size if self.local == "push" else problem.out_size) + 2 * size

    def cost(self, problem: Problem) -> float:
        count = self.passes(problem)
        return cutting_cost(problem) + pull_cost(problem, count, self._step(count), self.engine)

    def workspace(self, problem: Problem) -> int:
        count = self.passes(problem)
        local = problem.item_bytes * problem.batch * problem.out_size * count if self.local == "copies" else 0
        return local + self._step(count) * problem.seed_bytes

    def _step(self, count: int) -> int:
        return 1 if self.engine == "loop" else min(self.chunk, count)

    def prepare(self, problem: Problem) -> Compute:
        find = functools.partial(self.find_shared, differentiable=problem.differentiable)
        return by_cut(problem, find, functools.partial(self._jacobians, problem), "identity")

    def find_shared(self, flow: BatchFlow, inputs: Sequence[int], differentiable: bool) -> SharedTensors | None:
        """Return the pool of a graph, if this method's way applies to it."""
        if differentiable and self.pushes and forward_once(flow.graph):
            return None
        shared = find_shared_tensors(flow, inputs, least=self.local != "copies")
        return shared if shared is not None and self._obstacle(shared) is None else None

    def sharing(
        self, problem: Problem, graph: Graph, shared: SharedTensors, leaves: Sequence[Tensor]
    ) -> SharedStatistics:
        """Return one recorded call, to be differentiated in this method's way."""
        return SharedStatistics(problem, graph, shared, leaves, self.local, self.engine, self.chunk)

    def _jacobians(
        self, problem: Problem, graph: Graph, shared: SharedTensors, leaves: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], ...]:
        blocks, pieces = self.sharing(problem, graph, shared, leaves).pieces()
        jacobians = [
            [
                # ∂g/∂x, given s
                from_blocks(problem.layout, part, event, problem.leaves[position].batched)
                for part, position in zip(row, problem.inputs, strict=True)
            ]
            for event, row in zip(problem.outputs, blocks, strict=True)
        ]
        for dg_ds, ds_dx in pieces:
            for output, event in enumerate(problem.outputs):
                for order, position in enumerate(problem.inputs):
                    through = self._through(problem, dg_ds[output], ds_dx[order], event, position)
                    jacobians[output][order] = jacobians[output][order] + through
        return tuple(tuple(row) for row in jacobians)

    @staticmethod
    def _through(problem: Problem, dg_ds: Tensor, ds_dx: Tensor, event: tuple[int, ...], position: int) -> Tensor:
        """Return what comes by way of some elements of s: ∂g/∂s (k, B, m) times ∂s/∂x (k, B, *in)."""
        leaf = problem.leaves[position]
        ds_dx = ds_dx.reshape(*ds_dx.shape[: 1 + leaf.batched], -1)
        dg_ds = dg_ds.to(ds_dx.dtype)
        if problem.layout == "diagonal":
            return torch.einsum("kbm,kbm->bm" if leaf.batched else "kbm,km->bm", dg_ds, ds_dx)
        if not leaf.batched:
            return torch.einsum("kbm,kn->bmn", dg_ds, ds_dx).reshape(problem.batch, *event, *leaf.shape)
        if problem.layout == "full":
            return torch.einsum("kbm,kcn->bmcn", dg_ds, ds_dx).reshape(problem.batch, *event, *leaf.shape)
        return torch.einsum("kbm,kbn->bmn", dg_ds, ds_dx).reshape(problem.batch, *event, *leaf.event_shape)
