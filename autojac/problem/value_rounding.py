"""How far rounding alone may move func's values: a sum that cancels is nothing but rounding, whatever its size."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.tolerance import value_rounding
from autojac.core.sandbox import Sandbox
from autojac.core.structure import UPDATES_BUFFERS
from autojac.problem.problem import Problem


class ValueRounding:
    """What the rounding of func's inputs does to its values at one point, found out when it is first asked for.

    Args:
        problem: the function.
        leaves, kwargs: the point.
        sandbox: how to evaluate without a trace.
        values: of func there.
    """

    def __init__(
        self,
        problem: Problem,
        leaves: Sequence[Tensor],
        kwargs: Mapping[str, Any],
        sandbox: Sandbox,
        values: Sequence[Tensor],
    ) -> None:
        self._problem = problem
        self._call = leaves, kwargs, sandbox
        self._values = values

    @functools.cached_property
    def floors(self) -> list[Tensor]:
        """For each output the difference to grant in each sample."""
        zeros = [value.new_zeros(len(value)) for value in self._values]
        if UPDATES_BUFFERS in self._problem.structure.effects:
            return zeros  # an evaluation now would write into what the graph of the call's result holds
        try:
            return value_rounding(self._near, self._values)
        except Exception:  # func may refuse what lies near its input, which says nothing
            return zeros

    def _near(self, roundings: int) -> Sequence[Tensor]:
        """Return func's values where each number that is differentiated in is rounded so many times, up or down."""
        leaves, kwargs, sandbox = self._call
        with torch.no_grad(), sandbox():
            moved = [
                leaf + roundings * torch.finfo(leaf.dtype).eps * leaf.abs() if kind.differentiated else leaf
                for leaf, kind in zip(leaves, self._problem.leaves, strict=True)
            ]
            return [value.detach() for value in self._problem.fn(moved, kwargs)]
