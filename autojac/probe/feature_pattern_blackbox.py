"""Which entries of a sample's Jacobian an opaque function shows: by NaN, by gradients, by new values."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.autodiff.tolerance import balanced_noise
from autojac.core.ranks import several
from autojac.core.time_limit import within
from autojac.probe.coordinates import Coordinates
from autojac.probe.sample_pairs import GRADIENT_NOISE, SCALES, ProbePoint, step, time_one_call, where_changed

ROUNDS = 2
"""Gradients at a point: each compares a random set of rows with all columns that these can't reach."""
MOST_ELEMENTS = 1 << 22
"""Elements of inputs and outputs in one pass over replicas of a sample."""
MOST_PASSES = 256
"""Evaluations among several ranks, where no clock may decide what is too expensive."""


def by_nan(
    point: ProbePoint, where: Coordinates, values: Sequence[Tensor], sliceable: bool, budget_s: float
) -> tuple[scipy.sparse.csr_array | None, str]:
    """Return the pattern that NaN shows, put into one coordinate of all samples, or of replicas of each in one pass."""
    alone = sliceable and set(where.differentiated) <= where.batched
    chunk = max(MOST_ELEMENTS // (where.m + where.n), 1) if alone else 1
    cost = time_one_call(point) * where.n
    passes = point.batch * -(-where.n // chunk) if alone else where.n
    if several() and passes > MOST_PASSES:
        return None, f"NaN in each of {where.n} coordinates would take {passes} evaluations"
    if cost > budget_s:
        return None, f"NaN in each of {where.n} coordinates would take {cost:.2g} s"
    rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for replaced, base, first in _taint(point, where, values, alone, chunk):
        try:
            after = point.values(replaced)
        except Exception as error:  # factorizations and comparisons may refuse NaN
            return None, f"func raises {type(error).__name__} on NaN"
        start = 0
        for now, before in zip(after, base, strict=True):
            fresh = (now.isnan() & ~before.isnan()).reshape(len(now), -1).cpu()
            lines, entries = fresh.nonzero().numpy().T
            rows.append(entries + start)
            columns.append(lines + first if alone else np.full(len(entries), first))
            start += fresh.shape[1]
    row, column = np.concatenate(rows), np.concatenate(columns)
    pattern = scipy.sparse.coo_array((np.ones(len(row), bool), (row, column)), shape=(where.m, where.n))
    return scipy.sparse.csr_array(pattern), f"by NaN in each of {where.n} coordinates"


def _taint(
    point: ProbePoint, where: Coordinates, values: Sequence[Tensor], alone: bool, chunk: int
) -> Iterator[tuple[dict[int, Tensor], Sequence[Tensor], int]]:
    """Yield leaves with NaN in some coordinates, func's values without NaN, and the first of these coordinates."""
    numbers = where.numbers(point.leaves)
    for sample in range(point.batch if alone else 1):
        for first in range(0, where.n, chunk):
            count = min(chunk, where.n - first)
            replaced: dict[int, Tensor] = {}
            for position, leaf in enumerate(point.leaves):
                coordinates, tainted = numbers[position], leaf
                if alone and position in where.batched:
                    tainted = leaf[sample : sample + 1].expand(count, *leaf.shape[1:])
                if coordinates is not None and alone:
                    targets = torch.arange(first, first + count).reshape(-1, *[1] * (leaf.dim() - 1))
                    tainted = torch.where((coordinates[:1] == targets).to(leaf.device), math.nan, tainted)
                elif coordinates is not None:
                    tainted = torch.where((coordinates == first).to(leaf.device), math.nan, tainted)
                replaced[position] = tainted
            yield replaced, [value[sample : sample + 1] for value in values] if alone else values, first


def complete_pattern(
    point: ProbePoint, where: Coordinates, found: scipy.sparse.csr_array, generator: torch.Generator, moving: bool
) -> tuple[scipy.sparse.csr_array, int, str]:
    """Add to a pattern what is seen outside of it at several points; return also how many entries, and how.

    A gradient of several rows shows that one of them reaches a column, not which one: all of them count.

    Args:
        point: the function, and where it is probed.
        where: its coordinates.
        found: the pattern, (m, n).
        generator: of other points, rows, columns and cotangents.
        moving: add also what new values move, besides what gradients show. Not for a pattern that follows from the
            operators: where it has no entry, values may move without a derivative.
    """
    before, points = found.nnz, 0
    for turn, scale in ((0, 0.0), *enumerate(SCALES)):
        there = point.at_other_point(turn, scale, generator) if scale else point
        columns = _some(found.nnz / where.m, where.n, generator)
        try:
            with point.sandbox():
                pullback = within(point.limit_s, functools.partial(there.pullback, where.differentiated))
                more = _with_gradients(pullback, where, found, generator)
            if moving and scale:
                changed = there.values(_move(there, where, columns, scale, generator))
                steps = [where_changed(after, y.detach()) for after, y in zip(changed, pullback.recorded, strict=True)]
                outside = torch.from_numpy(~(more @ columns.numpy()))
                more = _with_block(more, where.of_outputs(steps) & outside, columns)
        except Exception:
            if not scale:
                raise
            # values that its user never passes may be refused, or take for ever
            continue
        found, points = more, points + 1
    return found, found.nnz - before, f"{ROUNDS * points} gradients at {points} points"


def _with_gradients(
    pullback: Pullback, where: Coordinates, found: scipy.sparse.csr_array, generator: torch.Generator
) -> scipy.sparse.csr_array:
    """Add random rows by the columns where their gradient is nonzero although none of them reaches these."""
    values = pullback.recorded
    for _ in range(ROUNDS):
        rows = _some(found.nnz / where.n, where.m, generator)
        outside = torch.from_numpy(~(found.T @ rows.numpy()))
        masks = where.as_outputs(rows, values)
        cotangents = [noise * mask for noise, mask in zip(balanced_noise(values, generator), masks, strict=True)]
        hit = []
        for gradient in pullback.pull(values, cotangents):
            # zero times an infinite derivative is NaN wherever it is: that says nothing of what it depends on
            size = gradient.nan_to_num(0, 0, 0).abs()
            largest = float(size.amax()) if size.numel() else 0.0
            hit.append(size > GRADIENT_NOISE * torch.finfo(size.dtype).eps * largest)
        found = _with_block(found, rows, where.of_inputs(hit) & outside)
    return found


def _move(
    point: ProbePoint, where: Coordinates, columns: Tensor, scale: float, generator: torch.Generator
) -> dict[int, Tensor]:
    """Return the differentiated leaves with noise on some coordinates."""
    masks = where.as_inputs(columns, point.leaves)
    leaves = [point.leaves[position] for position in where.differentiated]
    return {
        position: leaf + step(leaf, scale, generator) * mask
        for position, leaf, mask in zip(where.differentiated, leaves, masks, strict=True)
    }


def _some(reached: float, size: int, generator: torch.Generator) -> Tensor:
    """Return a random mask that reaches about half of the other side, of which `reached` entries reach each."""
    share = 1 - 0.5 ** (1 / max(reached, 1.0))
    mask: Tensor = torch.rand(size, generator=generator) < max(share, 1 / size)
    return mask


def _with_block(found: scipy.sparse.csr_array, rows: Tensor, columns: Tensor) -> scipy.sparse.csr_array:
    """Return a pattern with all pairs of some rows and some columns."""
    if not bool(rows.any()) or not bool(columns.any()):
        return found
    one, other = (scipy.sparse.csr_array(mask.numpy()[None]) for mask in (rows, columns))
    return scipy.sparse.csr_array(found + one.T @ other)
