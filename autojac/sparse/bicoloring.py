"""Colorings of rows and columns together: some entries are read by pulls, the others by pushes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from autojac.core.pattern import Indices, Pattern
from autojac.sparse.greedy_coloring import ENTRIES, PAIRS, fewest

if TYPE_CHECKING:
    import scipy.sparse

TRIED: Final = 40
"""Divisions that are colored at most."""


def both(pattern: Pattern) -> tuple[Indices, Indices]:
    """Color rows and columns so that every entry can be read directly from the class of its row or of its column.

    A few rows are read whole from pulls, and what is left of the columns from pushes, or the other way round. Which
    rows: those with the most entries, or those that alone keep most pairs of columns apart. Either suits arrowheads,
    dense borders and matrices with dense and sparse parts (Hossain & Steihaug, "Computing a sparse Jacobian matrix by
    rows and columns", 1998; Coleman & Verma, "The efficient computation of sparse Jacobian matrices using automatic
    differentiation", 1998). Of a star bicoloring (Gebremedhin, Manne & Pothen, "What color is your Jacobian?", 2005)
    it is the special case where the two sides don't share entries.

    Args:
        pattern: (m, n).

    Returns:
        Colors of the rows (m,) and of the columns (n,), int32; -1 for those that no entry is read from. One side may
        have none.
    """
    matrix = pattern.scipy()
    transposed = matrix.T.tocsr()
    columns, rows = fewest(transposed), fewest(matrix)
    best = (_no_colors(pattern.shape[0]), columns)
    if rows.max(initial=-1) < columns.max(initial=-1):
        best = (rows, _no_colors(pattern.shape[1]))
    if _total(best) <= 2:
        return best
    fewest_before = _total(best)
    chosen: tuple[scipy.sparse.csr_array, Indices, bool] | None = None
    for count, peeled, flipped in _divisions(matrix, transposed, fewest_before):
        if count < fewest_before:
            side = transposed if flipped else matrix
            total = _total(_color(side, peeled, thorough=False))
            if total < fewest_before:
                fewest_before, chosen = total, (side, peeled, flipped)
    if chosen is None:
        return best
    side, peeled, flipped = chosen
    # the quick coloring is what was counted on, and more effort can end with more
    ours, theirs = min((_color(side, peeled, thorough) for thorough in (False, True)), key=_total)
    return (theirs, ours) if flipped else (ours, theirs)


def is_read_from_rows(
    pattern: Pattern, row_colors: Indices, column_colors: Indices
) -> np.ndarray[tuple[int], np.dtype[np.bool]]:
    """Return for each entry whether it is read from the class of its row; else it is from that of its column.

    Args:
        pattern: (m, n).
        row_colors, column_colors: (m,) and (n,); -1 for none.

    Returns:
        (entries,), in the pattern's order.

    Raises:
        ValueError: an entry can be read from neither.
    """
    from_rows = collision_free(row_colors[pattern.rows], pattern.columns, pattern.shape[1])
    from_columns = collision_free(column_colors[pattern.columns], pattern.rows, pattern.shape[0])
    if not (from_rows | from_columns).all():
        raise ValueError("some entries can be read neither from the color of their row nor from that of their column")
    return from_rows


def collision_free(colors: Indices, places: Indices, size: int) -> np.ndarray[tuple[int], np.dtype[np.bool]]:
    """Return for each entry whether no other one of its color is added up at its place.

    Args:
        colors: of each entry; -1 for none, which is never alone.
        places: of each entry in its class's compressed row or column.
        size: number of places.
    """
    keys = colors.astype(np.int64) * size + places
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    answer: np.ndarray[tuple[int], np.dtype[np.bool]] = (counts[inverse] == 1) & (colors >= 0)
    return answer


def _no_colors(size: int) -> Indices:
    return np.full(size, -1, dtype=np.int32)


def _total(colors: tuple[Indices, Indices]) -> int:
    return sum(int(side.max(initial=-1)) + 1 for side in colors)


def _color(matrix: scipy.sparse.csr_array, peeled: Indices, thorough: bool) -> tuple[Indices, Indices]:
    """Return colors of the peeled rows, and of the columns of the others."""
    rows = _no_colors(matrix.shape[0])
    rows[peeled] = fewest(matrix[peeled], thorough)
    rest = np.ones(matrix.shape[0], dtype=bool)
    rest[peeled] = False
    return rows, fewest(matrix[rest].T.tocsr(), thorough)


def _divisions(
    matrix: scipy.sparse.csr_array, transposed: scipy.sparse.csr_array, limit: int
) -> list[tuple[int, Indices, bool]]:
    """Return rows, or columns, to be read apart, with a lower bound on all colors then; the most promising first."""
    found = []
    for flipped, side in ((False, matrix), (True, transposed)):
        for order in _orders(side):
            for peeled in _prefixes(order, np.diff(side.indptr)):
                bound = _lower_bound(side, peeled)
                if bound < limit:
                    found.append((bound, peeled, flipped))
    found.sort(key=lambda division: (division[0], len(division[1])))
    return found[: int(np.clip(ENTRIES // max(1, matrix.nnz), 2, TRIED))]


def _orders(matrix: scipy.sparse.csr_array) -> Iterator[Indices]:
    degrees = np.diff(matrix.indptr)
    yield np.argsort(-degrees, kind="stable")
    if max((degrees.astype(np.int64) ** 2).sum(), matrix.shape[0] * matrix.shape[1]) <= PAIRS // 4:
        # a pair of columns that several rows keep apart counts for each of them by its share
        shared = (matrix.T.astype(np.float64) @ matrix.astype(np.float64)).tocsr()
        shared.data = 1 / shared.data
        yield np.argsort(-(matrix @ shared).multiply(matrix).sum(axis=1), kind="stable")


def _prefixes(order: Indices, degrees: Indices) -> Iterator[Indices]:
    """Yield the first few in an order: powers of the square root of 2, and where the numbers of entries drop most."""
    sorted_degrees = np.maximum(degrees[order], 1)
    drops = np.argsort(sorted_degrees[1:] / sorted_degrees[:-1], kind="stable")[:8] + 1
    powers = np.floor(np.sqrt(2.0) ** np.arange(2 * np.log2(max(2, len(order))))).astype(np.int64)
    for length in np.unique(np.concatenate([drops, powers])):
        if 0 < length < len(order):
            yield order[:length]


def _lower_bound(matrix: scipy.sparse.csr_array, peeled: Indices) -> int:
    """Return colors needed at least: entries in a column of the peeled rows, and in a row of the others."""
    degrees = np.diff(matrix.indptr)
    degrees[peeled] = 0
    return int(np.bincount(matrix[peeled].indices, minlength=1).max()) + int(degrees.max(initial=0))
