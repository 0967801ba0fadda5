"""A call on its way to a plan: described, seen once, and made ready."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autojac.frame import AUX, Frame
from autojac.plan import Plan
from autojac.probe.manners import FirstCall
from autojac.problem import Compute, Problem, Result, empty_rows
from autojac.quiet import Quiet
from autojac.signature import Signature
from autojac.stored import Keys


@dataclass
class Entry:
    """A plan made ready for one signature in this process."""

    frame: Frame
    problem: Problem
    plan: Plan
    compute: Compute
    signature: Signature
    mutable: tuple[Tensor, ...]
    keys: Keys | None = None
    calls: int = 0
    last_check: int = 0
    next_check: float = 1


@dataclass(frozen=True)
class Request:
    """One call that needs a plan."""

    frame: Frame
    leaves: tuple[Tensor, ...]
    kwargs: Mapping[str, Any]
    flags: tuple[Any, ...]
    differentiable: bool
    trained: tuple[Tensor, ...]
    kinds: str

    def apart(self) -> Request:
        """The call with tensors of its own, so that probing and tuning fire no hook of the caller's."""
        leaves = tuple(x.detach().requires_grad_() if x.requires_grad else x.detach() for x in self.leaves)
        return dataclasses.replace(self, leaves=leaves)


@dataclass(frozen=True)
class Seen:
    """What the first call of func showed."""

    first: FirstCall
    quiet: Quiet
    signature: Signature
    guess: tuple[bool, ...]
    keys: Keys

    @property
    def empty(self) -> bool:
        """Whether there is nothing to differentiate."""
        sizes = [*self.signature.outputs, *(leaf.event_shape for leaf in self.signature.leaves if leaf.differentiated)]
        return not self.signature.batch or 0 in map(math.prod, sizes)


def with_aux(frame: Frame, problem: Problem, compute: Compute, plain: bool) -> Compute:
    """A computation beside which comes what func returned as aux.

    Args:
        frame: knows how func returns it.
        problem, compute: what is computed.
        plain: whether func runs once and as it is. If not, it sees tensors that stand for others, and runs once more.
    """
    if not frame.has_aux:
        return compute

    def collecting(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        collected: list[Any] = []
        watched = {**kwargs, AUX: collected}
        result = compute(leaves, watched if plain else kwargs)
        if not plain:
            with torch.set_grad_enabled(problem.differentiable):
                frame.fn(leaves, watched)
        aux = collected[-1]
        return result._replace(aux=aux if problem.differentiable else pytree.tree_map_only(Tensor, Tensor.detach, aux))

    return collecting


def empty_compute(problem: Problem) -> Compute:
    """The Jacobian of a problem without elements."""

    def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        values = problem.fn(leaves, kwargs)
        return Result(
            values if problem.differentiable else tuple(value.detach() for value in values), empty_rows(problem, leaves)
        )

    return compute
