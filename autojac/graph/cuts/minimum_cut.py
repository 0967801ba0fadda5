"""Narrow places in a graph: the tensors through which every path of derivatives runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping

from autojac.graph.ir import Graph, Operation

MOST_NODES = 2000
"""A minimum cut through more tensors takes longer than it is worth."""
DETACHING = {"detach", "argmax", "argmin", "floor", "ceil", "round", "sign", "zeros_like", "ones_like"}


def passes_derivatives(operation: Operation) -> bool:
    """Whether a derivative runs through an operator."""
    return not operation.held and operation.name not in DETACHING


def differentiable_paths(graph: Graph, inputs: Collection[int]) -> set[int]:
    """The tensors that a derivative in the inputs can reach."""
    found = set(inputs)
    for operation in graph.operations:
        if passes_derivatives(operation) and not found.isdisjoint(operation.sources):
            made = (number for number in operation.outputs if number is not None)
            found.update(n for n in made if graph.dtypes[n].is_floating_point or graph.dtypes[n].is_complex)
    return found


def edges(graph: Graph, alive: Collection[int]) -> Iterator[tuple[int, int]]:
    """From each tensor to those that operators make of it, as far as derivatives run."""
    for operation in graph.operations:
        if passes_derivatives(operation):
            for output in operation.outputs:
                if output is not None and output in alive:
                    yield from ((source, output) for source in operation.sources if source in alive)


def minimum_cut(
    links: Iterable[tuple[int, int]],
    sizes: Mapping[int, float],
    sources: Iterable[int],
    sinks: Iterable[int],
) -> list[int] | None:
    """The vertices of least total size without which no path leads from a source to a sink; None if there are none."""
    # 0.14 s to import
    import networkx

    network = networkx.DiGraph()
    for number, size in sizes.items():
        network.add_edge((number, 0), (number, 1), **({} if math.isinf(size) else {"capacity": size}))
    network.add_edges_from(((one, 1), (other, 0)) for one, other in links)
    network.add_edges_from(("source", (number, 0)) for number in sources)
    network.add_edges_from(((number, 1), "sink") for number in sinks)
    if "source" not in network or "sink" not in network:
        return None
    try:
        _, (near, _) = networkx.minimum_cut(network, "source", "sink")
    except networkx.NetworkXUnbounded:
        return None
    return sorted(number for number in sizes if (number, 0) in near and (number, 1) not in near)
