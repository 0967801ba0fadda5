"""Wrapper: `torch.compile` of another method for the signature at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from autojac.compilation import compiled, lowered
from autojac.methods.base import Method, Wrapper, registry
from autojac.problem import Compute, Problem, Result


@dataclass(frozen=True)
class Compiled(Wrapper):
    """Another method, compiled into one graph.

    Attributes:
        inner: the method to compile; it must go through torch.func, which the compiler can trace, or be flat already.
    """

    inner: Method

    def unsupported(self, problem: Problem) -> str | None:
        if self.inner.flat:
            return self.inner.unsupported(problem)
        if not self.inner.traceable:
            return "torch.compile traces torch.func transforms, not torch.autograd.grad or dual numbers"
        if not problem.structure.independent:
            return "the loop over rows of a coupled batch would be unrolled by the compiler"
        return self.inner.unsupported(problem) or super().unsupported(problem)

    @property
    def compiles(self) -> bool:
        return True

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        if not depth:
            return
        for kind in registry().values():
            if kind is not cls:
                # depth 0: compiling is dear, so chunk sizes are not searched under it
                for method in kind.candidates(problem, 0):
                    if (method.traceable or method.flat) and not method.chunked:
                        yield cls(method)

    def cost(self, problem: Problem) -> float:
        return 0.6 * self.inner.cost(problem)

    def prepare(self, problem: Problem) -> Compute:
        flat = self.inner.lowered(problem, lowered)
        if flat is not None:
            return flat
        inner = self.inner.prepare(problem)

        def program(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
            result = inner(leaves, kwargs)
            return result.values, result.jacobians

        run = compiled(program)
        return lambda leaves, kwargs: Result(*run(leaves, kwargs))
