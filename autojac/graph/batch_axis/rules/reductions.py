"""Operators along some axes: reductions, scans, sorts, transforms and normalizations."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import SHARED, BatchAxis, BatchAxisLost, Meets, RuleContext, State
from autojac.graph.operator_kinds import Axes


@register(Axes.REDUCED)
def reduction(context: RuleContext) -> State:
    """Follow a reduction over axes other than the batch's."""
    shape, state = context.only()
    gone = context.axes(len(shape))
    if state.axis in gone:
        raise Meets("it reduces over the batch")
    if context.arguments.get("keepdim"):
        return state
    return state._replace(axis=state.axis - sum(axis < state.axis for axis in gone))


@register(Axes.NAMED)
def inside(context: RuleContext) -> State:
    """Follow an operator along one or more other axes, which keep their place (and maybe not their length)."""
    shape, state = context.only()
    if state.axis in context.axes(len(shape)):
        raise Meets(MEET)
    return state


@register("native_layer_norm")
def layer_norm(context: RuleContext) -> list[State]:
    shape, state = context.only()
    if state.axis >= len(shape) - len(context["normalized_shape"]):
        raise Meets("it normalizes over the batch")
    return [state, state, state]


@register("native_group_norm")
def group_norm(context: RuleContext) -> list[State]:
    _, state = context.only()
    if state != BatchAxis(0):
        raise BatchAxisLost("the batch is not in front")
    return [state, state, state]


@register("native_layer_norm_backward native_group_norm_backward native_batch_norm_backward")
def norm_backward(context: RuleContext) -> list[State]:
    """Follow the gradient of what was normalized; those of weight and bias sum over the batch."""
    shape, state = context.only()
    if "normalized_shape" in context.arguments:
        meets = state.axis >= len(shape) - len(context["normalized_shape"])
    elif "train" in context.arguments:
        # channels have statistics of their own
        meets = context["train"] and state.axis != 1
    else:
        meets = state != BatchAxis(0)
    if meets:
        raise Meets("it normalizes over the batch")
    return [state, SHARED, SHARED]
