"""Star colorings: every entry of a symmetric matrix is read, itself or as its mirror image, from few seeds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autojac.core.pattern import Pattern
from autojac.sparse.colorings import orthogonal
from autojac.sparse.star_coloring import MOST_STEPS, is_symmetric, is_within_reach, mirrored_reading, star


def symmetric(size: int, density: float, seed: int, diagonal: bool = True) -> Pattern:
    upper = np.random.default_rng(seed).random((size, size)) < density
    return Pattern.of(upper | upper.T | (np.eye(size, dtype=bool) & diagonal))


def arrowhead(size: int) -> Pattern:
    matrix = np.eye(size)
    matrix[0], matrix[:, 0] = 1, 1
    return Pattern.of(matrix)


@given(size=st.integers(1, 12), density=st.floats(0, 0.6), seed=st.integers(0, 99), diagonal=st.booleans())
@settings(max_examples=60)
def test_every_entry_is_read_right(size: int, density: float, seed: int, diagonal: bool) -> None:
    pattern = symmetric(size, density, seed, diagonal)
    colors = star(pattern)
    matrix = np.zeros(pattern.shape)
    numbers = np.random.default_rng(seed).standard_normal(pattern.shape)
    matrix[pattern.rows, pattern.columns] = (numbers + numbers.T)[pattern.rows, pattern.columns]
    compressed = np.stack([matrix[colors == color].sum(0) for color in range(int(colors.max(initial=-1)) + 1)] or [[]])
    swapped = mirrored_reading(pattern, colors)
    assert swapped is not None
    rows = np.where(swapped, pattern.columns, pattern.rows)
    columns = np.where(swapped, pattern.rows, pattern.columns)
    read = compressed[colors[rows], columns] if pattern.count else np.zeros(0)
    np.testing.assert_array_equal(read, matrix[pattern.rows, pattern.columns])


@given(size=st.integers(1, 9), density=st.floats(0, 0.6), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_no_path_of_four_has_two_colors(size: int, density: float, seed: int) -> None:
    pattern = symmetric(size, density, seed)
    colors, near = star(pattern), pattern.scipy().toarray() != 0
    for path in itertools.permutations(range(size), 4):
        if all(near[a, b] for a, b in itertools.pairwise(path)):
            assert len({int(colors[node]) for node in path}) > 2
    for a, b in zip(pattern.rows, pattern.columns, strict=True):
        assert a == b or colors[a] != colors[b]


@pytest.mark.parametrize(
    ("pattern", "most"), [(arrowhead(30), 2), (symmetric(60, 0.05, 1), 10)], ids=["arrowhead", "random"]
)
def test_symmetry_saves_colors(pattern: Pattern, most: int) -> None:
    assert int(star(pattern).max()) + 1 <= most
    assert int(star(pattern).max()) < int(orthogonal(pattern, "rows").max())


def test_what_is_not_symmetric_or_too_large_is_told() -> None:
    assert not is_symmetric(Pattern.of(np.triu(np.ones((3, 3)))))
    assert not is_symmetric(Pattern.of(np.ones((2, 3))))
    assert is_symmetric(symmetric(5, 0.4, 0))
    assert is_within_reach(arrowhead(100))
    assert not is_within_reach(Pattern.full(200, 200)) or MOST_STEPS >= 200**4
    triangle = Pattern.of(np.ones((3, 3)))
    assert mirrored_reading(triangle, np.zeros(3, dtype=np.int32)) is None
