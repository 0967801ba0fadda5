"""Operators that work entry by entry, and those that keep every entry where it is."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import Lost, Meets, State, Step
from autojac.graph.operator_facts import Axes


@register(Axes.BROADCAST)
def pointwise(step: Step) -> State:
    """Broadcast, entry by entry."""
    found, dims = set(), len(step.out)
    for value, state in step.carried():
        shape = step.shape(value)
        axis = state.axis + dims - len(shape)
        if shape[state.axis] != step.out[axis]:
            raise Lost("the batch is broadcast")
        found.add(state._replace(axis=axis))
    if len(found) > 1:
        raise Meets(MEET)
    return found.pop()


@register(Axes.KEPT)
def same(step: Step) -> State:
    """Shape and order are kept."""
    return step.only()[1]
