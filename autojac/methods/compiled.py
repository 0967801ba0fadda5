"""Wrapper: what torch's compiler makes of another method's flat program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from autojac.methods.base import Method, Wrapper, registry
from autojac.problem.problem import Compute, Problem
from autojac.replay.compilation import lower, missing


@dataclass(frozen=True)
class Compiled(Wrapper):
    """Another method's flat program, compiled; where nothing compiles it, the program as it is.

    Attributes:
        inner: the method; it must be flat, as replays are.
    """

    inner: Method

    def unsupported(self, problem: Problem) -> str | None:
        if not self.inner.makes_flat_programs:
            return "only flat programs are compiled: the compiler's own guards miss hooks and methods exchanged later"
        if problem.structure.draws:
            return "func draws random numbers, and compiled code draws others than func does"
        # a plan that was found elsewhere is served by the program itself
        nothing = missing(problem.device) if problem.trial else None
        return nothing or self.inner.unsupported(problem)

    @property
    def compiles(self) -> bool:
        return True

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        # depth 0: compiling is dear, so chunk sizes are not searched under it
        if depth:
            yield from map(cls, registry()["Replay"].candidates(problem, 0))

    def cost(self, problem: Problem) -> float:
        return 0.6 * self.inner.cost(problem)

    def prepare(self, problem: Problem) -> Compute:
        strict, effects = problem.trial, bool(problem.structure.effects)
        if not strict and missing(problem.device) is not None:
            return self.inner.prepare(problem)
        made = self.inner.prepare_lowered(problem, lambda run, _: lower(run, strict, repeatable=not effects))
        assert made is not None
        return made
