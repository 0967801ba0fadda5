"""Colorings are right, use few colors, and are made once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from autojac.core.pattern import Pattern
from autojac.errors import OptionError
from autojac.sparse import colorings
from autojac.sparse.bicoloring import both, is_read_from_rows
from autojac.sparse.colorings import Colorings, apart, orthogonal
from autojac.sparse.greedy_coloring import fewest

Matrix = np.ndarray


@st.composite
def matrices(draw: st.DrawFn, square: bool = False) -> Matrix:
    """Boolean matrices of any density, with empty and full rows and columns."""
    m = draw(st.integers(1, 14))
    n = m if square else draw(st.integers(1, 14))
    density = draw(st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.9, 1.0]))
    matrix = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random((m, n)) < density
    for rows, value in itertools.product((True, False), (True, False)):
        side = m if rows else n
        for index in draw(st.sets(st.integers(0, side - 1), max_size=2)):
            matrix[(index, slice(None)) if rows else (slice(None), index)] = value
    return matrix


def largest_first(conflicts: Matrix) -> int:
    """How many colors greedy coloring needs that takes nodes by falling degree, and by number where these are equal."""
    conflicts = conflicts & ~np.eye(len(conflicts), dtype=bool)
    colors: dict[int, int] = {}
    for node in np.argsort(-conflicts.sum(1), kind="stable"):
        taken = {colors[other] for other in np.flatnonzero(conflicts[node]) if other in colors}
        colors[node] = next(color for color in itertools.count() if color not in taken)
    return 1 + max(colors.values())


def count(colors: Matrix) -> int:
    """Number of colors, which are numbered without a gap."""
    used = np.unique(colors[colors >= 0])
    assert (used == np.arange(len(used))).all()
    return len(used)


def holds_orthogonal(matrix: Matrix, colors: Matrix, side: str) -> None:
    """No two rows (columns) of a color meet; those without entries have none, the others one."""
    lines = matrix if side == "rows" else matrix.T
    assert colors.dtype == np.int32
    assert ((colors == -1) == ~lines.any(1)).all()
    for color in range(count(colors)):
        assert lines[colors == color].sum(0).max() <= 1


@given(matrices())
def test_no_two_rows_or_columns_of_a_color_meet(matrix: Matrix) -> None:
    for side in ("rows", "columns"):
        colors = orthogonal(Pattern.of(matrix), side)
        holds_orthogonal(matrix, colors, side)
        lines = (matrix if side == "rows" else matrix.T).astype(int)
        assert matrix.sum(0 if side == "rows" else 1).max() <= count(colors) <= largest_first(lines @ lines.T > 0)


@given(matrices(square=True))
def test_no_sample_reaches_another_of_its_color(matrix: Matrix) -> None:
    colors = apart(Pattern.of(matrix))
    assert colors.dtype == np.int32
    assert (colors >= 0).all()
    joined = (matrix | matrix.T) & ~np.eye(len(matrix), dtype=bool)
    assert not (joined & (colors[:, None] == colors)).any()
    assert count(colors) <= largest_first(joined)


def read_back(values: Matrix, pattern: Pattern, rows: Matrix, columns: Matrix) -> Matrix:
    """The matrix from the sums of the rows of each color and of the columns of each color."""
    pulls = np.stack([values[rows == color].sum(0) for color in range(count(rows))] or [np.zeros(values.shape[1])])
    pushes = np.stack([values[:, columns == color].sum(1) for color in range(count(columns))] or [values[:, 0] * 0])
    from_rows = is_read_from_rows(pattern, rows, columns)
    result = np.zeros_like(values)
    for r, k, by_row in zip(pattern.rows, pattern.columns, from_rows, strict=True):
        result[r, k] = pulls[rows[r], k] if by_row else pushes[columns[k], r]
    return result


@given(matrices())
def test_every_entry_is_read_from_its_row_or_its_column(matrix: Matrix) -> None:
    pattern = Pattern.of(matrix)
    rows, columns = both(pattern)
    values = np.where(matrix, np.random.default_rng(0).integers(1, 1000, matrix.shape), 0)
    assert (read_back(values, pattern, rows, columns) == values).all()
    fewest_of_one_side = min(count(orthogonal(pattern, "rows")), count(orthogonal(pattern, "columns")))
    assert count(rows) + count(columns) <= fewest_of_one_side


def test_what_can_not_be_read_is_told() -> None:
    pattern = Pattern.full(2, 2)
    with pytest.raises(ValueError, match="neither"):
        is_read_from_rows(pattern, np.zeros(2, np.int32), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="neither"):
        is_read_from_rows(pattern, np.array([0, -1], np.int32), np.array([-1, -1], np.int32))


def arrowhead(n: int) -> Matrix:
    matrix = np.eye(n, dtype=bool)
    matrix[0] = matrix[:, 0] = True
    return matrix


def cyclic(n: int, *offsets: int) -> Matrix:
    return sum(np.roll(np.eye(n), offset, 1) for offset in offsets) > 0


def stencil(side: int, points: int) -> Matrix:
    line = sp.diags_array([np.ones(side - 1), np.ones(side), np.ones(side - 1)], offsets=[-1, 0, 1])
    eye = sp.eye_array(side)
    grid = sp.kron(line, line) if points == 9 else sp.kron(line, eye) + sp.kron(eye, line)
    return grid.toarray() > 0


def eisenstat(n: int) -> Matrix:
    """Any two of the n columns meet, yet n/2 + 2 colors of both sides do (Coleman & Verma, 1998, example 3.1)."""
    eye = np.eye(n // 2, dtype=bool)
    top = np.zeros((1, n), dtype=bool)
    top[:, : n // 2] = True
    return np.block([[eye, eye], [top], [eye, ~eye]])


def random(density: float, seed: int) -> Matrix:
    return np.random.default_rng(seed).random((1000, 1000)) < density


FIGURES: dict[str, Callable[[], Matrix]] = {
    "arrowhead": lambda: arrowhead(1000),
    **{f"tridiagonal {n}": lambda n=n: np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1) > 0 for n in (1, 2, 3, 100)},
    **{f"cyclic {n}": lambda n=n: cyclic(n, -1, 0, 1) for n in (5, 9, 10, 11, 101)},
    **{f"{points}-point {side}": lambda points=points, side=side: stencil(side, points)
       for points in (5, 9) for side in (6, 7, 32)},
    **{f"Eisenstat {n}": lambda n=n: eisenstat(n) for n in range(6, 19, 2)},
    **{f"random {density}, {seed}": lambda density=density, seed=seed: random(density, seed)
       for density in (0.005, 0.02) for seed in (0, 1)},
}  # fmt: skip


@pytest.mark.by_day(2)
@pytest.mark.parametrize("name", FIGURES)
def test_never_more_colors_than_largest_first_greedy(name: str) -> None:
    matrix = FIGURES[name]()
    for side in ("rows", "columns"):
        lines = sp.csr_array(matrix if side == "rows" else matrix.T, dtype=np.int64)
        colors = orthogonal(Pattern.of(matrix), side)
        holds_orthogonal(matrix, colors, side)
        assert count(colors) <= largest_first((lines @ lines.T).toarray() > 0)


@pytest.mark.parametrize(
    ("matrix", "colors"),
    [
        (np.eye(100) + np.eye(100, k=1) + np.eye(100, k=-1) > 0, 3),
        *((cyclic(n, -1, 0, 1), 3 if n % 3 == 0 else 4) for n in (9, 10, 11, 100, 101, 102)),
        *((stencil(side, 5), 5) for side in (6, 7, 30, 32)),
        *((stencil(side, 9), 9) for side in (6, 7, 30, 32)),
        (np.ones((7, 5), dtype=bool), 5),
        (np.zeros((3, 4), dtype=bool), 0),
        (np.ones((1, 1), dtype=bool), 1),
    ],
)
def test_as_few_colors_as_there_can_be(matrix: Matrix, colors: int) -> None:
    assert count(orthogonal(Pattern.of(matrix), "columns")) == colors


@pytest.mark.parametrize(
    ("matrix", "colors"),
    [
        (arrowhead(1000), 3),
        *((eisenstat(n), n // 2 + 2) for n in range(6, 19, 2)),
        (sp.block_diag([sp.coo_array(np.ones((1, 50))), sp.coo_array(np.ones((40, 1)))] * 3).toarray() > 0, 2),
        (np.zeros((3, 4), dtype=bool), 0),
        (np.ones((4, 3), dtype=bool), 3),
    ],
)
def test_rows_and_columns_together_need_fewer(matrix: Matrix, colors: int) -> None:
    rows, columns = both(Pattern.of(matrix))
    assert count(rows) + count(columns) == colors


def test_a_dense_border_is_read_apart() -> None:
    matrix = random(0.003, 0)
    matrix[:2] = matrix[:, :2] = True
    inner = Pattern.of(matrix[2:, 2:])
    rows, columns = both(Pattern.of(matrix))
    assert count(rows) + count(columns) <= 4 + count(orthogonal(inner, "columns"))


def test_known_graphs_of_samples() -> None:
    assert count(apart(Pattern.of(cyclic(100, 0, 1)))) == 2
    assert count(apart(Pattern.of(cyclic(101, 0, 1)))) == 3
    assert count(apart(Pattern.of(stencil(30, 5)))) == 2
    assert count(apart(Pattern.of(sp.block_diag([sp.coo_array(np.ones((7, 7)))] * 20)))) == 7
    assert count(apart(Pattern.diagonal(5))) == 1
    assert apart(Pattern.full(1, 1)).tolist() == [0]
    with pytest.raises(OptionError, match="3x4"):
        apart(Pattern.full(3, 4))


def test_without_listing_the_conflicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.sparse.greedy_coloring.PAIRS", 0)
    monkeypatch.setattr("autojac.sparse.greedy_coloring.CHUNK", 7)
    matrix = random(0.02, 0)[:300, :250]
    colors = orthogonal(Pattern.of(matrix), "columns")
    holds_orthogonal(matrix, colors, "columns")
    lines = matrix.T.astype(int)
    assert count(colors) <= largest_first(lines @ lines.T > 0)


def test_a_quick_coloring_is_right_too() -> None:
    matrix = random(0.02, 1)[:200, :250]
    holds_orthogonal(matrix, fewest(sp.csr_array(matrix), thorough=False), "rows")


def test_the_same_colors_every_time() -> None:
    pattern = Pattern.of(random(0.02, 0))
    assert (orthogonal(pattern, "rows") == orthogonal(pattern, "rows")).all()


class Shelf:
    """A backing that counts."""

    def __init__(self) -> None:
        self.arrays: dict[str, Mapping[str, Matrix]] = {}
        self.reads = self.writes = 0

    def coloring(self, key: str) -> Mapping[str, Matrix] | None:
        self.reads += 1
        return self.arrays.get(key)

    def save_coloring(self, key: str, arrays: Mapping[str, Matrix]) -> None:
        self.writes += 1
        self.arrays[key] = arrays


def all_of(colorings: Colorings, pattern: Pattern) -> list[Matrix]:
    return [
        colorings.orthogonal(pattern, "rows"),
        colorings.orthogonal(pattern, "columns"),
        colorings.apart(pattern),
        *colorings.both(pattern),
    ]


def same(one: list[Matrix], other: list[Matrix]) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the colorings that were worked out."""
    names: list[str] = []
    for name in ("orthogonal", "apart", "both"):
        function = getattr(colorings, name)
        monkeypatch.setattr(
            colorings, name, lambda *args, name=name, function=function: (names.append(name), function(*args))[1]
        )
    return names


