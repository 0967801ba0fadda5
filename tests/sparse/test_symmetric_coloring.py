"""Colorings of symmetric matrices: every entry is read, itself, as its mirror image or as a sum, from few seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autojac.core.pattern import Indices, Pattern
from autojac.sparse.colorings import orthogonal
from autojac.sparse.symmetric_coloring import (
    MOST_EDGES,
    MOST_STEPS,
    acyclic,
    is_symmetric,
    is_within_reach,
    star,
    substitution,
)

Coloring = Callable[[Pattern], Indices]


def symmetric(size: int, density: float, seed: int, diagonal: bool = True) -> Pattern:
    upper = np.random.default_rng(seed).random((size, size)) < density
    return Pattern.of(upper | upper.T | (np.eye(size, dtype=bool) & diagonal))


def arrowhead(size: int) -> Pattern:
    matrix = np.eye(size)
    matrix[0], matrix[:, 0] = 1, 1
    return Pattern.of(matrix)


def grid(side: int) -> Pattern:
    """Return which points of a square have a corner in common."""
    near = np.abs(np.subtract.outer(np.arange(side), np.arange(side))) <= 1
    return Pattern.of(np.kron(near, near))


@given(size=st.integers(1, 12), density=st.floats(0, 0.6), seed=st.integers(0, 99), diagonal=st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_entry_is_read_right(size: int, density: float, seed: int, diagonal: bool) -> None:
    pattern = symmetric(size, density, seed, diagonal)
    matrix = np.zeros(pattern.shape)
    # integers, which sums keep exactly
    numbers = np.random.default_rng(seed).integers(-99, 99, pattern.shape)
    matrix[pattern.rows, pattern.columns] = (numbers + numbers.T)[pattern.rows, pattern.columns]
    for coloring, most_terms in ((star, 1), (acyclic, MOST_EDGES)):
        colors = coloring(pattern)
        shape = (int(colors.max(initial=-1)) + 1, size)
        compressed = np.array([matrix[colors == color].sum(0) for color in range(shape[0])]).reshape(shape)
        reading = substitution(pattern, colors)
        assert reading is not None
        assert reading.terms <= most_terms
        read = (compressed[colors[reading.rows], reading.columns] * reading.signs).sum(1) if pattern.count else 0
        np.testing.assert_array_equal(read, matrix[pattern.rows, pattern.columns])


@given(size=st.integers(1, 9), density=st.floats(0, 0.6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_no_path_of_four_has_two_colors(size: int, density: float, seed: int) -> None:
    pattern = symmetric(size, density, seed)
    colors, near = star(pattern), pattern.scipy().toarray() != 0
    for path in itertools.permutations(range(size), 4):
        if all(near[a, b] for a, b in itertools.pairwise(path)):
            assert len({int(colors[node]) for node in path}) > 2
    for a, b in zip(pattern.rows, pattern.columns, strict=True):
        assert a == b or colors[a] != colors[b]


@given(size=st.integers(1, 40), density=st.floats(0, 0.4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_two_colors_make_small_trees_and_stars(size: int, density: float, seed: int) -> None:
    pattern = symmetric(size, density, seed)
    colors, near = acyclic(pattern), (pattern.scipy().toarray() != 0) & ~np.eye(size, dtype=bool)
    for pair in itertools.combinations(range(int(colors.max()) + 1), 2):
        left = set(np.flatnonzero(np.isin(colors, pair)).tolist())
        while left:
            tree, border = set[int](), {left.pop()}
            while border:
                tree |= border
                border = {other for row in border for other in np.flatnonzero(near[row]) if other in left}
                left -= border
            degrees = near[np.ix_(sorted(tree), sorted(tree))].sum(1)
            assert degrees.sum() == 2 * (len(tree) - 1), "a cycle of two colors"
            assert len(tree) - 1 <= max(MOST_EDGES, degrees.max())
    assert not any(near[a, b] for a, b in itertools.combinations(range(size), 2) if colors[a] == colors[b])


@pytest.mark.parametrize(
    ("pattern", "coloring", "most"),
    [
        (arrowhead(30), star, 2),
        (symmetric(60, 0.05, 1), star, 10),
        (arrowhead(30), acyclic, 2),
        (symmetric(60, 0.05, 1), acyclic, 6),
        (symmetric(100, 0.1, 1), acyclic, 22),
        (grid(8), acyclic, 7),
    ],
)
def test_symmetry_saves_colors(pattern: Pattern, coloring: Coloring, most: int) -> None:
    assert int(coloring(pattern).max()) + 1 <= most
    assert int(coloring(pattern).max()) < int(orthogonal(pattern, "rows").max())


def test_what_is_not_symmetric_or_too_large_is_told() -> None:
    assert not is_symmetric(Pattern.of(np.triu(np.ones((3, 3)))))
    assert not is_symmetric(Pattern.of(np.ones((2, 3))))
    assert is_symmetric(symmetric(5, 0.4, 0))
    assert is_within_reach(arrowhead(100))
    assert not is_within_reach(Pattern.full(200, 200)) or MOST_STEPS >= 200**4
    cycle = Pattern.of(np.roll(np.eye(4), 1, 0) + np.roll(np.eye(4), -1, 0))
    for pattern, colors in ((Pattern.full(3, 3), [0, 0, 0]), (cycle, [0, 1, 0, 1])):
        assert substitution(pattern, np.array(colors, dtype=np.int32)) is None
