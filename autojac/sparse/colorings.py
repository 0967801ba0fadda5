"""Colorings of patterns: which rows, columns or samples can share a seed, each computed once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Protocol, TypeVar

import numpy as np

from autojac.core.pattern import Indices, Pattern
from autojac.errors import OptionError
from autojac.sparse.bicoloring import both, collision_free, is_read_from_rows
from autojac.sparse.greedy_coloring import fewest

Side = Literal["rows", "columns"]
Arrays = Mapping[str, Indices]
T = TypeVar("T")
MOST_KNOWN: Final = 64
"""Colorings that a process keeps in memory."""


def orthogonal(pattern: Pattern, side: Side) -> Indices:
    """Color the rows (or columns) so that no two of one color have an entry in the same column (or row).

    Curtis, Powell & Reid, "On the estimation of sparse Jacobian matrices" (1974): the sum of the rows of one color
    then holds every one of their entries by itself.

    Args:
        pattern: (m, n).
        side: `rows`, to be read from pulls, or `columns`, from pushes.

    Returns:
        Colors (m,) or (n,), int32; -1 for a row (or column) without entries, which needs no seed.
    """
    matrix = pattern.scipy()
    return fewest(matrix if side == "rows" else matrix.T.tocsr())


def apart(graph: Pattern) -> Indices:
    """Color samples so that none of one color can reach another of it, in either direction.

    That is enough for the blocks of a Jacobian alone, since what other samples add to a block is then zero.

    Args:
        graph: which sample depends on which, (B, B); the diagonal does not matter.

    Returns:
        Colors (B,), int32, from 0; no sample goes without.

    Raises:
        OptionError: the graph is not square.
    """
    import scipy.sparse

    count = graph.shape[0]
    if graph.shape[1] != count:
        raise OptionError(
            f"a pattern of samples must be square, got {graph.shape[0]}x{graph.shape[1]}. Give it one row and one "
            "column per sample"
        )
    low, high = _edges(graph)
    ends, edges = np.concatenate([low, high]), np.tile(np.arange(len(low), dtype=np.int32), 2)
    ones = np.ones(len(ends), dtype=np.int8)
    # a sample holds its edges, and neighbours share one
    incidence = scipy.sparse.csr_array((ones, (ends, edges)), shape=(count, max(1, len(low))))
    return np.maximum(fewest(incidence), 0)


class Backing(Protocol):
    """Where colorings outlive the process; a `PlanStore` is one."""

    def coloring(self, key: str) -> Arrays | None:
        """Return the arrays stored under a key; None if there are none."""

    def save_coloring(self, key: str, arrays: Arrays) -> None:
        """Store arrays under a key."""


class Colorings:
    """The colorings of patterns, each made once; those that are read are checked before they are used.

    Args:
        backing: where to look before making one, and to keep it then.

    Attributes:
        seconds: what making them has cost.
    """

    def __init__(self, backing: Backing | None = None) -> None:
        self._backing = backing
        self._known: OrderedDict[str, Arrays] = OrderedDict()
        self._derived: OrderedDict[Any, Any] = OrderedDict()
        self.seconds = 0.0

    def derive(self, make: Callable[..., T], *arguments: Any) -> T:
        """Return `make(self, *arguments)`, kept for as long as these colorings are; the oldest are forgotten."""
        key = (make, *arguments)
        if key not in self._derived:
            self._derived[key] = make(self, *arguments)
            while len(self._derived) > MOST_KNOWN:
                self._derived.popitem(last=False)
        derived: T = self._derived[key]
        return derived

    def orthogonal(self, pattern: Pattern, side: Side) -> Indices:
        """Color the rows (or columns) as the function of this name does."""
        size = pattern.shape[side == "columns"]

        def is_right(colors: Arrays) -> bool:
            of_entries, places = pattern.rows, pattern.columns
            if side == "columns":
                of_entries, places = places, of_entries
            return bool(collision_free(colors[side][of_entries], places, max(1, *pattern.shape)).all())

        return self._find(pattern, side, {side: size}, lambda: {side: orthogonal(pattern, side)}, is_right)[side]

    def apart(self, graph: Pattern) -> Indices:
        """Color samples as the function of this name does."""

        def is_right(arrays: Arrays) -> bool:
            colors = arrays["samples"]
            low, high = _edges(graph)
            return bool((colors >= 0).all() and (colors[low] != colors[high]).all())

        sizes = {"samples": graph.shape[0]}
        return self._find(graph, "apart", sizes, lambda: {"samples": apart(graph)}, is_right)["samples"]

    def both(self, pattern: Pattern) -> tuple[Indices, Indices]:
        """Color rows and columns together as the function of this name does."""

        def make() -> Arrays:
            return dict(zip(("rows", "columns"), both(pattern), strict=True))

        def is_right(arrays: Arrays) -> bool:
            try:
                is_read_from_rows(pattern, arrays["rows"], arrays["columns"])
            except ValueError:
                return False
            return True

        sizes = {"rows": pattern.shape[0], "columns": pattern.shape[1]}
        colors = self._find(pattern, "both", sizes, make, is_right)
        return colors["rows"], colors["columns"]

    def _find(
        self,
        pattern: Pattern,
        kind: str,
        sizes: Mapping[str, int],
        make: Callable[[], Arrays],
        is_right: Callable[[Arrays], bool],
    ) -> Arrays:
        key = f"{pattern.key}:{kind}"
        known = self._known.get(key)
        if known is None:
            stored = self._backing.coloring(key) if self._backing is not None else None
            if stored is not None and _are_colors(stored, sizes) and is_right(stored):
                known = stored
            else:
                start = time.perf_counter()
                known = make()
                self.seconds += time.perf_counter() - start
                if self._backing is not None:
                    self._backing.save_coloring(key, known)
            self._known[key] = known
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return known


def _edges(graph: Pattern) -> tuple[Indices, Indices]:
    """Return the pairs of different samples that are joined in either direction, each once, the lower first."""
    import scipy.sparse

    matrix = graph.scipy().astype(bool)
    edges = scipy.sparse.triu(matrix + matrix.T, k=1, format="coo")
    return edges.row, edges.col


def _are_colors(arrays: Arrays, sizes: Mapping[str, int]) -> bool:
    """Check whether these are color numbers of as many rows, columns or samples as there should be."""

    def fits(colors: Any, size: int) -> bool:
        return (
            isinstance(colors, np.ndarray)
            and colors.dtype == np.int32
            and colors.shape == (size,)
            and bool(((colors >= -1) & (colors < max(1, size))).all())
        )

    return set(arrays) == set(sizes) and all(fits(arrays[name], size) for name, size in sizes.items())
