"""Wrapper: another method's whole computation, recorded once and run as a flat list of operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from autojac.core.structure import DRAWS_ALIKE
from autojac.methods.base import Method, Wrapper, registry
from autojac.problem.problem import Compute, Problem
from autojac.replay.replayer import Replayer
from autojac.replay.trace import Lower


@dataclass(frozen=True)
class Replay(Wrapper):
    """What another method does, without torch.func, autograd and func's own Python between its operators.

    Recorded for the shapes at hand, simplified, and guarded in each call: whatever Python changes of what func reads
    makes it record again. Parameters and buffers are read as they are at each call.

    Attributes:
        inner: the method to record.
        without: passes of `autojac.replay.passes` to leave out, or `hoist`, separated by commas.
    """

    inner: Method
    without: str | None = None

    def unsupported(self, problem: Problem) -> str | None:
        if self.inner.compiles or self.inner.makes_flat_programs:
            return "its programs are flat or compiled already"
        if problem.function_state is None:
            return "there is no function whose reads could be watched"
        if problem.differentiable and problem.structure.effects:
            effects = " and ".join(problem.structure.effects)
            return f"func {effects}, and a derivative of the backward would have to run it once more"
        if DRAWS_ALIKE in problem.structure.effects:
            return "func starts from one random state for every sample, and a program draws on and on"
        if problem.has_aux and problem.structure.effects:
            return "func returns aux and does more than return, so it must run as it is"
        return self.inner.unsupported(problem)

    @property
    def makes_sparse(self) -> bool:
        # what turns blocks into entries is recorded too
        return True

    @property
    def makes_flat_programs(self) -> bool:
        return True

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        for kind in registry().values():
            inner = [] if kind.is_wrapper else list(kind.candidates(problem, depth))
            # two ways to pull many at once are one program, and the other one loads torch's compiler to be recorded
            twice = {method for method in inner if twin_by_autograd(method) in inner}
            yield from (cls(m) for m in inner if not (m.is_chunked or m in twice))

    def cost(self, problem: Problem) -> float:
        # what is saved is the host's work
        return self.inner.cost(dataclasses.replace(problem, machine=problem.machine.host_only()))

    def prepare(self, problem: Problem) -> Compute:
        return self.prepare_lowered(problem, None)

    def prepare_lowered(self, problem: Problem, lower: Lower | None) -> Compute:
        assert problem.function_state is not None
        without = () if self.without is None else tuple(self.without.split(","))
        return Replayer(
            problem, self.inner.prepare_layout, self.inner.prepare_call, problem.function_state, without, lower
        )


def twin_by_autograd(method: Any) -> Method | None:
    """Return the same method by `is_grads_batched` where it is by `vmap`."""
    if getattr(method, "engine", None) != "vmap":
        return None
    made: Method = dataclasses.replace(method, engine="batched")
    return made
