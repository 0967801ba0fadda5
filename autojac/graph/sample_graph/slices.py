"""Which samples stand behind which slices of a tensor: sparse boolean matrices, and what operators do to them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy.sparse

Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]

MOST_SLICES = 30_000_000
"""More slices are not told apart: 360 MB of indices if each reads one sample."""
MOST_WORK = 150_000_000
"""Entries that one operator may cost before its result counts as reading everything: some seconds."""


class TooDense(Exception):
    """Too many samples are read to write them down."""


@dataclass(frozen=True, eq=False)
class SliceSamples:
    """The samples that slices of a tensor read.

    Attributes:
        axes: the axes along which slices are told apart, ascending; none if the tensor is looked at as a whole.
        sizes: the tensor's length along each, more than 1.
        samples: boolean, one row for each slice in C order of `axes`, one column for each sample.
    """

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    samples: scipy.sparse.csr_array

    @classmethod
    def of_batch(cls, batch: int) -> Self:
        """Slice b of axis 0 reads sample b."""
        return cls((0,), (batch,), csr(np.arange(batch + 1), np.arange(batch), batch))

    @classmethod
    def nothing(cls, batch: int) -> Self:
        return cls((), (), csr(np.zeros(2, dtype=np.int64), np.zeros(0, dtype=np.int32), batch))

    @property
    def slices(self) -> int:
        return math.prod(self.sizes)

    def length(self, axis: int) -> int:
        """Return how many slices are told apart along an axis."""
        return dict(zip(self.axes, self.sizes, strict=True)).get(axis, 1)

    def numbers(self, dims: int) -> Ints:
        """Return the slice that each entry of the tensor lies in, with length 1 where slices are not told apart."""
        return np.arange(self.slices).reshape([self.length(axis) for axis in range(dims)])

    def taken(self, rows: Ints, axes: Sequence[int], sizes: Sequence[int]) -> SliceSamples:
        """Slices (as many as `rows`) that each are one of these; -1 is one that reads nothing."""
        return SliceSamples(tuple(axes), tuple(sizes), _take(self.samples, rows))

    def mixed(self, matrix: scipy.sparse.csr_array, axes: Sequence[int], sizes: Sequence[int]) -> SliceSamples:
        """Slices that each read several of these: those in its row of the matrix.

        Raises:
            TooDense: if that is too much work.
        """
        if int(np.diff(self.samples.indptr)[matrix.indices].sum()) > MOST_WORK:
            raise TooDense
        return SliceSamples(tuple(axes), tuple(sizes), matrix @ self.samples)

    def placed(self, where: Mapping[int, int]) -> SliceSamples:
        """The same with axes elsewhere: `where` maps those kept; along the others slices are put together."""
        lost = [axis for axis in self.axes if axis not in where]
        if lost:
            return self.without(lost).placed(where)
        target = [where[axis] for axis in self.axes]
        order = sorted(range(len(target)), key=target.__getitem__)
        axes = tuple(target[k] for k in order)
        if order == list(range(len(order))):
            return SliceSamples(axes, self.sizes, self.samples)
        rows = np.arange(self.slices).reshape(self.sizes).transpose(order).ravel()
        return self.taken(rows, axes, [self.sizes[k] for k in order])

    def without(self, lost: Iterable[int]) -> SliceSamples:
        """Slices put together along some axes."""
        gone = set(lost)
        kept = [axis for axis in self.axes if axis not in gone]
        sizes = [self.length(axis) for axis in kept]
        shape = [1 if axis in gone else size for axis, size in zip(self.axes, self.sizes, strict=True)]
        into = np.broadcast_to(np.arange(math.prod(sizes)).reshape(shape), self.sizes).ravel()
        return self.mixed(incidence(into, np.arange(self.slices), math.prod(sizes), self.slices), kept, sizes)

    def spread_over(self, axes: Sequence[int], sizes: Sequence[int]) -> SliceSamples:
        """The same with slices told apart along more axes.

        Raises:
            TooDense: if there are too many.
        """
        if tuple(axes) == self.axes:
            return self
        if math.prod(sizes) > MOST_SLICES:
            raise TooDense
        shape = [self.length(axis) for axis in axes]
        rows = np.broadcast_to(np.arange(self.slices).reshape(shape), sizes).ravel()
        degrees = np.diff(self.samples.indptr)
        if len(degrees) and math.prod(sizes) // max(self.slices, 1) * int(degrees.sum()) > MOST_WORK:
            raise TooDense
        return self.taken(rows, axes, sizes)


def united(parts: Sequence[SliceSamples]) -> SliceSamples:
    """Return what slices read that read from all of these, told apart along the axes of any."""
    distinct = list({(part.axes, id(part.samples)): part for part in parts}.values())
    if len(distinct) == 1:
        return distinct[0]
    sizes = {axis: size for part in distinct for axis, size in zip(part.axes, part.sizes, strict=True)}
    axes = sorted(sizes)
    lengths = [sizes[axis] for axis in axes]
    if math.prod(lengths) > MOST_SLICES:
        raise TooDense
    aligned = [part.spread_over(axes, lengths).samples for part in distinct]
    return SliceSamples(tuple(axes), tuple(lengths), functools.reduce(lambda one, other: one + other, aligned))


def stacked(parts: Sequence[SliceSamples]) -> scipy.sparse.csr_array:
    """Return the slices of several, one after the other."""
    return scipy.sparse.vstack([part.samples for part in parts], format="csr") if len(parts) > 1 else parts[0].samples


def incidence(rows: Ints, columns: Ints, height: int, width: int) -> scipy.sparse.csr_array:
    """Return the boolean matrix with these entries."""
    ones = np.ones(len(rows), dtype=bool)
    pair = (rows.astype(np.int32), columns.astype(np.int32))
    return scipy.sparse.coo_array((ones, pair), shape=(height, width)).tocsr()


def csr(starts: Ints, columns: Ints, width: int) -> scipy.sparse.csr_array:
    """Return the boolean matrix with these rows."""
    ones = np.ones(len(columns), dtype=bool)
    kind = np.int32 if len(columns) < 2**31 else np.int64
    shape = (len(starts) - 1, width)
    return scipy.sparse.csr_array((ones, columns.astype(np.int32, copy=False), starts.astype(kind)), shape=shape)


def _take(matrix: scipy.sparse.csr_array, rows: Ints) -> scipy.sparse.csr_array:
    """Rows of a matrix by number; an empty one for -1."""
    found = rows >= 0
    safe = np.where(found, rows, 0)
    counts = np.where(found, np.diff(matrix.indptr)[safe], 0) if matrix.shape[0] else np.zeros(len(rows), dtype=int)
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    if starts[-1] > MOST_WORK:
        raise TooDense
    first = matrix.indptr[safe] if matrix.shape[0] else safe
    if len(counts) and counts.min() == counts.max() == 1:
        return csr(starts, matrix.indices[first], matrix.shape[1])
    places = np.repeat(first - starts[:-1], counts) + np.arange(starts[-1])
    return csr(starts, matrix.indices[places], matrix.shape[1])
