"""Reverse mode: one VJP per seed, many seeds at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from autojac.autodiff import seeds
from autojac.autodiff.pullback import Pullback
from autojac.autodiff.seeds import SeedKind, SharedSeeds
from autojac.methods.base import Method
from autojac.methods.support.costs import chunk_sizes, evaluation_cost, pull_cost
from autojac.methods.support.engines import Engine
from autojac.methods.support.func_runs import FuncRuns
from autojac.methods.support.reverse_mode import ReverseMode, seeds_for
from autojac.problem.problem import Compute, Problem, Result


@dataclass(frozen=True)
class Pull(Method):
    """Reverse mode: func runs once, then one VJP per seed.

    Attributes:
        seeds: `shared` pulls one seed per output coordinate through all samples at once, which is exact for
            independent samples; `identity` pulls one per output element and is exact whatever the coupling.
        engine: `loop` over plain VJPs, `vmap` over torch.func.vjp, or `batched` for `is_grads_batched`.
        chunk: seeds per pass; None for all.
    """

    seeds: SeedKind
    engine: Engine = "loop"
    chunk: int | None = None

    runs: ClassVar[FuncRuns] = FuncRuns.ONCE
    makes_derivatives: ClassVar[bool] = True

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
    def suiting(cls, problem: Problem, engine: Engine) -> Self:
        """Return the one with the fewest seeds that are right for the structure.

        With engine `vmap` it is torch.func all the way down, as it must be under a caller's transform.
        """
        return cls(seeds_for(problem), engine)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        kind = seeds_for(problem)
        count = max(seeds.size(shape) for shape in problem.outputs) * (problem.batch if kind == "identity" else 1)
        yield cls(kind, "loop")
        if problem.of:
            yield cls(kind, "vmap")
            return
        for chunk in chunk_sizes(problem, count, depth):
            yield cls(kind, "vmap", chunk)
            yield cls(kind, "batched", chunk)

    def cost(self, problem: Problem) -> float:
        count = self._seed_count(problem)
        if problem.of:
            # one gradient for each derivative that another one is built on, through a graph that each order makes
            # three times as long
            pulled = {columns[:order] for term in problem.terms for columns in term for order in range(len(columns))}
            passes = sum(count * 3 ** len(columns) for columns in pulled)
            return evaluation_cost(problem) + pull_cost(problem, passes, 1, self.engine)
        step = 1 if self.engine == "loop" else self.chunk or count
        return evaluation_cost(problem) + pull_cost(problem, count, step, self.engine)

    def workspace(self, problem: Problem) -> int:
        step = 1 if self.engine == "loop" else self.chunk or self._seed_count(problem)
        return step * problem.seed_bytes

    def _seed_count(self, problem: Problem) -> int:
        return problem.out_size * (problem.batch if self.seeds == "identity" else 1)

    def prepare(self, problem: Problem) -> Compute:
        return self._reverse_mode.prepare(problem)

    def of_graph(self, problem: Problem, pullback: Pullback, made: SharedSeeds | None = None) -> Result:
        """Return the Jacobian of a graph that exists already; the engine must not be `vmap`, which records its own.

        Args:
            problem, pullback: the graph.
            made: the seeds of an earlier run.
        """
        return self._reverse_mode.of_graph(problem, pullback, made)

    @property
    def _reverse_mode(self) -> ReverseMode:
        return ReverseMode(self.seeds, self.engine, self.chunk)
