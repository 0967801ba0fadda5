"""The shape of a graph that autograd has recorded: all by which two graphs run the same operators backward."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Edge = tuple[Any, int]
Read = Callable[[Any], Sequence[Any]]
LEAF = "AccumulateGrad"
GENERATED = re.compile(rf"\w+Backward\d+|{LEAF}|CopyBackwards")
"""Nodes that torch generates from formulas: what they do follows from attributes that they show. Others, which are
custom Functions in Python or C++ and writes into views, may do anything."""


class GraphShape(NamedTuple):
    """What two graphs have in common that run the same operators backward, on tensors of the same shapes.

    Values of tensors and floating-point numbers are left out.

    Attributes:
        key: node by node its type, where its edges lead, the integers, flags and shapes that it holds; and where the
            outputs and inputs stand.
        nodes: how many there are, without leaves that are no inputs.
        is_opaque: some node may depend on more than its attributes show.
        unused: inputs that no output leads back to, by their numbers.
    """

    key: Hashable
    nodes: int
    is_opaque: bool
    unused: tuple[int, ...]


def graph_shape(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> GraphShape:
    """Walk a graph from outputs that exist already: without a backward, and without the hooks on saved tensors."""
    starts = [edge_of(y) if y.requires_grad else None for y in outputs]
    ends = [edge_of(x) for x in inputs]
    input_nodes = {node for node, _ in ends}
    edges: dict[Any, Sequence[Edge]] = {}
    # of nodes that lead to an input: the others do not run when that is asked for
    numbers: dict[Any, int | None] = {}
    parts: list[Hashable] = []
    is_opaque = False
    stack = [start[0] for start in starts if start is not None]
    while stack:
        node = stack.pop()
        if node in numbers:
            continue
        successors = edges.get(node)
        if successors is None:
            edges[node] = successors = node.next_functions
            if successors:
                # once more, after all that it leads to
                stack.append(node)
                for target, _ in successors:
                    if target is None or target in numbers:
                        continue
                    # half of a graph's nodes are parameters: what ends there leads to no input
                    if target in input_nodes or type(target).__name__ != LEAF:
                        stack.append(target)
                continue
        leads_to_input = node in input_nodes
        targets = []
        # most nodes have one or two edges: a comprehension takes longer to start than to run
        for target, place in successors:
            number = numbers.get(target)
            targets.append((number, place))
            if number is not None:
                leads_to_input = True
        if not leads_to_input:
            numbers[node] = None
            continue
        attributes = _describe_node(node) if successors else ()
        is_opaque |= attributes is None
        numbers[node] = len(parts)
        parts.append((type(node), tuple(targets), attributes))
    places = [None if edge is None else (numbers.get(edge[0]), edge[1]) for edge in (*starts, *ends)]
    unused = tuple([index for index, end in enumerate(ends) if not _is_reached(end, starts, edges)])
    return GraphShape((tuple(parts), tuple(places)), len(edges), is_opaque, unused)


def _is_reached(end: Edge, starts: Sequence[Edge | None], edges: Mapping[Any, Sequence[Edge]]) -> bool:
    """Check whether outputs lead to this result of a node, not just to the node."""
    successors = edges.get(end[0])
    if successors is None:
        return False
    # a leaf is the one result of its node
    return not successors or end in starts or any([end in group for group in edges.values()])


def _describe_node(node: Any) -> Hashable | None:
    """Return the shapes, integers and flags of a node; None where its backward may depend on anything else."""
    kind: Any = type(node)
    plain, saved, is_generated = _attributes(kind)
    if not is_generated:
        return None
    try:
        described: list[Hashable] = [
            # of a floating-point number its type only
            float if type(value) is float else tuple(value) if type(value) is list else value
            for value in plain(node)
        ]
        for part in saved(node):
            described.append(_describe_saved(part))
    except (RuntimeError, TypeError, AttributeError):  # freed, packed by hooks, or a torch that does not show it
        return None
    for part in node._input_metadata:
        described += part.shape
        described.append(part.dtype)
    return tuple(described)


def edge_of(tensor: Tensor) -> Edge:
    """Return where a tensor stands in the graph: its node, and which of the node's results it is."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


@functools.lru_cache(1024)
def _attributes(kind: Any) -> tuple[Read, Read, bool]:
    """Return readers of the numbers and the tensors that nodes of a type show, and whether these are all they hold."""
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    tensors = [name for name in names if hasattr(kind, f"_raw{name}")]
    is_generated = GENERATED.fullmatch(kind.__name__) is not None
    return (
        _reader([name for name in names if name not in tensors]),
        _reader([f"_raw{n}" for n in tensors]),
        is_generated,
    )


def _reader(names: Sequence[str]) -> Read:
    """Return a function that reads some attributes in one pass."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return (lambda node: (getattr(node, names[0]),)) if names else (lambda node: ())


def _describe_saved(saved: Any) -> Hashable:
    """Return shapes and dtypes of what a node has saved.

    Raises:
        TypeError: if hooks have packed it.
    """
    if isinstance(saved, (tuple, list)):
        return tuple(map(_describe_saved, saved))
    tensor = None if saved is None else saved.data
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise TypeError("packed by hooks")
    return tensor.shape, tensor.dtype
