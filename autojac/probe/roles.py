"""Where the batch is: which tensors carry it on axis 0, and whether func of some samples is those samples of func."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.errors import OutputError
from autojac.limits import within
from autojac.quiet import Quiet
from autojac.tolerance import disagreement

MOST_AMBIGUOUS = 4
HANG_S = 60.0
"""Some of the samples should take no longer than all; a loop that waits for the others never ends."""


def guess_batched(leaves: Sequence[Tensor], batch: int) -> tuple[bool, ...]:
    """By shape alone: a tensor whose axis 0 has the outputs' length carries the batch."""
    return tuple(leaf.dim() > 0 and leaf.shape[0] == batch for leaf in leaves)


def slice_samples(leaves: Sequence[Tensor], batched: Sequence[bool], stop: int) -> list[Tensor]:
    """The first `stop` samples of every tensor that carries the batch."""
    return [leaf[:stop] if has else leaf for leaf, has in zip(leaves, batched, strict=True)]


def resolve_batched(
    fn: Any,
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    values: Sequence[Tensor],
    guess: tuple[bool, ...],
    fixed: Sequence[bool],
    differentiated: Sequence[int],
    quiet: Quiet,
) -> tuple[tuple[bool, ...], str | None]:
    """Check a guess of the roles: slicing the arguments must slice the outputs.

    A tensor may have the batch's length by chance (B = n), so other assignments are tried, side inputs first.

    Args:
        fixed: which leaves have their role from the user; it is checked but not changed.

    Returns:
        The roles, and why func can't be sliced; None if it can.

    Raises:
        OutputError: if func runs on slices and its outputs do not follow, for a guess.
    """
    batch = len(values[0])
    if batch < 2:
        return guess, None
    stop = batch // 2
    refusal: str | None = None
    astray = False
    inexact: tuple[bool, ...] | None = None
    for assignment in _assignments(guess, fixed, differentiated):
        try:
            samples = slice_samples(leaves, assignment, stop)
            samples = [x.detach().requires_grad_(i in differentiated) for i, x in enumerate(samples)]
            # func may differentiate itself
            with quiet(), torch.enable_grad():
                sliced = [part.detach() for part in within(HANG_S, functools.partial(fn, samples, kwargs))]
        except Exception as error:  # whatever func raises on half a batch says that it can't be sliced
            reason = next(iter(str(error).splitlines()), "")
            refusal = refusal or f"func of {stop} of {batch} samples raises {type(error).__name__}: {reason}"
            continue
        if any(part.dim() == 0 or len(part) != stop for part in sliced):
            astray = True
            continue
        # an event may span the batch, as in x @ x.T: then only the axis follows
        if all(
            part.shape[1:] == whole.shape[1:] and disagreement(part, whole[:stop]) is None
            for part, whole in zip(sliced, values, strict=True)
        ):
            return assignment, None
        # right lengths may come of broadcasting: another assignment may give the right values too
        inexact = inexact or assignment
    if inexact is not None:
        return inexact, "func of some samples differs from those samples of func"
    if astray and not all(fixed):
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise OutputError(
            f"func's outputs have shape {shapes}, but half of the batch does not give half of the outputs: axis 0 is "
            "not the batch. Return (B, ...), or say with in_dims which arguments carry the batch"
        )
    return guess, refusal or "the outputs do not follow when the arguments are sliced"


def _assignments(
    guess: tuple[bool, ...], fixed: Sequence[bool], differentiated: Sequence[int]
) -> list[tuple[bool, ...]]:
    """The guess, then the guess with some tensors taken as shared, fewest and side inputs first."""
    carriers = [position for position, has in enumerate(guess) if has and not fixed[position]]
    # inputs come last: an input of the batch's length is rarely shared
    ambiguous = sorted(carriers, key=lambda position: (position in differentiated, -position))[:MOST_AMBIGUOUS]
    found = []
    for count in range(len(ambiguous) + 1):
        for shared in itertools.combinations(ambiguous, count):
            assignment = tuple(has and position not in shared for position, has in enumerate(guess))
            if any(assignment) or not any(guess):
                found.append(assignment)
    return found
