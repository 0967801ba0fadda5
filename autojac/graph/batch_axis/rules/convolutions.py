"""Convolutions, pooling and other operators whose first axis is the batch by definition."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import register
from autojac.graph.batch_axis.states import Along, Lost, Meets, State, Step
from autojac.graph.ir import Value
from autojac.graph.operator_facts import Axes, facts_of


@register(Axes.LEADING)
def leading(step: Step) -> State:
    """The batch on axis 0 of some arguments, free or shared tensors elsewhere; all outputs keep it."""
    args = step.operation.args
    positions = [place for place in facts_of(step.operation.target).batched if place < len(args)]
    allowed = {args[place].number for place in positions if isinstance(args[place], Value)}
    found = {state for _, state in step.carried()}
    if found != {Along(0, *next(iter(found))[1:])} or not {value.number for value, _ in step.carried()} <= allowed:
        raise Lost("the batch is not in front of what it takes samples from")
    if any(not isinstance(step.states.get(number), Along) for number in allowed):
        raise Lost("only some of its arguments carry the batch")
    return found.pop()


@register("convolution")
def convolution(step: Step) -> State:
    _, state = step.only()
    if state.axis != 0:
        raise Meets("it mixes along the batch")
    return state
