"""Wrapper: another method with fewer of torch's threads, which cost a small Jacobian more than they bring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from autojac.methods.base import Method, Wrapper, registry
from autojac.problem.problem import Compute, Problem, Result
from autojac.replay.replayer import Replayer


@dataclass(frozen=True)
class Threads(Wrapper):
    """Another method on a CPU, with torch's operators split over `count` threads; the caller's number is put back.

    Attributes:
        count: threads for the operators of one call.
        inner: the method.
    """

    count: int
    inner: Method

    goes_into_chunks: ClassVar[bool] = False  # they are set once, around all chunks

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return "torch's threads work on CPUs only"
        if torch.get_num_threads() <= self.count:
            return f"torch uses no more than {self.count} threads anyway"
        return self.inner.unsupported(problem)

    @property
    def repeats_func(self) -> bool:
        return self.inner.repeats_func

    @property
    def runs_func_plainly(self) -> bool:
        return self.inner.runs_func_plainly

    @property
    def makes_flat_programs(self) -> bool:
        return self.inner.makes_flat_programs

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        # a search adds the fastest candidates of others
        if depth:
            yield from (cls(1, method) for method in registry()["Replay"].candidates(problem, 0))

    def cost(self, problem: Problem) -> float:
        return 1.001 * self.inner.cost(problem)

    def prepare(self, problem: Problem) -> Compute:
        return self._with_threads(self.inner.prepare(problem))

    def prepare_call(self, problem: Problem) -> Compute:
        return self._with_threads(self.inner.prepare_call(problem))

    def _with_threads(self, compute: Compute) -> Compute:
        if isinstance(compute, Replayer):
            compute.threads = self.count
            return compute

        def run(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            with threads(self.count):
                return compute(leaves, kwargs)

        return run


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads, and restore the caller's whatever happens."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
