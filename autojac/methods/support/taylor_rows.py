"""Rows of derivatives that Taylor mode carries with a value: which are needed, and how they depend on each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from autojac.autodiff.derivative_terms import Term, partitions, parts


@dataclass(frozen=True)
class Split:
    """Terms of one row of Faà di Bruno's formula whose blocks have the same sizes.

    Attributes:
        row: which row they are added to.
        blocks: for each block the rows that fill it, one for each term, all of one order.
    """

    row: int
    blocks: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> set[int]:
        """All rows that fill a block."""
        return {row for block in self.blocks for row in block}


@dataclass(frozen=True)
class CarriedRows:
    """Which derivatives are carried, and how they depend on each other.

    Attributes:
        keys: what each row holds, ordered by order: a derivative, or a sum of second ones.
        splits: what operators that are not linear add to rows.
    """

    keys: tuple[Term, ...]
    splits: tuple[Split, ...]

    @classmethod
    def for_terms(cls, terms: Sequence[Term]) -> CarriedRows:
        """Return the rows that lead to sums of derivatives."""
        rows: dict[Term, None] = {}
        for term in terms:
            if _collapses(term):
                rows |= {((column,),): None for columns in term for column in columns} | {term: None}
            else:
                rows |= {(part,): None for columns in term for part in parts(columns) if part}
        keys = tuple(sorted(rows, key=lambda term: (len(term[0]), len(term) > 1, term)))
        place = {key: number for number, key in enumerate(keys)}
        splits = []
        for key in keys:
            grouped: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
            for columns in key:
                for blocks in partitions(columns):
                    if len(blocks) > 1:
                        ordered = sorted((tuple(sorted(block)) for block in blocks), key=len)
                        filled = tuple(place[(block,)] for block in ordered)
                        grouped.setdefault(tuple(map(len, ordered)), []).append(filled)
            splits += [Split(place[key], tuple(zip(*each, strict=True))) for each in grouped.values()]
        return cls(keys, tuple(splits))

    def order(self, row: int) -> int:
        """Return the order of the derivatives in a row."""
        return len(self.keys[row][0])

    def of(self, term: Term) -> list[int | None]:
        """Return the rows whose sum a term is; None is the value itself."""
        keys = (term,) if _collapses(term) else tuple((columns,) for columns in term)
        return [None if key == ((),) else self.keys.index(key) for key in keys]

    def into(self, wanted: Iterable[int]) -> set[int]:
        """Return the rows of an operator's argument that lead to some of its result."""
        rows = set(wanted)
        return rows.union(*(split.rows for split in self.splits if split.row in rows))


def _collapses(term: Term) -> bool:
    return len(term) > 1 and all(len(columns) == 2 for columns in term)


class CarriedPart(NamedTuple):
    """Rows of one order: which, and their values (r, *shape), of which axes may have length one that are expanded."""

    rows: tuple[int, ...]
    values: Tensor


@dataclass
class Series:
    """A value and the rows of its derivatives, in one part per order; rows that are in none are zero, or not needed."""

    value: Tensor
    parts: dict[int, CarriedPart]

    def take(self, order: int, rows: Sequence[int]) -> Tensor:
        """Return some rows of one order."""
        known = self.parts[order]
        return _take(known.values, [known.rows.index(row) for row in rows])

    def has(self, rows: Iterable[int]) -> bool:
        """Check whether all of these rows are carried."""
        known = {row for part in self.parts.values() for row in part.rows}
        return known.issuperset(rows)


def _take(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return some rows; a view where they lie side by side."""
    start, count = numbers[0], len(numbers)
    if list(numbers) == list(range(start, start + count)):
        return rows if count == len(rows) else rows[start : start + count]
    return torch.cat([rows[number : number + 1] for number in numbers])
