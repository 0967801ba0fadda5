"""Products of matrices and vectors, and distances."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import Along, Lost, Meets, State, Step
from autojac.graph.operator_facts import Axes, facts_of


@register(Axes.FACTORS)
def product(step: Step) -> State:
    """A product of two matrices, two stacks of these, or a matrix or vector and a vector: one axis is summed over."""
    left, right = (step[name] for name in facts_of(step.operation.target).factors or ())
    dims, own, other = len(step.shape(left)), step.state(left), step.state(right)
    carried = [state for state in (own, other) if isinstance(state, Along)]
    if carried and dims == 3 and all(state.axis == 0 for state in carried):
        if len(set(carried)) > 1:
            raise Meets(MEET)
        return _with_addend(step, carried[0])
    if isinstance(own, Along) and isinstance(other, Along):
        raise Meets(MEET)
    if isinstance(own, Along):
        if own.axis == dims - 1:
            raise Meets("it sums over the batch")
        return _with_addend(step, own)
    if not isinstance(other, Along):
        raise Lost("only what is added carries the batch")
    if other.axis == max(len(step.shape(right)) - 2, 0):
        raise Meets("it sums over the batch")
    return _with_addend(step, other)


def _with_addend(step: Step, state: Along) -> State:
    """The same, unless what is added to a product carries the batch elsewhere."""
    added = step.arguments.get(facts_of(step.operation.target).addend)
    other = step.state(added)
    if added is not None and isinstance(other, Along):
        behind = len(step.out) - len(step.shape(added))
        if other._replace(axis=other.axis + behind) != state:
            raise Meets(MEET)
    return state


@register("_cdist_forward _euclidean_dist")
def distances(step: Step) -> State:
    found, dims = set(), len(step.out)
    # points lie along the second axis from behind: those of x1 along the result's second, those of x2 along its last
    for value, points in ((step["x1"], 2), (step["x2"], 1)):
        state = step.state(value)
        if not isinstance(state, Along):
            continue
        behind = len(step.shape(value)) - state.axis
        if behind == 1:
            raise Meets("it sums over the batch")
        found.add(state._replace(axis=dims - (points if behind == 2 else behind)))
    if len(found) > 1:
        raise Meets(MEET)
    return found.pop()
