"""Operators that work entry by entry, and those that keep every entry where it is."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import only_state, register
from autojac.graph.batch_axis.states import BatchAxisLost, RuleContext, State
from autojac.graph.operator_kinds import Axes


@register(Axes.BROADCAST)
def pointwise(context: RuleContext) -> State:
    """Broadcast, entry by entry."""
    found, dims = set(), len(context.out)
    for value, state in context.carriers():
        shape = context.shape(value)
        axis = state.axis + dims - len(shape)
        if shape[state.axis] != context.out[axis]:
            raise BatchAxisLost("the batch is broadcast")
        found.add(state._replace(axis=axis))
    return only_state(found)


@register(Axes.KEPT)
def same(context: RuleContext) -> State:
    """Keep shape and order."""
    return context.only()[1]
