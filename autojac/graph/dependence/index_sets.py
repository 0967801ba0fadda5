"""The inputs behind each element of a tensor, as numbered sets, and the unions that operators make of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

MOST_WORK = 100_000_000
"""Elements and entries that are gone through before it is given up: some seconds."""
MOST_ELEMENTS = 30_000_000
"""Elements of one index: 240 MB."""
MOST_ENTRIES = 150_000_000
"""Entries of one matrix: 750 MB."""


class TooLarge(Exception):
    """Following the inputs would take too long or too much memory."""


@dataclass(frozen=True, eq=False)
class IndexSets:
    """The inputs behind each element of a tensor.

    Attributes:
        matrix: one row for each set, (sets, inputs); the first one is empty.
        index: the row of each element, int64, broadcast to the tensor's shape: of length 1 along axes on which the sets
            are alike, and of the tensor's length along all others.
    """

    matrix: scipy.sparse.csr_array
    index: Tensor

    @property
    def axes(self) -> list[int]:
        """The axes along which the sets differ."""
        return [axis for axis, size in enumerate(self.index.shape) if size > 1]

    def numbers(self, shape: Sequence[int]) -> Any:
        """Return the row of each element of a tensor of this shape, flattened."""
        return self.index.expand(tuple(shape)).reshape(-1).numpy()

    def rows(self, shape: Sequence[int]) -> scipy.sparse.csr_array:
        """Return the set of each element of a tensor of this shape, flattened: (elements, inputs)."""
        return self.matrix[self.numbers(shape)]

    def counts(self, shape: Sequence[int]) -> Any:
        """Return how many inputs each element of a tensor of this shape has, flattened."""
        return np.diff(self.matrix.indptr)[self.numbers(shape)]

    def over(self, axes: Collection[int]) -> IndexSets:
        """Return the sets united over some axes."""
        return SetAlgebra(None).unite_along(self, axes)


def compress_index(index: Tensor) -> Tensor:
    """Return an index with length 1 along all axes on which it is alike."""
    for axis, stride in enumerate(index.stride()):
        if stride == 0 and index.shape[axis] > 1:
            index = index.narrow(axis, 0, 1)
    for axis, size in enumerate(index.shape):
        if size > 1:
            first = index.narrow(axis, 0, 1)
            if torch.equal(first, index.narrow(axis, 1, 1)) and bool((index == first).all()):
                index = first
    return index


def _runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the shortest runs of axes of two shapes that hold equally many elements."""
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        one = other = 1
        while not (old or new) or one != other:
            if j >= len(after) or (i < len(before) and one <= other):
                one *= before[i]
                old.append(i)
                i += 1
            else:
                other *= after[j]
                new.append(j)
                j += 1
        runs.append((old, new))
    return runs


