"""Linear algebra on stacks of matrices."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import BatchAxis, BatchAxisLost, Meets, RuleContext, State
from autojac.graph.ir import Value
from autojac.graph.operator_kinds import Axes


@register(Axes.TRAILING)
def matrices(context: RuleContext) -> State:
    """Follow linear algebra on the last two axes of one tensor or of several with the same leading axes."""
    found, ranks = set(), set()
    for value in (value for value in context.operation.args if isinstance(value, Value)):
        state, dims = context.state(value), len(context.shape(value))
        ranks.add(dims)
        if isinstance(state, BatchAxis):
            found.add(state)
            if state.axis >= dims - 2:
                raise BatchAxisLost("the batch is part of the matrix")
    if len(found) != 1 or len(ranks) != 1:
        raise Meets(MEET)
    state = found.pop()
    shapes = [context.graph.shapes[number] for number in context.results]
    length = state.outer * context.batch * state.inner
    if any(len(shape) <= state.axis or shape[state.axis] != length for shape in shapes):
        raise BatchAxisLost("the batch is part of the matrix")
    return state


@register("_linalg_solve_ex")
def solving(context: RuleContext) -> State:
    """Follow A X = B with the batch in front of A, and of B if it has it; B is matrices, or one vector per matrix."""
    matrix, right = context["A"], context["B"]
    whole, shape = context.shape(matrix), context.shape(right)
    own, other = context.state(matrix), context.state(right)
    if not isinstance(own, BatchAxis) or own.axis >= len(whole) - 2:
        raise BatchAxisLost("the batch is part of the matrix")
    behind = 1 if shape == whole[:-1] else 2
    if len(shape) - behind > len(whole) - 2:
        raise BatchAxisLost("the batch is broadcast")
    if isinstance(other, BatchAxis):
        aligned = other._replace(axis=other.axis + (len(whole) - 2) - (len(shape) - behind))
        if other.axis >= len(shape) - behind or aligned != own:
            raise Meets(MEET)
    return own
