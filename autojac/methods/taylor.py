"""Taylor mode: derivatives by columns of the input, carried forward through the recorded graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from autojac.autodiff.primitives import load_forward_rules
from autojac.graph.batch_axis.propagation import BatchFlow
from autojac.graph.ir import Graph
from autojac.graph.operators import forward_once
from autojac.methods.base import Method
from autojac.methods.support.costs import cutting_cost, push_cost
from autojac.methods.support.func_runs import FuncRuns
from autojac.methods.support.recorded_call import by_cut, why_unrecorded
from autojac.methods.support.taylor import TaylorMode
from autojac.methods.support.taylor_rows import CarriedRows
from autojac.problem.problem import Compute, Problem


@dataclass(frozen=True)
class Taylor(Method):
    """Derivatives by columns in one pass forward, those of lower orders shared, sums of second ones collapsed.

    func runs once and is recorded. Sources: Griewank and Walther, Evaluating Derivatives (2008), chapter 13; for sums
    Li et al., A computational framework for neural network-based variational Monte Carlo with forward Laplacian
    (2023), and Dangel et al., Collapsing Taylor mode automatic differentiation (2025).
    """

    runs: ClassVar[FuncRuns] = FuncRuns.RECORDED
    makes_derivatives: ClassVar[bool] = True

    @property
    def pushes(self) -> bool:
        return True

    @property
    def uses_transforms(self) -> bool:
        return True

    def unsupported(self, problem: Problem) -> str | None:
        if not problem.of:
            return "it makes single derivatives by columns, not Jacobians"
        if not problem.structure.independent:
            return "samples are coupled, so what is pushed through all of them would add up"
        unrecorded = why_unrecorded(problem)
        if unrecorded:
            return unrecorded
        once = problem.forward_once(recorded=True)
        if once:
            return f"func runs {' and '.join(once)}, whose forward mode in torch has a wrong derivative"
        return super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        if problem.of:
            yield cls()

    def cost(self, problem: Problem) -> float:
        rows = len(CarriedRows.for_terms(problem.terms).keys)
        # each operator is differentiated by itself, through transforms
        return cutting_cost(problem) + push_cost(problem, rows, rows, "vmap")

    def workspace(self, problem: Problem) -> int:
        return len(CarriedRows.for_terms(problem.terms).keys) * problem.seed_bytes

    def prepare(self, problem: Problem) -> Compute:
        load_forward_rules()
        wanted, terms = CarriedRows.for_terms(problem.terms), problem.terms
        (position,) = problem.inputs

        def find(flow: BatchFlow, ends: Sequence[int]) -> CarriedRows | None:
            return None if forward_once(flow.graph) else wanted

        def derivatives(graph: Graph, wanted: CarriedRows, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
            mode = TaylorMode(graph, wanted, terms, dict(zip(graph.inputs, leaves, strict=True)))
            mode.run(graph.inputs[position])
            dtype = leaves[position].dtype
            stacks = [torch.stack([mode.term(y, term) for term in terms], -1).to(dtype) for y in graph.outputs]
            return tuple((stack,) for stack in stacks)

        return by_cut(problem, find, derivatives, "shared")
