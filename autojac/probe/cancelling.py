"""Where the influence of other samples ends in a graph: in a difference that cancels, or in something that sleeps.

NaN passes through a difference that cancels as through a weight of zero or a threshold. Both are told apart at the
operator at which the others' influence ends: there several arguments must carry it, and each of them alone move the
result. A threshold, a zero or a comparison ends it with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from autojac.autodiff.tolerance import own_scale
from autojac.graph.batch_axis.states import BatchAxis, State
from autojac.graph.ir import Operation
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import Kind

SLIGHT = 64.0
"""More than this many eps of the largest gradient of a coordinate, or of a value's own scale, is not rounding."""

Env = Mapping[int, Tensor]


class PossibleCoupling(Exception):
    """Samples are coupled, or may be."""


def outside_of(state: State, like: Tensor, mask: Tensor) -> Tensor:
    """Return a mask, to broadcast, of what samples inside `mask` must not reach: all of a tensor without the batch."""
    if not isinstance(state, BatchAxis):
        return torch.ones((), dtype=torch.bool, device=like.device)
    along = (~mask).repeat_interleave(state.inner).repeat(state.outer)
    return along.view(-1, *[1] * (like.dim() - 1 - state.axis))


def rounding(tensor: Tensor) -> Tensor | float:
    """Return how far float64 may round each number."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return SLIGHT * torch.finfo(tensor.dtype).eps * own_scale(tensor)


def exceeds(before: Tensor, after: Tensor, granted: Tensor | float) -> Tensor:
    """Return where numbers differ by more than is granted."""
    return (after - before).abs() > granted if before.is_floating_point() else before != after


class SampleChange(NamedTuple):
    """The effect of a change of some samples on a graph's tensors, in float64.

    Attributes:
        states: how the batch runs through each tensor.
        base, after: the tensors before and after.
        scales: how far rounding may change each number.
        outside: the elements that belong to no changed sample.
        reached: those of them that depend on a changed sample all the same.
    """

    states: Mapping[int, State]
    base: Env
    after: Env
    scales: Mapping[int, Tensor | float]
    outside: Env
    reached: Env

    def require_cancelling(self, operation: Operation) -> None:
        """Raise `PossibleCoupling` where the influence of other samples ends otherwise than by cancelling.

        Each argument that carries it moves, alone, all that NaN in its place would reach; and where the result stays,
        there are several.
        """
        results = operation.results
        meets_batch = any(not isinstance(self.states.get(number), BatchAxis) for number in results)
        arguments = [
            number
            for number in dict.fromkeys(operation.sources)
            if bool(self.reached[number].any()) or (meets_batch and isinstance(self.states.get(number), BatchAxis))
        ]
        facts = facts_of(operation.target)
        if not arguments or facts.kind is Kind.FACTORY:
            return
        tensors = [self.base[number] for number in (*results, *arguments)]
        if not all(tensor.is_floating_point() for tensor in tensors):
            raise PossibleCoupling
        # views leave entries out, and look at none
        computes = not any(argument.alias_info is not None for argument in operation.target._schema.arguments)
        if computes and len(arguments) < 2 and not all(bool(self.reached[number].any()) for number in results):
            raise PossibleCoupling
        for argument in arguments:
            carries = self.reached[argument]
            if isinstance(self.states.get(argument), BatchAxis):
                carries = carries | ~self.outside[argument]
            with_nan = operation({**self.base, argument: torch.where(carries, torch.nan, self.base[argument])})
            with_change = operation({**self.base, argument: self.after[argument]})
            for number, spoilt, part in zip(operation.outputs, with_nan, with_change, strict=True):
                if number is not None:
                    must_move = torch.ones_like(spoilt.isnan()) if facts.drops_nan else spoilt.isnan()
                    if bool(
                        (
                            must_move & self.outside[number] & ~exceeds(self.base[number], part, self.scales[number])
                        ).any()
                    ):
                        raise PossibleCoupling
