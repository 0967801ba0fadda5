"""A call as the probe gets it, and what is known of its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from autojac.core.sandbox import Sandbox


class FlatCall(NamedTuple):
    """A flat function at one point.

    Attributes:
        fn: maps (leaves, kwargs) to a tuple of tensors.
        leaves, kwargs: the point.
        differentiated: indices of the leaves to differentiate.
        sandbox: how to evaluate without side effects.
    """

    fn: Any
    leaves: Sequence[Tensor]
    kwargs: Mapping[str, Any]
    differentiated: Sequence[int]
    sandbox: Sandbox

    def of_differentiated(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the function with other tensors in the places of the differentiated leaves."""
        merged = [leaf.detach() for leaf in self.leaves]
        for position, tensor in zip(self.differentiated, tensors, strict=True):
            merged[position] = tensor
        return tuple(self.fn(merged, self.kwargs))


@dataclass(frozen=True)
class Roles:
    """Which leaves carry the batch, as far as it is known.

    Attributes:
        guess: by shape, or as declared.
        fixed: for each leaf, whether the user declared it; that is checked but not changed.
        known: what earlier calls have shown, by position.
    """

    guess: tuple[bool, ...]
    fixed: Sequence[bool]
    known: Mapping[int, bool]
