"""Convolutions, pooling and other operators whose first axis is the batch by definition."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import register
from autojac.graph.batch_axis.states import SHARED, BatchAxis, BatchAxisLost, Meets, RuleContext, State
from autojac.graph.ir import Value
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import Axes


@register(Axes.LEADING)
def leading(context: RuleContext) -> State:
    """Expect the batch on axis 0 of some arguments, free or shared tensors elsewhere; all outputs keep it."""
    args = context.operation.args
    positions = [place for place in facts_of(context.operation.target).batched if place < len(args)]
    allowed = {args[place].number for place in positions if isinstance(args[place], Value)}
    found = {state for _, state in context.carriers()}
    carriers = {value.number for value, _ in context.carriers()}
    if found != {BatchAxis(0, *next(iter(found))[1:])} or not carriers <= allowed:
        raise BatchAxisLost("the batch is not in front of what it takes samples from")
    if any(not isinstance(context.states.get(number), BatchAxis) for number in allowed):
        raise BatchAxisLost("only some of its arguments carry the batch")
    return found.pop()


@register("convolution")
def convolution(context: RuleContext) -> State:
    _, state = context.only()
    if state.axis != 0:
        raise Meets("it mixes along the batch")
    return state


@register("convolution_backward")
def convolution_backward(context: RuleContext) -> list[State]:
    """Follow the gradient of the images; those of weight and bias sum over the batch."""
    _, state = context.only()
    if state.axis != 0:
        raise Meets("it mixes along the batch")
    return [state, SHARED, SHARED]
