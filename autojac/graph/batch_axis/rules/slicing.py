"""Operators that take tensors apart and put them together."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import Lost, Meets, State, Step
from autojac.graph.operator_facts import Axes


@register("select")
def select(step: Step) -> State:
    shape, state = step.only()
    axis = step["dim"] % len(shape)
    if axis == state.axis:
        raise Lost("it takes one sample out of the batch")
    return state._replace(axis=state.axis - (axis < state.axis))


@register("slice")
def slicing(step: Step) -> State:
    shape, state = step.only()
    axis = (step["dim"] or 0) % len(shape)
    if axis == state.axis and (step["step"] != 1 or shape[axis] != step.out[axis]):
        raise Lost("it takes some samples out of the batch")
    return state


@register(Axes.SPLIT)
def splitting(step: Step) -> State:
    shape, state = step.only()
    if step["dim"] % len(shape) == state.axis:
        raise Lost("it takes the batch apart")
    return state


@register("unbind")
def unbind(step: Step) -> State:
    shape, state = step.only()
    axis = step["dim"] % len(shape)
    if axis == state.axis:
        raise Lost("it takes the batch apart")
    return state._replace(axis=state.axis - (axis < state.axis))


@register("cat")
def cat(step: Step) -> State:
    found = {state for _, state in step.carried()}
    axis = step["dim"] % len(step.out)
    if len(found) > 1 or axis in {state.axis for state in found}:
        raise Meets(MEET)
    return found.pop()


@register("stack")
def stack(step: Step) -> State:
    found = {state for _, state in step.carried()}
    if len(found) > 1:
        raise Meets(MEET)
    state = found.pop()
    return state._replace(axis=state.axis + (step["dim"] % len(step.out) <= state.axis))


@register("constant_pad_nd")
def pad(step: Step) -> State:
    """Pairs of numbers, the last axis first."""
    shape, state = step.only()
    amounts = step["pad"] if "pad" in step.arguments else step["padding"]
    behind = 2 * (len(shape) - 1 - state.axis)
    if any(amounts[behind : behind + 2]):
        raise Lost("the batch is padded")
    return state
