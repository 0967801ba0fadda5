"""Wrapper: a flat method as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from autojac.methods.base import Method, Wrapper, registry
from autojac.problem.problem import Compute, Problem
from autojac.replay.cuda_graphs import capture_on_first_call


@dataclass(frozen=True)
class CudaGraph(Wrapper):
    """Another method's flat program, launched by the host as one CUDA graph.

    Attributes:
        inner: the method; it must be flat, as replays are.
    """

    inner: Method

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return "a CUDA graph takes a CUDA device"
        if not self.inner.makes_flat_programs:
            return "only flat programs are captured: what a transform does on the host would be left out"
        if problem.structure.effects:
            return f"func {' and '.join(problem.structure.effects)}, which a graph would do to memory of its own"
        return self.inner.unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        if problem.device.type == "cuda":
            yield from map(cls, registry()["Replay"].candidates(problem, 0))

    def cost(self, problem: Problem) -> float:
        return 0.9 * self.inner.cost(problem)

    def workspace(self, problem: Problem) -> int:
        # what it captured is kept besides what it returns
        return self.inner.workspace(problem) + problem.result_bytes

    def prepare(self, problem: Problem) -> Compute:
        made = self.inner.prepare_lowered(problem, capture_on_first_call)
        assert made is not None
        return made
