"""Which derivatives by input columns are asked for: multi-indices, and sums of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal

Columns = tuple[int, ...]
"""A derivative: once by each column named, `(1, 1)` twice by column 1 and `()` the value itself. Sorted."""
Term = tuple[Columns, ...]
"""A sum of derivatives."""
Terms = tuple[Term, ...] | Literal["laplacian"]
"""The derivatives asked for; the Laplacian's terms follow from the number of columns."""


def resolve_terms(of: Terms, columns: int) -> tuple[Term, ...]:
    """Return the terms for an input of `columns` columns."""
    return (tuple((column, column) for column in range(columns)),) if of == "laplacian" else of


def parts(columns: Columns) -> Iterator[Columns]:
    """Yield every derivative that a derivative is built on: each selection from its columns, itself included."""
    for order in range(len(columns) + 1):
        yield from itertools.combinations(columns, order)


def partitions(columns: Columns) -> Iterator[tuple[Columns, ...]]:
    """Yield each way to split the columns of a derivative into blocks, as in Faà di Bruno's formula."""
    if not columns:
        yield ()
        return
    first, rest = columns[0], range(1, len(columns))
    for count in range(len(columns)):
        for chosen in itertools.combinations(rest, count):
            block = (first, *(columns[place] for place in chosen))
            for others in partitions(tuple(columns[place] for place in rest if place not in chosen)):
                yield (block, *others)


def in_words(term: Iterable[Columns]) -> str:
    """Return a sum of derivatives, human-readable."""
    return " + ".join("u_" + ",".join(map(str, columns)) if columns else "u" for columns in term)
