"""Star colorings: how few seeds read a symmetric matrix, of whose two equal entries either serves.

Acyclic colorings need fewer still, but read entries by subtracting others: a small entry beside large ones loses its
digits, and a NaN spreads to entries that are finite. Which of them are sound shows in each call's numbers alone.
"""

from __future__ import annotations

import numpy as np

from autojac.core.pattern import Indices, Marks, Pattern
from autojac.sparse.bicoloring import collision_free

MOST_STEPS = 2_000_000
"""Paths of three edges that one coloring looks at, a few seconds; larger patterns are colored by rows."""


def is_symmetric(pattern: Pattern) -> bool:
    """Check whether a pattern has each entry's mirror image."""
    if pattern.shape[0] != pattern.shape[1]:
        return False
    return bool(np.array_equal(np.sort(_mirror_places(pattern)), pattern.places))


def is_within_reach(pattern: Pattern) -> bool:
    """Check whether a pattern is small enough to be star-colored."""
    degrees = np.diff(pattern.starts).astype(np.int64)
    return int((degrees[pattern.columns] * degrees[pattern.rows]).sum()) <= MOST_STEPS


def star(pattern: Pattern) -> Indices:
    """Color the rows of a symmetric pattern so that no path of four has two colors alone.

    Then of each two entries that mirror each other one stands alone in the sum of the rows of its color. Greedy,
    Gebremedhin, Manne & Pothen, "What color is your Jacobian?" (2005): the best of the orders in which rows stand, and
    of rows with most entries first.

    Args:
        pattern: (n, n), symmetric.

    Returns:
        Colors (n,), int32; -1 for a row without entries, which needs no seed.
    """
    starts, columns = pattern.starts.tolist(), pattern.columns.tolist()
    near = [
        [other for other in columns[starts[row] : starts[row + 1]] if other != row] for row in range(pattern.shape[0])
    ]
    degrees = np.diff(pattern.starts)
    filled = np.flatnonzero(degrees)
    orders = (filled, filled[np.argsort(-degrees[filled], kind="stable")])
    return min((_greedy(near, order.tolist()) for order in orders), key=lambda colors: int(colors.max(initial=-1)))


def _greedy(near: list[list[int]], order: list[int]) -> Indices:
    colors = [-1] * len(near)
    for row in order:
        taken: set[int] = set()
        for one in near[row]:
            if colors[one] >= 0:
                taken.add(colors[one])
            for two in near[one]:
                if two == row or colors[two] < 0 or colors[two] in taken:
                    continue
                # without a color of its own the one between may get any; else a fourth of its color closes the path
                if colors[one] < 0 or any(three != one and colors[three] == colors[one] for three in near[two]):
                    taken.add(colors[two])
        colors[row] = next(color for color in range(len(taken) + 1) if color not in taken)
    return np.array(colors, dtype=np.int32)


def mirrored_reading(pattern: Pattern, colors: Indices) -> Marks | None:
    """Return for each entry whether its mirror image is to be read in its place; None if some can't be read at all.

    Args:
        pattern: (n, n), symmetric.
        colors: of its rows.
    """
    alone = collision_free(colors[pattern.rows], pattern.columns, max(1, pattern.shape[1]))
    # mirrored entries are ordered by column, and so are the places of their images
    image = np.searchsorted(pattern.places, _mirror_places(pattern))
    return None if not bool((alone | alone[image]).all()) else ~alone


def _mirror_places(pattern: Pattern) -> Indices:
    """Return the place of each entry's mirror image, counted through the rows."""
    places: Indices = pattern.columns.astype(np.int64) * pattern.shape[1] + pattern.rows
    return places