class SetAlgebra:
    """Unions of sets, within a limit of work.

    Args:
        limit: elements and entries that may be gone through; None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.work = 0

    def spend(self, amount: int, most: int = MOST_ENTRIES) -> None:
        """Count work before it is done.

        Args:
            amount: entries or elements to go through.
            most: how many there may be at a time, since they are in memory.

        Raises:
            TooLarge: if it is more than the limit.
        """
        self.work += amount
        if self.limit is not None and (amount > most or self.work > self.limit):
            raise TooLarge(f"more than {min(most, self.limit):.0e} elements and entries to go through")

    def reshape(self, source: IndexSets, before: Sequence[int], after: Sequence[int]) -> IndexSets:
        """Return the sets of a tensor that is viewed in another shape."""
        wide: list[int] = []
        made: list[int] = []
        for old, new in _runs(before, after):
            alike = all(source.index.shape[axis] == 1 for axis in old)
            wide += [1 if alike else before[axis] for axis in old]
            made += [1 if alike else after[axis] for axis in new]
        self.spend(math.prod(made), MOST_ELEMENTS)
        return IndexSets(source.matrix, source.index.expand(wide).reshape(made))

    def union(self, one: IndexSets | None, other: IndexSets) -> IndexSets:
        """Unite the sets of tensors that are broadcast against each other, element by element."""
        if one is None or one is other:
            return other
        dims = max(one.index.dim(), other.index.dim())
        left, right = (part.index.reshape((1,) * (dims - part.index.dim()) + part.index.shape) for part in (one, other))
        if one.matrix is other.matrix and torch.equal(left, right):
            return one
        width = other.matrix.shape[0]
        self.spend(math.prod(torch.broadcast_shapes(left.shape, right.shape)), MOST_ELEMENTS)
        codes = left * width + right
        distinct = [part.numel() for part in (left, right) if _are_distinct(part)]
        # no pair is there twice, so none has to be looked for
        if len(distinct) == 2 or codes.numel() in distinct:
            pairs, index = codes.reshape(-1), torch.arange(codes.numel()).reshape(codes.shape)
        else:
            pairs, index = torch.unique(codes, return_inverse=True)
        # the pair of two empty sets may be missing, or not the first: it is put in front in any case
        rows = np.concatenate([np.zeros(1, dtype=np.int64), pairs.numpy()])
        ours, theirs = rows // width, rows % width
        self.spend(int(np.diff(one.matrix.indptr)[ours].sum() + np.diff(other.matrix.indptr)[theirs].sum()))
        return IndexSets(one.matrix[ours] + other.matrix[theirs], index + 1)

    def gather(self, groups: Tensor, source: IndexSets, shape: Sequence[int]) -> IndexSets:
        """Return for each element of a tensor the union over all elements that name it.

        Args:
            groups: for each of the source's elements the element of the result.
            source: what is united, its index of the shape of `groups`.
            shape: of the result.
        """
        self.spend(groups.numel(), MOST_ELEMENTS)
        count, width = math.prod(shape), source.matrix.shape[0]
        codes = torch.unique(groups.reshape(-1) * width + source.index.reshape(-1)).numpy()
        # an empty set in front
        starts = np.searchsorted(codes, np.arange(-1, count + 1) * width)
        return self._unite(starts, codes % width, source, shape)

    def unite_along(self, source: IndexSets, axes: Collection[int]) -> IndexSets:
        """Return the union along some axes, which then have length 1."""
        shape = tuple(source.index.shape)
        if all(shape[axis] == 1 for axis in axes):
            return source
        stay = [axis for axis in range(len(shape)) if axis not in axes]
        self.spend(source.index.numel(), MOST_ELEMENTS)
        lines = source.index.permute(*stay, *axes).reshape(math.prod(shape[axis] for axis in stay), -1)
        lines = lines.sort(1).values
        first = torch.ones_like(lines, dtype=torch.bool)
        first[:, 1:] = lines[:, 1:] != lines[:, :-1]
        # an empty set in front
        starts = np.concatenate([np.zeros(2, dtype=np.int64), first.sum(1).cumsum(0).numpy()])
        lengths = [1 if axis in axes else size for axis, size in enumerate(shape)]
        return self._unite(starts, lines[first].numpy(), source, lengths)

    def _unite(self, starts: Any, rows: Any, source: IndexSets, shape: Sequence[int]) -> IndexSets:
        """Return one set for each element of a tensor: the union of some rows of a matrix."""
        self.spend(int(np.diff(source.matrix.indptr)[rows].sum()))
        choice = _boolean(starts, rows, source.matrix.shape[0])
        return IndexSets(choice @ source.matrix, torch.arange(1, len(starts) - 1).reshape(tuple(shape)))

    def stack(self, sources: Sequence[IndexSets]) -> tuple[scipy.sparse.csr_array, list[int]]:
        """Return the sets of several tensors one after the other, and where those of each tensor start."""
        matrices = list({id(source.matrix): source.matrix for source in sources}.values())
        starts = dict(zip(map(id, matrices), np.cumsum([0] + [part.shape[0] for part in matrices]), strict=False))
        if len(matrices) == 1:
            return matrices[0], [0] * len(sources)
        self.spend(sum(int(part.nnz) for part in matrices))
        made = scipy.sparse.csr_array(scipy.sparse.vstack(matrices, format="csr"))
        return made, [int(starts[id(source.matrix)]) for source in sources]


def _are_distinct(index: Tensor) -> bool:
    """Check whether no two elements are the same number."""
    seen = torch.zeros(int(index.max()) + 1 if index.numel() else 0, dtype=torch.bool)
    seen[index.reshape(-1)] = True
    return int(seen.sum()) == index.numel()


def singles(count: int) -> scipy.sparse.csr_array:
    """Return the sets of one input each, behind the empty one."""
    return _boolean(np.maximum(np.arange(-1, count + 1), 0), np.arange(count), count)


def _boolean(starts: Any, columns: Any, width: int) -> scipy.sparse.csr_array:
    """Return the boolean matrix with these rows."""
    ones = np.ones(len(columns), dtype=bool)
    return scipy.sparse.csr_array((ones, columns, starts), shape=(len(starts) - 1, width))
