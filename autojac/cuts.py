"""Narrow places in a graph: the tensors through which every path of derivatives runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autojac.flow import SHARED, Along, Flow
from autojac.graph import Graph, Operation, Value

MOST_NODES = 2000
"""A minimum cut through more tensors takes longer than it is worth."""
DETACHING = {"detach", "argmax", "argmin", "floor", "ceil", "round", "sign", "zeros_like", "ones_like"}


@dataclass(frozen=True)
class Pool:
    """Tensors through which samples reach each other.

    Attributes:
        tensors: their numbers; each holds what all samples share.
        still: shared tensors that are read too, but that no derivative runs through.
        size: elements of all `tensors`.
        expandable: whether each may be given to every sample as a copy of its own.
    """

    tensors: tuple[int, ...]
    still: tuple[int, ...]
    size: int
    expandable: bool


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


def pool(flow: Flow, inputs: Sequence[int], least: bool) -> Pool | None:
    """The shared tensors that all coupling runs through.

    Args:
        flow: how the batch runs.
        inputs: numbers of the differentiated inputs.
        least: look upstream of where they are read for fewer elements.
    """
    graph = flow.graph
    if flow.lost_output or not flow.frontier:
        return None
    alive = differentiable_paths(graph, inputs)
    still = tuple(number for number in flow.frontier if number not in alive)
    chosen = [number for number in flow.frontier if number in alive]
    if least and chosen:
        shared = {number for number in alive if flow.states.get(number) == SHARED}
        if len(shared) <= MOST_NODES:
            sources = [number for number in shared if _meets(graph, flow, alive, number)]
            sizes = {number: float(math.prod(graph.shapes[number])) for number in shared}
            chosen = minimum_cut(edges(graph, shared), sizes, sources, chosen) or chosen
    if any(graph.dtypes[number].is_complex for number in chosen):
        return None
    size = sum(math.prod(graph.shapes[number]) for number in chosen)
    expandable = all(_expandable(flow, operation, set(chosen)) for operation in graph.operations)
    return Pool(tuple(chosen), still, size, expandable and set(chosen) | set(still) == set(flow.frontier))


def readers(flow: Flow, tensors: Collection[int]) -> Iterable[int]:
    """Positions of the operators along the batch that read some of the shared tensors."""
    for place, operation in enumerate(flow.graph.operations):
        if not set(tensors).isdisjoint(operation.sources) and isinstance(_made(flow, operation), Along):
            yield place


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


def _meets(graph: Graph, flow: Flow, alive: Collection[int], number: int) -> bool:
    """Whether a shared tensor is made of tensors along the batch."""
    operation = graph.operations[graph.producers[number]]
    return any(isinstance(flow.states.get(source), Along) and source in alive for source in operation.sources)


def _made(flow: Flow, operation: Operation) -> object:
    return next((flow.states.get(number) for number in operation.outputs if number is not None), None)


def _expandable(flow: Flow, operation: Operation, tensors: Collection[int]) -> bool:
    """Whether an operator does the same to each sample when a shared tensor is given one copy a sample."""
    if not any(number in tensors for number in operation.sources) or not isinstance(_made(flow, operation), Along):
        return True
    return all(aligned(flow, operation, number) is not None for number in set(operation.sources) if number in tensors)


@functools.cache
def _pointwise() -> frozenset[str]:
    from autojac import rules

    return frozenset(name for name, rule in rules.RULES.items() if rule is rules.pointwise) | {"expand"}


def aligned(flow: Flow, operation: Operation, number: int) -> tuple[str, tuple[int, ...], int] | None:
    """How copies (B, *shape) of a shared tensor stand in for it in an operator.

    Returns:
        `broadcast` with the tensor's shape as it is broadcast and the batch's axis there, or `mm` or `mv` where the
        tensor is the second factor of a product; None if they can't.
    """
    import torch

    graph = flow.graph
    state = _made(flow, operation)
    output = next(index for index in operation.outputs if index is not None)
    shape, out = graph.shapes[number], graph.shapes[output]
    if not isinstance(state, Along) or (state.outer, state.inner) != (1, 1):
        return None
    if operation.name in _pointwise() or torch.Tag.pointwise in operation.target.tags:
        padded = (1,) * (len(out) - len(shape)) + shape
        return ("broadcast", padded, state.axis) if padded[state.axis] == 1 else None
    second = len(operation.args) == 2 and operation.args[1] == Value(number) != operation.args[0]
    if operation.name in ("mm", "mv") and second and state.axis == 0:
        return operation.name, shape, 0
    return None
