"""Where the batch is: which tensors carry it on axis 0, and whether func of some samples is those samples of func."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autojac.autodiff.tolerance import disagreement
from autojac.core import pytree, work_clock
from autojac.core.time_limit import within
from autojac.errors import InputError, OutputError
from autojac.probe.flat_call import FlatCall, Roles

MOST_AMBIGUOUS = 4
"""Tensors that are tried as shared, in all combinations."""
MOST_SAMPLES = 256
"""Samples on which a proof is compared with numbers."""
HANG_S = 60.0
"""Some of the samples should take no longer than all; a loop that waits for the others never ends."""


def guess_batched(leaves: Sequence[Tensor], batch: int) -> tuple[bool, ...]:
    """Guess by shape alone: a tensor whose axis 0 has the outputs' length carries the batch."""
    return tuple(leaf.dim() > 0 and leaf.shape[0] == batch for leaf in leaves)


@dataclass(frozen=True)
class SomeSamples:
    """A call of func with some of the samples, which gave what the whole batch gave for these.

    Attributes:
        call: with these samples alone.
        values: its outputs.
        seconds: how long it took.
    """

    call: FlatCall
    values: tuple[Tensor, ...]
    seconds: float


def some_samples(
    call: FlatCall, values: Sequence[Tensor], batched: Sequence[bool], keywords: bool = False
) -> SomeSamples | None:
    """Call func with some of the samples; None where that does not give the same as for the whole batch.

    Args:
        call: with detached leaves.
        values: its outputs.
        batched: which leaves carry the batch.
        keywords: take the same samples of keyword arguments as long as the batch.
    """
    batch = len(values[0])
    count = min((batch + 1) // 2, MOST_SAMPLES)
    # the first, the last, and those between in equal steps
    rows = torch.linspace(0, batch - 1, count, dtype=torch.float64).round().long()
    leaves = [leaf[rows.to(leaf.device)] if has else leaf for leaf, has in zip(call.leaves, batched, strict=True)]
    kwargs = call.kwargs
    if keywords:
        kwargs = pytree.tree_map_only(Tensor, lambda x: x[rows.to(x.device)] if _as_long_as(x, batch) else x, kwargs)
    few = call._replace(leaves=[leaf.detach() for leaf in leaves], kwargs=kwargs)
    start = work_clock.clock.working_s()
    try:
        parts = tuple(_evaluate(few))
        same = all(
            part.shape == (count, *whole.shape[1:]) and disagreement(part, whole[rows.to(whole.device)]) is None
            for part, whole in zip(parts, values, strict=True)
        )
    except Exception:  # whatever func raises on a part of the batch says that it can't be called on one
        return None
    return SomeSamples(few, parts, work_clock.clock.working_s() - start) if same else None


def resolve_batched(call: FlatCall, values: Sequence[Tensor], roles: Roles) -> tuple[tuple[bool, ...], str | None]:
    """Check a guess of the roles: slicing the arguments must slice the outputs.

    A tensor may have the batch's length by chance (B = n), so other assignments are tried, side inputs first.

    Args:
        call: with detached leaves.
        values: its outputs.
        roles: the guess, and what is known already.

    Returns:
        The roles, and why func can't be sliced; None if it can.

    Raises:
        InputError: if a tensor to be differentiated may carry the batch or not, and nothing tells which.
        OutputError: if func runs on slices and its outputs do not follow, for a guess.
    """
    batch = len(values[0])
    if batch < 2:
        return roles.guess, None
    stop = (batch + 1) // 2
    sliced_kwargs = pytree.tree_map_only(
        Tensor, lambda value: value[:stop] if _as_long_as(value, batch) else value, call.kwargs
    )
    batched, refusal = _roles_by_slices(call, values, roles)
    if batched is None and any(
        map(operator.is_not, pytree.tree_leaves(sliced_kwargs), pytree.tree_leaves(call.kwargs))
    ):
        # keyword arguments go to func as they are, but here slices of them show the roles of the others
        batched, _ = _roles_by_slices(call._replace(kwargs=sliced_kwargs), values, roles)
    if batched is not None:
        return batched, refusal
    return _settle_roles(call, values, roles), refusal


def _evaluate(call: FlatCall) -> list[Tensor]:
    """Return func's outputs, detached, unless it hangs."""
    leaves = [x.detach().requires_grad_(i in call.differentiated) for i, x in enumerate(call.leaves)]
    # func may differentiate itself
    with call.sandbox(), torch.enable_grad():
        return [y.detach() for y in within(HANG_S, functools.partial(call.fn, leaves, call.kwargs))]


def _as_long_as(value: Tensor, batch: int) -> bool:
    return value.layout == torch.strided and value.dim() > 0 and len(value) == batch


def _settle_roles(call: FlatCall, values: Sequence[Tensor], roles: Roles) -> tuple[bool, ...]:
    """Return the roles where slices don't show them: by earlier calls, or by which rows of the outputs move."""
    settled, fixed = list(roles.guess), roles.fixed
    carriers = [p for p, has in enumerate(roles.guess) if has and (fixed[p] or call.leaves[p].is_floating_point())]
    for position in call.differentiated:
        # something has to carry the batch: what is declared to, else the first that has the outputs' length
        others = [p for p in carriers if p < position or fixed[p]]
        if fixed[position] or not roles.guess[position] or not others:
            continue
        if position in roles.known:
            settled[position] = roles.known[position]
        elif not _moves_own_row(call, values, position):
            raise InputError(
                f"tensor argument {position} has shape {tuple(call.leaves[position].shape)} and the outputs have as "
                "many rows, but func can't be called on some of the samples, so nothing shows whether this argument "
                "carries the batch or is shared by all samples. Say so with in_dims, such as in_dims=(0, None)"
            )
    return tuple(settled)


def _moves_own_row(call: FlatCall, values: Sequence[Tensor], position: int) -> bool:
    """Check whether another first row of a tensor moves the first row of the outputs, and no other."""
    other = call.leaves[position].detach().clone()
    other[0] = other[0] * 0.5 + 0.25
    leaves = [other if place == position else leaf.detach() for place, leaf in enumerate(call.leaves)]
    try:
        with call.sandbox(), torch.enable_grad():
            outputs = within(HANG_S, lambda: [y.detach() for y in call.fn(leaves, call.kwargs)])
    except Exception:  # func may refuse what its user never passes
        return False
    first = any(disagreement(y[:1], value[:1]) is not None for y, value in zip(outputs, values, strict=True))
    rest = any(disagreement(y[1:], value[1:]) is not None for y, value in zip(outputs, values, strict=True))
    return first and not rest


def _roles_by_slices(
    call: FlatCall, values: Sequence[Tensor], roles: Roles
) -> tuple[tuple[bool, ...] | None, str | None]:
    """Return the roles by which slices give outputs of as many samples, and why these are not slices of the outputs."""
    batch = len(values[0])
    stop = (batch + 1) // 2
    refusal: str | None = None
    wrong_lengths = False
    inexact: tuple[bool, ...] | None = None
    for assignment in _assignments(roles, call.differentiated):
        try:
            leaves = [leaf[:stop] if has else leaf for leaf, has in zip(call.leaves, assignment, strict=True)]
            parts = _evaluate(call._replace(leaves=leaves))
        except Exception as error:  # whatever func raises on half a batch says that it can't be sliced
            reason = next(iter(str(error).splitlines()), "")
            refusal = refusal or f"func of {stop} of {batch} samples raises {type(error).__name__}: {reason}"
            continue
        if any(part.dim() == 0 or len(part) != stop for part in parts):
            wrong_lengths = True
            continue
        # an event may span the batch, as in x @ x.T: then only the axis follows
        if all(
            part.shape[1:] == whole.shape[1:] and disagreement(part, whole[:stop]) is None
            for part, whole in zip(parts, values, strict=True)
        ):
            return assignment, None
        # right lengths may come of broadcasting: another assignment may give the right values too
        inexact = inexact or assignment
    if inexact is not None:
        return inexact, "func of some samples differs from those samples of func"
    # one sample alone is stretched by whatever else func holds of the whole batch, so it proves nothing
    if wrong_lengths and not all(roles.fixed) and stop > 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise OutputError(
            f"func's outputs have shape {shapes}, but half of the batch does not give half of the outputs: axis 0 is "
            "not the batch. Return (B, ...), or say with in_dims which arguments carry the batch"
        )
    return None, refusal or "the outputs do not follow when the arguments are sliced"


def _assignments(roles: Roles, differentiated: Sequence[int]) -> list[tuple[bool, ...]]:
    """Return the guess, then the guess with some tensors taken as shared, fewest and side inputs first."""
    carriers = [position for position, has in enumerate(roles.guess) if has and not roles.fixed[position]]
    # inputs come last: an input of the batch's length is rarely shared
    ambiguous = sorted(carriers, key=lambda position: (position in differentiated, -position))[:MOST_AMBIGUOUS]
    assignments = []
    for count in range(len(ambiguous) + 1):
        for shared in itertools.combinations(ambiguous, count):
            assignment = tuple(has and position not in shared for position, has in enumerate(roles.guess))
            if any(assignment) or not any(roles.guess):
                assignments.append(assignment)
    return assignments
