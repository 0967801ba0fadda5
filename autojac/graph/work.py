"""What one evaluation costs, whatever the machine: operators, bytes moved and multiplications, from its graph."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from autojac.graph.ir import Graph, Operation
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import Kind

MOVES_NOTHING = (Kind.VIEW, Kind.AXES, Kind.SIZES)
SLOW = {Kind.REDUCTION: 3.0, Kind.SCAN: 3.0, Kind.NORMALIZATION: 3.0, Kind.CHANNEL: 3.0, Kind.CONVOLUTION: 5.0}
"""How many times their bytes, or flops, operators count that use a processor less well than products and maps do."""


@dataclass(frozen=True)
class Work:
    """What operators do.

    Attributes:
        operators: how many there are, views included: the host's work hardly differs.
        moved: bytes read and written in all, by the base-2 logarithm, rounded, of what a single operator moves;
            without parameters, which many seeds at a time read once.
        flops: additions and multiplications in products of matrices and convolutions.

    Operators of `SLOW` kinds count several times.
    """

    operators: int
    moved: Mapping[int, float]
    flops: float

    @classmethod
    def of(cls, graph: Graph) -> Work:
        """Count what one evaluation of a graph does."""
        moved: dict[int, float] = defaultdict(float)
        flops, fixed = 0.0, set(graph.constants)
        for operation in graph.operations:
            kind = facts_of(operation.target).kind
            if fixed.issuperset(operation.sources):
                fixed.update(operation.results)
            if kind in MOVES_NOTHING:
                continue
            read = [number for number in operation.sources if number not in fixed]
            size = sum(_bytes(graph, number) for number in (*read, *operation.results))
            moved[round(math.log2(max(size, 1)))] += SLOW.get(kind, 1.0) * size
            flops += SLOW.get(kind, 1.0) * _flops(graph, operation)
        return cls(len(graph.operations), dict(moved), flops)


def _bytes(graph: Graph, number: int) -> int:
    return math.prod(graph.shapes[number]) * graph.dtypes[number].itemsize


def _flops(graph: Graph, operation: Operation) -> float:
    """Return the flops of a product or a convolution: two for each result and each term that is summed in it."""
    kind, made = facts_of(operation.target).kind, operation.results
    if kind not in (Kind.PRODUCT, Kind.CONVOLUTION) or not made or len(operation.sources) < 2:
        return 0.0
    results = math.prod(graph.shapes[made[0]])
    if kind is Kind.CONVOLUTION:  # each result is a sum over a filter: (channels out, channels in, *window)
        return 2.0 * results * math.prod(graph.shapes[operation.sources[1]][1:])
    left = graph.shapes[operation.sources[-2]]  # an addend, if there is one, comes first
    return 2.0 * results * (left[-1] if left else 1)