def test_colorings_are_made_once_and_kept(made: list[str]) -> None:
    shelf, matrix = Shelf(), random(0.02, 0)[:50, :50]
    first = all_of(Colorings(shelf), Pattern.of(matrix))
    assert (len(made), shelf.writes) == (4, 4)
    later = Colorings(shelf)
    assert same(all_of(later, Pattern.of(matrix)), first)
    assert (len(made), shelf.writes) == (4, 4)
    reads = shelf.reads
    assert same(all_of(later, Pattern.of(matrix)), first)
    assert shelf.reads == reads
    assert same(all_of(Colorings(), Pattern.of(matrix)), first)


@pytest.mark.parametrize(
    "spoil",
    [
        np.zeros_like,
        lambda colors: np.full_like(colors, -1),
        lambda colors: colors[1:],
        lambda colors: colors.astype(np.float64),
        lambda colors: colors + np.int32(10**6),
    ],
    ids=["one color", "none", "too few", "floats", "far too many"],
)
def test_a_wrong_coloring_is_made_again(spoil: Callable[[Matrix], Matrix], made: list[str]) -> None:
    shelf, pattern = Shelf(), Pattern.of(random(0.1, 0)[:20, :20] | np.eye(20, dtype=bool))
    first = all_of(Colorings(shelf), pattern)
    shelf.arrays = {key: {name: spoil(a) for name, a in arrays.items()} for key, arrays in shelf.arrays.items()}
    made.clear()
    assert same(all_of(Colorings(shelf), pattern), first)
    assert len(made) == 4


def test_a_process_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch, made: list[str]) -> None:
    monkeypatch.setattr(colorings, "MOST_KNOWN", 2)
    known = Colorings()
    patterns = [Pattern.diagonal(size) for size in (1, 2, 3)]
    for pattern in (*patterns, patterns[2], patterns[0]):
        known.apart(pattern)
    assert made == ["apart"] * 4


@pytest.mark.nightly
def test_a_million_samples() -> None:
    size = 1_000_000
    graph = Pattern.of(
        sp.csr_array(
            (np.ones(5 * size), np.random.default_rng(0).integers(0, size, 5 * size), np.arange(size + 1) * 5),
            shape=(size, size),
        )
    )
    colors = apart(graph)
    others = graph.rows != graph.columns
    assert (colors[graph.rows] != colors[graph.columns])[others].all()
    assert count(colors) <= 9
