"""Colorings of symmetric matrices: few seeds read them, since of two equal entries either serves.

Gebremedhin, Manne & Pothen, "What color is your Jacobian?" (2005): under a star coloring one of the two stands alone in
what a seed brings; under an acyclic coloring it does after others have been subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autojac.core.pattern import Indices, Pattern
from autojac.sparse.bicoloring import collision_free

MOST_STEPS = 2_000_000
"""Paths of three edges that one coloring looks at, a few seconds; larger patterns are colored by rows."""

MOST_EDGES = 16
"""Edges of a tree of two colors that is no star: the most numbers that are added up for one entry.

Rounding errors add up with them. Without a limit a band takes half the colors, but each entry depends on all before
it; 16 of 2, 4, 8, 16 and 32 came within a color of no limit on grids, random graphs and molecules.
"""


def is_symmetric(pattern: Pattern) -> bool:
    """Check whether a pattern has each entry's mirror image."""
    if pattern.shape[0] != pattern.shape[1]:
        return False
    return bool(np.array_equal(np.sort(_mirrored(pattern)), pattern.places))


def is_within_reach(pattern: Pattern) -> bool:
    """Check whether a pattern is small enough to be colored so."""
    degrees = np.diff(pattern.starts).astype(np.int64)
    return int((degrees[pattern.columns] * degrees[pattern.rows]).sum()) <= MOST_STEPS


def star(pattern: Pattern) -> Indices:
    """Color the rows of a symmetric pattern so that no path of four has two colors alone.

    Then of each two entries that mirror each other one stands alone in the sum of the rows of its color. Greedy, the
    best of the orders in which rows stand, and of rows with most entries first.

    Args:
        pattern: (n, n), symmetric.

    Returns:
        Colors (n,), int32; -1 for a row without entries, which needs no seed.
    """
    return _best(pattern, most_edges=2, is_direct=True)


def acyclic(pattern: Pattern) -> Indices:
    """Color the rows of a symmetric pattern so that no two colors close a cycle, and their trees stay small.

    The entries of rows of two colors are the edges of a forest: those of its leaves stand alone, and the others do
    once those are subtracted. Greedy, Gebremedhin, Tarafdar, Manne & Pothen, "New acyclic and star coloring algorithms
    with application to computing Hessians" (2007). Their trees may be of any size; here one has `MOST_EDGES` edges at
    most unless it is a star, so that few numbers are subtracted.

    Args:
        pattern: (n, n), symmetric.

    Returns:
        Colors (n,), int32; -1 for a row without entries, which needs no seed.
    """
    return _best(pattern, most_edges=MOST_EDGES, is_direct=False)


def _best(pattern: Pattern, most_edges: int, is_direct: bool) -> Indices:
    starts, columns = pattern.starts.tolist(), pattern.columns.tolist()
    near = [
        [other for other in columns[starts[row] : starts[row + 1]] if other != row] for row in range(pattern.shape[0])
    ]
    degrees = np.diff(pattern.starts)
    filled = np.flatnonzero(degrees)
    orders = (filled, filled[np.argsort(-degrees[filled], kind="stable")])
    found = (_greedy(near, order.tolist(), _Forests(most_edges), is_direct) for order in orders)
    return min(found, key=lambda colors: int(colors.max(initial=-1)))


def _greedy(near: list[list[int]], order: list[int], forests: _Forests, is_direct: bool) -> Indices:
    """Give each row in turn the first color that keeps the forests of two colors right.

    Args:
        near: the neighbours of each row.
        order: rows to be colored.
        forests: the edges between rows that are colored; added to.
        is_direct: whether rows with an uncolored neighbour in common differ, which saves colors in the end where no
            path of four may have two.
    """
    colors = [-1] * len(near)
    for row in order:
        by_color: dict[int, list[int]] = {}
        for one in near[row]:
            if colors[one] >= 0:
                by_color.setdefault(colors[one], []).append(one)
        taken = set(by_color)
        if is_direct:
            taken.update(colors[two] for one in near[row] if colors[one] < 0 for two in near[one])
        color = 0
        while color in taken or not all(forests.accept(rows, color) for rows in by_color.values()):
            color += 1
        colors[row] = color
        for other, rows in by_color.items():
            forests.join(row, other, rows, color)
    return np.array(colors, dtype=np.int32)


