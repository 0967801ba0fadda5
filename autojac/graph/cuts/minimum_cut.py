"""Narrow places in a graph: the tensors through which every path of derivatives runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

from autojac.graph.ir import Graph, Operation
from autojac.graph.operator_facts import facts_of

MOST_NODES = 2000
"""A minimum cut through more tensors takes longer than it is worth."""


def passes_derivatives(operation: Operation) -> bool:
    """Check whether a derivative runs through an operator."""
    return not operation.detached and facts_of(operation.target).has_derivative


def differentiable_paths(graph: Graph, inputs: Collection[int]) -> set[int]:
    """Return the tensors that a derivative in the inputs can reach."""
    found = set(inputs)
    for op in graph.operations:
        if passes_derivatives(op) and not found.isdisjoint(op.sources):
            found.update(n for n in op.results if graph.dtypes[n].is_floating_point or graph.dtypes[n].is_complex)
    return found


def edges(graph: Graph, alive: Collection[int]) -> Iterator[tuple[int, int]]:
    """Return the edges from each tensor to those that operators make of it, as far as derivatives run."""
    for operation in graph.operations:
        if passes_derivatives(operation):
            for output in operation.results:
                if output in alive:
                    yield from ((source, output) for source in operation.sources if source in alive)


def minimum_cut(
    links: Iterable[tuple[int, int]],
    sizes: Mapping[int, float],
    sources: Iterable[int],
    sinks: Iterable[int],
    nearest: Literal["sources", "sinks"] = "sinks",
) -> list[int] | None:
    """Return the vertices of least total size without which no path leads from a source to a sink; None if none do.

    The minimum cut of the graph in which each vertex is an edge of its size (Ford & Fulkerson, 1956).

    Args:
        links: edges, which are never cut.
        sizes: whole numbers, or infinity for what must not be cut.
        sources, sinks: vertices, which may be cut themselves.
        nearest: which of several smallest cuts.
    """
    if not sizes:
        return None
    # 0.2 s to import
    import numpy as np
    from scipy.sparse import csgraph, csr_array

    enters = {number: 2 + 2 * place for place, number in enumerate(sizes)}
    ends = [(enters[number], enters[number] + 1, size) for number, size in sizes.items()]
    ends += [(enters[one] + 1, enters[other], math.inf) for one, other in dict.fromkeys(links)]
    ends += [(0, enters[number], math.inf) for number in dict.fromkeys(sources)]
    ends += [(enters[number] + 1, 1, math.inf) for number in dict.fromkeys(sinks)]
    limit = 1 + sum(int(size) for size in sizes.values() if not math.isinf(size))
    if limit > np.iinfo(np.int32).max:
        return None
    tails, heads, room = zip(*((tail, head, int(min(size, limit))) for tail, head, size in ends), strict=True)
    count = 2 + 2 * len(enters)
    capacity = csr_array((np.array(room, dtype=np.int32), (tails, heads)), shape=(count, count))
    found = csgraph.maximum_flow(capacity, 0, 1)
    if not 0 < found.flow_value < limit:
        return None
    open_edges = (capacity - csr_array(found.flow)) > 0
    if nearest == "sources":
        near = set(csgraph.breadth_first_order(open_edges, 0, return_predecessors=False).tolist())
        return sorted(number for number, place in enters.items() if place in near and place + 1 not in near)
    near = set(csgraph.breadth_first_order(open_edges.T.tocsr(), 1, return_predecessors=False).tolist())
    return sorted(number for number, place in enters.items() if place not in near and place + 1 in near)
