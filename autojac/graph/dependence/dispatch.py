"""What operators of each kind do to the sets of inputs behind the elements of tensors.

An operator of a kind without a rule mixes all that it reads.
"""

from __future__ import annotations

from autojac.graph.dependence.elementwise_and_moves import (
    constant,
    gathering,
    masked,
    moving,
    placing,
    pointwise,
    unknown,
)
from autojac.graph.dependence.index_sets import DependenceContext, IndexSets, Rule
from autojac.graph.dependence.reductions_and_products import (
    behind,
    distances,
    mixing,
    normalization,
    parts,
    product,
)
from autojac.graph.dependence.windows import adaptive, convolution, pooling
from autojac.graph.operator_facts import MOVING, Kind

RULES: dict[Kind, Rule] = {
    Kind.POINTWISE: pointwise,
    Kind.COPY: pointwise,
    Kind.PAIRS: parts,
    **dict.fromkeys(MOVING, moving),
    Kind.GATHER: gathering,
    Kind.SCATTER: placing,
    Kind.CONVOLUTION: convolution,
    Kind.WINDOW: pooling,
    Kind.ADAPTIVE: adaptive,
    Kind.CHANNEL: behind(2),
    Kind.PRODUCT: product,
    Kind.DISTANCE: distances,
    Kind.REDUCTION: mixing,
    Kind.SCAN: mixing,
    Kind.MATRIX: behind(lambda context, dims: max(dims - 2, 0)),
    Kind.NORMALIZATION: normalization,
}


def rule_of(context: DependenceContext) -> Rule:
    """Return the rule of an operator; the one that mixes everything where nothing is known."""
    if not any(isinstance(context.states[number], IndexSets) for number in context.operation.sources):
        return masked if context.facts.keeps_zeros else constant
    return RULES.get(context.facts.kind, unknown)
