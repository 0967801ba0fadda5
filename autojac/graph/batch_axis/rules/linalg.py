"""Linear algebra on stacks of matrices."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import Along, Lost, Meets, State, Step
from autojac.graph.ir import Value
from autojac.graph.operator_facts import Axes


@register(Axes.TRAILING)
def matrices(step: Step) -> State:
    """Linear algebra on the last two axes of one tensor or of several with the same leading axes."""
    found, ranks = set(), set()
    for value in (value for value in step.operation.args if isinstance(value, Value)):
        state, dims = step.state(value), len(step.shape(value))
        ranks.add(dims)
        if isinstance(state, Along):
            found.add(state)
            if state.axis >= dims - 2:
                raise Lost("the batch is part of the matrix")
    if len(found) != 1 or len(ranks) != 1:
        raise Meets(MEET)
    state = found.pop()
    shapes = [step.graph.shapes[number] for number in step.operation.outputs if number is not None]
    length = state.outer * step.batch * state.inner
    if any(len(shape) <= state.axis or shape[state.axis] != length for shape in shapes):
        raise Lost("the batch is part of the matrix")
    return state


@register("_linalg_solve_ex")
def solving(step: Step) -> State:
    """A X = B with the batch in front of A, and of B if B carries it: B is matrices, or one vector for each matrix."""
    matrix, right = step["A"], step["B"]
    whole, shape = step.shape(matrix), step.shape(right)
    own, other = step.state(matrix), step.state(right)
    if not isinstance(own, Along) or own.axis >= len(whole) - 2:
        raise Lost("the batch is part of the matrix")
    behind = 1 if shape == whole[:-1] else 2
    if len(shape) - behind > len(whole) - 2:
        raise Lost("the batch is broadcast")
    if isinstance(other, Along):
        aligned = other._replace(axis=other.axis + (len(whole) - 2) - (len(shape) - behind))
        if other.axis >= len(shape) - behind or aligned != own:
            raise Meets(MEET)
    return own
