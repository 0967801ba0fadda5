"""Wrapper: attention by its formula, for what a fused kernel has no derivative for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor

from autojac.graph.special_kernels import ATTENTION, plain_formulas
from autojac.methods.base import Method, Wrapper, registry
from autojac.problem.problem import Compute, Problem, Result


@dataclass(frozen=True)
class PlainAttention(Wrapper):
    """Another method, with `scaled_dot_product_attention` by its formula: it has forward mode and second derivatives.

    Attributes:
        inner: the method.
    """

    inner: Method

    is_wrapper: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        if ATTENTION not in problem.structure.kernels:
            return f"func was not seen to use a fused {ATTENTION}"
        others = tuple(kernel for kernel in problem.structure.kernels if kernel != ATTENTION)
        structure = dataclasses.replace(problem.structure, kernels=others)
        return self.inner.unsupported(dataclasses.replace(problem, structure=structure))

    @property
    def runs_func_plainly(self) -> bool:
        return self.inner.runs_func_plainly

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        if ATTENTION in problem.structure.kernels:
            for kind in registry().values():
                if not any(field.name == "inner" for field in fields(kind)):
                    yield from map(cls, kind.candidates(problem, depth))

    def cost(self, problem: Problem) -> float:
        return 1.2 * self.inner.cost(problem)

    def prepare(self, problem: Problem) -> Compute:
        inner, kernels = self.inner.prepare(problem), problem.structure.kernels

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            with plain_formulas(kernels):
                return inner(leaves, kwargs)

        return compute
