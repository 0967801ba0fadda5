"""What Python learns of a tensor's values as func runs: a program holds for the calls in which it would learn the same.

A branch reads one truth value, a mask gives a shape: both come out alike for most inputs, and a program finds out in
passing whether they do. A number with decimals comes out otherwise in each call, so nothing is recorded that reads one.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, fx

from autojac.core.sandbox import same_bits

GUARDED = (bool, int)
"""Kinds of outcomes that other calls may share."""
MOST_MISSES = 4
"""Calls with another outcome after which a program is given up, besides one in so many of those that it served."""
HITS_A_MISS = 4
LOOKED_INTO = 8
"""Calls with another outcome that are checked immediately: what was observed before may not hold for them."""


class OtherOutcomeError(Exception):
    """Python would take another way than the one that was recorded."""


def is_guarded(outcome: Any) -> bool:
    """Check whether other calls may share an outcome, and a check tells whether they do.

    The shape of a sparse tensor says nothing of how many entries it holds.
    """
    if isinstance(outcome, Tensor):
        return outcome.layout == torch.strided and not outcome.is_nested
    return isinstance(outcome, GUARDED)


def require_outcome(operator: Callable[..., Any], expected: Any, *args: Any, **kwargs: Any) -> None:
    """Check that an operator still tells Python what it told the recorded run.

    Raises:
        OtherOutcomeError: if it does not.
    """
    if operator(*args, **kwargs) != expected:
        raise OtherOutcomeError


def require_shape(expected: tuple[int, ...], tensor: Tensor) -> None:
    """Check that a tensor has as many entries as in the recorded run.

    Raises:
        OtherOutcomeError: if it has not.
    """
    if tensor.shape != expected:
        raise OtherOutcomeError


def only_mask(name: str, nodes: Any, written: Container[int]) -> object:
    """Return the node of the only mask by which an operator indexes, whose size alone decides over the result's.

    Of others, and of masks that are written into, something that is equal to nothing else.
    """
    masks = [n for n in nodes[0][1] if isinstance(n, fx.Node)] if name in ("index", "_unsafe_index") else []
    return masks[0] if len(masks) == 1 and masks[0].meta["storage"] not in written else object()


class Score:
    """How often a program held, and for how long it is given up where it rarely did.

    Attributes:
        rests_until: the call by which another trace may be made.
        missed: the last run broke off, which is not counted yet.
        strayed: a call took another way, and nobody has looked into that yet.
    """

    def __init__(self) -> None:
        self.rests_until = 0
        self.missed = self.strayed = False
        self._since = self._misses = self._rests = self._strays = 0

    def miss(self, calls: int, rest: int) -> bool:
        """Count a call with another outcome; return whether the program is given up.

        Args:
            calls: how many there were so far.
            rest: for how many calls it is given up the first time; then twice as many each time.
        """
        self.missed = False
        self._misses += 1
        self._strays += 1
        self.strayed = self._strays <= LOOKED_INTO
        served = calls - self._since - self._misses
        if self._misses < MOST_MISSES + served // HITS_A_MISS:
            return False
        self.rests_until = calls + rest * 2**self._rests
        self._since, self._misses, self._rests = self.rests_until, 0, self._rests + 1
        return True


def same_values(one: Tensor, other: Tensor) -> bool:
    """Check whether two tensors hold the same bits; minus zero is not zero."""
    return one.shape == other.shape and one.dtype == other.dtype and same_bits(one, other)
