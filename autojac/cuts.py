"""Narrow places in a graph: the tensors through which every path of derivatives runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from autojac.flow import Along, Flow
from autojac.graph import Graph

MOST_NODES = 2000
"""A minimum cut through more tensors takes longer than it is worth."""
DETACHING = {"detach", "argmax", "argmin", "floor", "ceil", "round", "sign", "zeros_like", "ones_like"}


@dataclass(frozen=True)
class Bottleneck:
    """Tensors that separate the inputs from the outputs.

    Attributes:
        tensors: their numbers.
        axes: where each carries the batch.
        widths: elements of one sample in each.
    """

    tensors: tuple[int, ...]
    axes: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.widths)


def differentiable_paths(graph: Graph, inputs: Collection[int]) -> set[int]:
    """The tensors that a derivative in the inputs can reach."""
    found = set(inputs)
    for operation in graph.operations:
        if not operation.held and operation.name not in DETACHING and not found.isdisjoint(operation.sources):
            found.update(
                number for number in operation.outputs if number is not None and graph.dtypes[number].is_floating_point
            )
    return found


def bottleneck(flow: Flow, inputs: Sequence[int]) -> Bottleneck | None:
    """The narrowest tensors between inputs and outputs by elements a sample; None if these are inputs or outputs."""
    graph, batch = flow.graph, flow.batch
    alive = differentiable_paths(graph, inputs)
    if len(alive) > MOST_NODES or alive.isdisjoint(graph.outputs):
        return None
    sizes = {number: math.prod(graph.shapes[number]) / batch for number in alive}
    ends = set(inputs) | set(graph.outputs)

    def eligible(number: int) -> bool:
        state = flow.states[number]
        plain = isinstance(state, Along) and (state.outer, state.inner) == (1, 1)
        return number in ends or (plain and number in flow.pure)

    capacities = {number: sizes[number] if eligible(number) else math.inf for number in alive}
    cut = minimum_cut(
        edges_among(graph, alive), capacities, inputs, [y for y in dict.fromkeys(graph.outputs) if y in alive]
    )
    if cut is None or not ends.isdisjoint(cut):
        return None
    axes = [state.axis for state in (flow.states[number] for number in cut) if isinstance(state, Along)]
    return Bottleneck(tuple(cut), tuple(axes), tuple(round(sizes[number]) for number in cut))


def minimum_cut(
    edges: Iterable[tuple[int, int]],
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
    network.add_edges_from(((one, 1), (other, 0)) for one, other in edges)
    network.add_edges_from(("source", (number, 0)) for number in sources)
    network.add_edges_from(((number, 1), "sink") for number in sinks)
    if "source" not in network or "sink" not in network:
        return None
    try:
        _, (near, _) = networkx.minimum_cut(network, "source", "sink")
    except networkx.NetworkXUnbounded:
        return None
    return sorted(number for number in sizes if (number, 0) in near and (number, 1) not in near)


def edges_among(graph: Graph, alive: Collection[int]) -> Iterable[tuple[int, int]]:
    """Which of some tensors is made of which, where a derivative can pass."""
    for operation in graph.operations:
        for output in operation.outputs:
            if output in alive and not operation.held:
                assert output is not None
                yield from ((source, output) for source in operation.sources if source in alive)
