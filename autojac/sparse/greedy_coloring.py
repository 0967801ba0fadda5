"""Graph coloring by greedy orders, where nodes conflict if they share something that only one may have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from autojac.core.pattern import Indices

if TYPE_CHECKING:
    import scipy.sparse

PAIRS: Final = 12_000_000
"""Conflicts beyond which they are not listed one by one; rustworkx then takes more than 10 s and 1 GB."""
ENTRIES: Final = 20_000_000
"""Entries that repeated passes may look at in all, at 0.3 µs each."""
PASSES: Final = 24
STALE: Final = 6
"""Passes in a row without a color less after which the coloring is taken as it is."""
CHUNK: Final = 1 << 16


def fewest(holdings: scipy.sparse.csr_array, thorough: bool = True) -> Indices:
    """Color nodes so that no two of one color hold the same thing, with the fewest colors of several greedy orders.

    Largest first, natural, saturation (DSATUR) and core order (smallest last, but for ties) start; then each pass
    takes the nodes class by class, after which there are never more colors than before (Culberson, "Iterated greedy
    graph coloring and the difficulty landscape", 1992). Conflicts are looked up through what is held, so nothing
    grows with their number, unless there are few enough for rustworkx.

    Args:
        holdings: what each node holds, (nodes, things).
        thorough: whether to try more than the largest-first order and one pass.

    Returns:
        Color of each node: (nodes,), int32; -1 for nodes that hold nothing.
    """
    counts = np.diff(holdings.indptr)
    colors = np.full(len(counts), -1, dtype=np.int32)
    active = np.flatnonzero(counts)
    if not len(active):
        return colors
    sharers = np.bincount(holdings.indices, minlength=holdings.shape[1]).astype(np.int64)
    # those who share one thing all differ
    bound = int(sharers.max())
    if bound == len(active):
        colors[active] = np.arange(bound)
    elif bound == 1:
        colors[active] = 0
    else:
        nodes = holdings[active]
        best: Indices | None = None
        for found in _starts(nodes, sharers) if thorough else _largest_first(nodes, sharers):
            if best is None or found.max() < best.max():
                best = found
            if best.max() + 1 == bound:
                break
        assert best is not None
        colors[active] = _recolor(nodes, best, bound, _passes(nodes) if thorough else 1)
    return colors


def _passes(nodes: scipy.sparse.csr_array) -> int:
    return int(np.clip(ENTRIES // nodes.nnz, 2, PASSES))


def _starts(nodes: scipy.sparse.csr_array, sharers: Indices) -> Iterator[Indices]:
    yield from _largest_first(nodes, sharers)
    if nodes.nnz <= ENTRIES // 10:
        yield greedy(nodes, np.arange(nodes.shape[0]))
    if (sharers * (sharers - 1)).sum() <= 2 * PAIRS:
        yield from _by_conflicts(nodes)


def _largest_first(nodes: scipy.sparse.csr_array, sharers: Indices) -> Iterator[Indices]:
    conflicts = np.add.reduceat(sharers[nodes.indices] - 1, nodes.indptr[:-1])
    yield greedy(nodes, np.argsort(-conflicts, kind="stable"))


def _by_conflicts(nodes: scipy.sparse.csr_array) -> Iterator[Indices]:
    """Yield colorings by orders that need every conflict as an edge."""
    import rustworkx
    import scipy.sparse

    boolean = nodes.astype(bool)
    edges = scipy.sparse.triu(boolean @ boolean.T, k=1, format="coo")
    count = nodes.shape[0]
    graph = rustworkx.PyGraph()
    graph.add_nodes_from(range(count))
    for start in range(0, edges.nnz, 16 * CHUNK):  # as many tuples at a time as memory won't notice
        some = slice(start, start + 16 * CHUNK)
        graph.extend_from_edge_list(list(zip(edges.row[some].tolist(), edges.col[some].tolist(), strict=True)))
    strategies = rustworkx.ColoringStrategy
    yield _to_array(rustworkx.graph_greedy_color(graph, strategy=strategies.Saturation), count)
    if edges.nnz <= ENTRIES // 10:
        yield _to_array(rustworkx.graph_greedy_color(graph, strategy=strategies.Degree), count)
        cores = _to_array(rustworkx.core_number(graph), count)
        yield greedy(nodes, np.argsort(-cores, kind="stable"))


def _to_array(values: Any, count: int) -> Indices:
    return np.fromiter((values[node] for node in range(count)), dtype=np.int32, count=count)


def _recolor(nodes: scipy.sparse.csr_array, colors: Indices, bound: int, passes: int) -> Indices:
    """Return the colors after some more passes, each in an order of the classes before it."""
    random = np.random.default_rng(0)
    stale = 0
    for number in range(passes):
        count = int(colors.max()) + 1
        if count == bound or stale == STALE:
            break
        if number % 3 == 0:
            rank = np.arange(count)[::-1]
        elif number % 3 == 1:
            rank = np.argsort(np.argsort(-np.bincount(colors), kind="stable"))
        else:
            rank = random.permutation(count)
        colors = greedy(nodes, np.argsort(rank[colors], kind="stable"))
        stale = stale + 1 if colors.max() + 1 == count else 0
    return colors


def greedy(holdings: scipy.sparse.csr_array, order: Indices) -> Indices:
    """Give each node in turn the first color that no one has with whom it shares something.

    Args:
        holdings: what each node holds, (nodes, things).
        order: the nodes, each once: (nodes,).

    Returns:
        Color of each node: (nodes,), int32.
    """
    turns = holdings[order]
    starts = turns.indptr
    used = [0] * holdings.shape[1]  # for each thing the colors of those who hold it, as bits
    given: list[int] = []
    for first in range(0, len(order), CHUNK):
        ends = starts[first : first + CHUNK + 1].tolist()
        things = turns.indices[ends[0] : ends[-1]].tolist()
        base = ends[0]
        for begin, end in itertools.pairwise(ends):
            mine = things[begin - base : end - base]
            taken = 0
            for thing in mine:
                taken |= used[thing]
            color = ~taken & (taken + 1)
            for thing in mine:
                used[thing] |= color
            given.append(color.bit_length() - 1)
    colors = np.empty(len(order), dtype=np.int32)
    colors[order] = given
    return colors