class _Forests:
    """The trees that each two colors make of the edges between their rows, as disjoint sets.

    A row and the color of its neighbours stand for the tree in which the row is joined to these.

    Args:
        most_edges: of a tree that is no star.
    """

    def __init__(self, most_edges: int) -> None:
        self.most_edges = most_edges
        self._parents: dict[tuple[int, int], tuple[int, int]] = {}
        self._edges: dict[tuple[int, int], int] = {}
        self._centers: dict[tuple[int, int], int | None] = {}

    def accept(self, rows: list[int], color: int) -> bool:
        """Check whether a new row of a color may be joined to rows that share another one."""
        if not any((row, color) in self._parents for row in rows):
            return True
        roots = [self._root((row, color)) for row in rows]
        if len(set(roots)) < len(roots):
            return False
        edges = sum(self._edges.get(root, 0) + 1 for root in roots)
        return edges <= self.most_edges or (len(rows) == 1 and self._is_center(rows[0], roots[0]))

    def join(self, new: int, other: int, rows: list[int], color: int) -> None:
        """Join a new row of a color to rows of another one."""
        tree, edges, center = (new, other), 0, None
        roots = [self._root((row, color)) for row in rows]
        if not any(root in self._parents for root in roots):
            center = new
        elif len(rows) == 1 and self._is_center(rows[0], roots[0]):
            center = rows[0]
        for row, root in zip(rows, roots, strict=True):
            edges += self._edges.get(root, 0) + 1
            self._parents[root] = self._parents[(row, color)] = tree
        self._parents[tree], self._edges[tree], self._centers[tree] = tree, edges, center

    def _is_center(self, row: int, root: tuple[int, int]) -> bool:
        return self._edges.get(root, 0) <= 1 or self._centers[root] == row

    def _root(self, tree: tuple[int, int]) -> tuple[int, int]:
        parents = self._parents
        if tree not in parents:
            return tree
        while parents[tree] != tree:
            parents[tree] = tree = parents[parents[tree]]
        return tree


@dataclass(frozen=True, eq=False)
class Substitution:
    """Where each entry of a symmetric matrix is read: a number that a seed brought, or a sum of such numbers.

    Attributes:
        rows, columns: for each number of each entry a row, which was pulled with all of its color, and a column,
            (entries, terms). Entries of fewer numbers repeat the first.
        signs: 1, -1, or 0 for what is repeated, (entries, terms), int8.
    """

    rows: Indices
    columns: Indices
    signs: Indices

    @property
    def terms(self) -> int:
        """The most numbers that one entry is the sum of."""
        return int(self.rows.shape[1])


def substitution(pattern: Pattern, colors: Indices) -> Substitution | None:
    """Find how every entry is read, itself or its mirror image; None if some can't be.

    An entry that stands alone in the sum of the rows of its color is read as it is. Else it, or its mirror image, is
    what is left of such a sum after the others in it are subtracted: leaves of a tree first, then what becomes one.

    Args:
        pattern: (n, n), symmetric.
        colors: of its rows.
    """
    size = max(1, pattern.shape[1])
    alone = collision_free(colors[pattern.rows], pattern.columns, size)
    # mirrored entries are ordered by column, and so are the places of their images
    image = np.searchsorted(pattern.places, _mirrored(pattern))
    own = np.where(alone, np.arange(pattern.count), image)
    pending = np.flatnonzero(~(alone | alone[image]) & (pattern.rows <= pattern.columns))
    # where an entry is added up with others, and those others
    sums = (colors[pattern.rows].astype(np.int64) * size + pattern.columns).tolist()
    members: dict[int, set[int]] = {}
    together = set(np.asarray(sums)[np.concatenate([pending, image[pending]])].tolist())
    for entry, at in enumerate(sums):
        if at in together:
            members.setdefault(at, set()).add(entry)
    mirror = image.tolist()
    first: list[int] = own.tolist()
    terms: dict[int, dict[int, int]] = {}
    left = {entry for pair in pending.tolist() for entry in (pair, mirror[pair])}
    ready = [entry for entry in sorted(left) if not (members[sums[entry]] & left) - {entry}]
    while ready:
        following: list[int] = []
        for entry in ready:
            if entry not in left:
                continue
            total = {entry: 1}
            for other in sorted(members[sums[entry]] - {entry}):
                for term, sign in terms.get(other, {first[other]: 1}).items():
                    total[term] = total.get(term, 0) - sign
            for known in (entry, mirror[entry]):
                terms[known], first[known] = total, entry
                left.discard(known)
            # what is left of the sum that the mirror image is in may be one entry now
            others = members[sums[mirror[entry]]] & left
            following += others if len(others) == 1 else ()
        ready = sorted(following)
    return None if left else _padded(pattern, first, terms)


def _padded(pattern: Pattern, first: list[int], terms: dict[int, dict[int, int]]) -> Substitution:
    most = max((len(total) for total in terms.values()), default=1)
    entries = np.repeat(np.array(first, dtype=np.int64)[:, None], most, 1)
    signs = np.zeros((pattern.count, most), dtype=np.int8)
    signs[:, :1] = 1
    for entry, total in terms.items():
        entries[entry, : len(total)] = list(total)
        signs[entry, : len(total)] = list(total.values())
    return Substitution(pattern.rows[entries], pattern.columns[entries], signs)


def _mirrored(pattern: Pattern) -> Indices:
    """Return the place of each entry's mirror image, counted through the rows."""
    places: Indices = pattern.columns.astype(np.int64) * pattern.shape[1] + pattern.rows
    return places
