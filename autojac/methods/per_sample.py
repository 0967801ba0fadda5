"""One sample at a time under vmap: torch's own recipe, `vmap(jacrev)` or `vmap(jacfwd)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

from torch import Tensor

from autojac.autodiff.primitives import Mode, load_forward_rules, sample_jacobian, vmap
from autojac.methods.base import Method
from autojac.methods.support.costs import TRANSFORM_OPERATORS, assembly_cost
from autojac.problem.layouts import from_blocks
from autojac.problem.problem import Compute, Problem, Result

NESTED_OPERATORS = 3
"""What an operator under two transforms takes, in operators under one."""


@dataclass(frozen=True)
class PerSample(Method):
    """`vmap` over samples of the Jacobian of one sample.

    Attributes:
        mode: `reverse` for jacrev, `forward` for jacfwd.
        chunk: samples per pass; None for all.
    """

    mode: Mode
    chunk: int | None = None

    @property
    def pushes(self) -> bool:
        return self.mode == "forward"

    def unsupported(self, problem: Problem) -> str | None:
        if not problem.structure.independent:
            return "samples are coupled, so one sample alone has another Jacobian"
        if not problem.structure.sliceable:
            return "func of one sample is not that sample of func: its output depends on the rest of the batch"
        return super().unsupported(problem)

    @property
    def uses_transforms(self) -> bool:
        return True

    @property
    def may_load_compiler(self) -> bool:
        # for some operators vmap over dual numbers takes torch's decompositions in Python
        return self.mode == "forward"

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        for mode in get_args(Mode):
            yield cls(mode)
            for chunk in (256, 4096) if depth else (4096,):
                if chunk < problem.batch:
                    yield cls(mode, chunk)

    def cost(self, problem: Problem) -> float:
        machine, work, samples = problem.machine, problem.work, min(self.chunk or problem.batch, problem.batch)
        forward = self.mode == "forward"
        count = problem.in_size if forward else problem.out_size
        # seeds and samples are axes of two transforms, which copy what they bring to the front
        moved = machine.seconds(work) + 2 * machine.seconds(work, count * samples / problem.batch)
        host = NESTED_OPERATORS * (work.operators + TRANSFORM_OPERATORS) * machine.batched_s
        pushed = forward * work.operators * (machine.dual_s + TRANSFORM_OPERATORS * machine.batched_s)
        return assembly_cost(problem) + problem.batch / samples * (host + pushed + moved)

    def workspace(self, problem: Problem) -> int:
        count = problem.out_size if self.mode == "reverse" else problem.in_size
        samples = self.chunk or problem.batch
        return count * problem.seed_bytes * samples // problem.batch

    def prepare(self, problem: Problem) -> Compute:
        if self.mode == "forward":
            load_forward_rules()
        in_dims = tuple(0 if leaf.batched else None for leaf in problem.leaves)

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            def single(*sample: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
                whole = [x.unsqueeze(0) if leaf.batched else x for x, leaf in zip(sample, problem.leaves, strict=True)]
                outputs = tuple(y.squeeze(0) for y in problem.fn(whole, kwargs))
                return outputs, outputs

            draws = problem.structure.draws
            transform = sample_jacobian(single, problem.inputs, self.mode, draws)
            if self.mode == "forward":
                # dual numbers refuse expanded tensors, whose elements share memory
                leaves = [x.contiguous() for x in leaves]
            jacobians, values = vmap(transform, in_dims=in_dims, chunk=self.chunk, draws=draws)(*leaves)
            rows = zip(jacobians, problem.outputs, strict=True)
            return Result(
                tuple(values), tuple(tuple(self._lay_out(problem, leaves, row, event)) for row, event in rows)
            )

        return compute

    @staticmethod
    def _lay_out(
        problem: Problem, leaves: Sequence[Tensor], row: Sequence[Tensor], event: tuple[int, ...]
    ) -> Iterator[Tensor]:
        for position, blocks in zip(problem.inputs, row, strict=True):
            # forward mode gives the output's dtype
            cast = blocks.to(leaves[position].dtype)
            yield from_blocks(problem.layout, cast, event, problem.leaves[position].batched)
