"""Products of matrices and vectors, and distances."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, only_state, register
from autojac.graph.batch_axis.states import BatchAxis, BatchAxisLost, Meets, RuleContext, State
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import Axes


@register(Axes.FACTORS)
def product(context: RuleContext) -> State:
    """Follow a product of two matrices, two stacks of these, or a matrix or vector and a vector."""
    left, right = (context[name] for name in facts_of(context.operation.target).factors or ())
    dims, own, other = len(context.shape(left)), context.state(left), context.state(right)
    carried = [state for state in (own, other) if isinstance(state, BatchAxis)]
    if carried and dims == 3 and all(state.axis == 0 for state in carried):
        if len(set(carried)) > 1:
            raise Meets(MEET)
        return _with_addend(context, carried[0])
    if isinstance(own, BatchAxis) and isinstance(other, BatchAxis):
        raise Meets(MEET)
    if isinstance(own, BatchAxis):
        if own.axis == dims - 1:
            raise Meets("it sums over the batch")
        return _with_addend(context, own)
    if not isinstance(other, BatchAxis):
        raise BatchAxisLost("only what is added carries the batch")
    if other.axis == max(len(context.shape(right)) - 2, 0):
        raise Meets("it sums over the batch")
    return _with_addend(context, other)


def _with_addend(context: RuleContext, state: BatchAxis) -> State:
    """Return the same, unless what is added to a product carries the batch elsewhere."""
    added = context.arguments.get(facts_of(context.operation.target).addend)
    other = context.state(added)
    if added is not None and isinstance(other, BatchAxis):
        behind = len(context.out) - len(context.shape(added))
        if other._replace(axis=other.axis + behind) != state:
            raise Meets(MEET)
    return state


@register("_cdist_forward _euclidean_dist")
def distances(context: RuleContext) -> State:
    found, dims = set(), len(context.out)
    # points lie along the second axis from behind: those of x1 along the result's second, those of x2 along its last
    for value, points in ((context["x1"], 2), (context["x2"], 1)):
        state = context.state(value)
        if not isinstance(state, BatchAxis):
            continue
        behind = len(context.shape(value)) - state.axis
        if behind == 1:
            raise Meets("it sums over the batch")
        found.add(state._replace(axis=dims - (points if behind == 2 else behind)))
    return only_state(found)
