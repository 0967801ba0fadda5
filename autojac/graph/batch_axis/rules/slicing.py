"""Operators that take tensors apart and put them together."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, only_state, register
from autojac.graph.batch_axis.states import BatchAxisLost, Meets, RuleContext, State
from autojac.graph.operator_kinds import Axes


@register("select")
def select(context: RuleContext) -> State:
    return _without_axis(context, "it takes one sample out of the batch")


@register("slice slice_backward")
def slicing(context: RuleContext) -> State:
    shape, state = context.only()
    axis = (context["dim"] or 0) % len(shape)
    if axis == state.axis and (context["step"] != 1 or shape[axis] != context.out[axis]):
        raise BatchAxisLost("it takes some samples out of the batch")
    return state


@register(Axes.SPLIT)
def splitting(context: RuleContext) -> State:
    shape, state = context.only()
    if context["dim"] % len(shape) == state.axis:
        raise BatchAxisLost("it takes the batch apart")
    return state


@register("unbind")
def unbind(context: RuleContext) -> State:
    return _without_axis(context, "it takes the batch apart")


def _without_axis(context: RuleContext, reason: str) -> State:
    """Follow the batch where the axis `dim` goes; if it is the batch, that is the reason why it is lost."""
    shape, state = context.only()
    axis = context["dim"] % len(shape)
    if axis == state.axis:
        raise BatchAxisLost(reason)
    return state._replace(axis=state.axis - (axis < state.axis))


@register("cat")
def cat(context: RuleContext) -> State:
    state = only_state({state for _, state in context.carriers()})
    if context["dim"] % len(context.out) == state.axis:
        raise Meets(MEET)
    return state


@register("stack")
def stack(context: RuleContext) -> State:
    state = only_state({state for _, state in context.carriers()})
    return state._replace(axis=state.axis + (context["dim"] % len(context.out) <= state.axis))


@register("constant_pad_nd")
def pad(context: RuleContext) -> State:
    """Follow padding by pairs of numbers, the last axis first."""
    shape, state = context.only()
    amounts = context["pad"] if "pad" in context.arguments else context["padding"]
    behind = 2 * (len(shape) - 1 - state.axis)
    if any(amounts[behind : behind + 2]):
        raise BatchAxisLost("the batch is padded")
    return state


@register("select_backward")
def select_backward(context: RuleContext) -> State:
    """Put a slice to its place along a new axis `dim`."""
    _, state = context.only()
    return state._replace(axis=state.axis + (context["dim"] % len(context.out) <= state.axis))


@register("unfold_backward")
def unfold_backward(context: RuleContext) -> State:
    """Add up windows along `dim`, which lie along the last axis."""
    shape, state = context.only()
    if state.axis in (context["dim"] % len(context.out), len(shape) - 1):
        raise Meets(MEET)
    return state
