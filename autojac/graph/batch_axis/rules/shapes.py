"""Operators that rearrange axes."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import BatchAxisLost, Meets, RuleContext, State, regroup
from autojac.graph.operator_kinds import Axes


@register(Axes.REGROUPED)
def view(context: RuleContext) -> State:
    shape, state = context.only()
    return regroup(state, shape, context.out, context.batch)


@register("permute")
def permute(context: RuleContext) -> State:
    shape, state = context.only()
    order = [axis % len(shape) for axis in context["dims"]]
    return state._replace(axis=order.index(state.axis))


@register("transpose")
def transpose(context: RuleContext) -> State:
    shape, state = context.only()
    one, other = context["dim0"] % len(shape), context["dim1"] % len(shape)
    return state._replace(axis={one: other, other: one}.get(state.axis, state.axis))


@register("t")
def matrix_transpose(context: RuleContext) -> State:
    shape, state = context.only()
    return state._replace(axis=len(shape) - 1 - state.axis)


@register("unsqueeze")
def unsqueeze(context: RuleContext) -> State:
    shape, state = context.only()
    return state._replace(axis=state.axis + (context["dim"] % (len(shape) + 1) <= state.axis))


@register("squeeze")
def squeeze(context: RuleContext) -> State:
    shape, state = context.only()
    gone = context.axes(len(shape))
    return state._replace(axis=state.axis - sum(shape[axis] == 1 and axis < state.axis for axis in gone))


@register("expand")
def expand(context: RuleContext) -> State:
    shape, state = context.only()
    return state._replace(axis=state.axis + len(context.out) - len(shape))


@register("repeat")
def tiling(context: RuleContext) -> State:
    shape, state = context.only()
    axis = state.axis + len(context.out) - len(shape)
    if context["repeats"][axis] != 1:
        raise BatchAxisLost("the batch is repeated")
    return state._replace(axis=axis)


@register("diagonal")
def diagonal(context: RuleContext) -> State:
    shape, state = context.only()
    gone = {context["dim1"] % len(shape), context["dim2"] % len(shape)}
    if state.axis in gone:
        raise Meets(MEET)
    return state._replace(axis=state.axis - sum(axis < state.axis for axis in gone))


@register("diag_embed")
def onto_diagonal(context: RuleContext) -> State:
    shape, state = context.only()
    if state.axis == len(shape) - 1:
        raise Meets(MEET)
    fresh = {context["dim1"] % len(context.out), context["dim2"] % len(context.out)}
    return state._replace(axis=[axis for axis in range(len(context.out)) if axis not in fresh][state.axis])


@register("unfold")
def unfold(context: RuleContext) -> State:
    shape, state = context.only()
    if context["dimension"] % len(shape) == state.axis:
        raise Meets(MEET)
    return state
