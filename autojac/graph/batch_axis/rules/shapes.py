"""Operators that rearrange axes."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import Lost, Meets, State, Step, regrouped
from autojac.graph.operator_facts import Axes


@register(Axes.REGROUPED)
def view(step: Step) -> State:
    shape, state = step.only()
    return regrouped(state, shape, step.out, step.batch)


@register("permute")
def permute(step: Step) -> State:
    shape, state = step.only()
    order = [axis % len(shape) for axis in step["dims"]]
    return state._replace(axis=order.index(state.axis))


@register("transpose")
def transpose(step: Step) -> State:
    shape, state = step.only()
    one, other = step["dim0"] % len(shape), step["dim1"] % len(shape)
    return state._replace(axis={one: other, other: one}.get(state.axis, state.axis))


@register("t")
def turned(step: Step) -> State:
    shape, state = step.only()
    return state._replace(axis=len(shape) - 1 - state.axis)


@register("unsqueeze")
def unsqueeze(step: Step) -> State:
    shape, state = step.only()
    return state._replace(axis=state.axis + (step["dim"] % (len(shape) + 1) <= state.axis))


@register("squeeze")
def squeeze(step: Step) -> State:
    shape, state = step.only()
    gone = step.axes("dim", len(shape)) if "dim" in step.arguments else set(range(len(shape)))
    return state._replace(axis=state.axis - sum(shape[axis] == 1 and axis < state.axis for axis in gone))


@register("expand")
def expand(step: Step) -> State:
    shape, state = step.only()
    return state._replace(axis=state.axis + len(step.out) - len(shape))


@register("repeat")
def repeat(step: Step) -> State:
    shape, state = step.only()
    axis = state.axis + len(step.out) - len(shape)
    if step["repeats"][axis] != 1:
        raise Lost("the batch is repeated")
    return state._replace(axis=axis)


@register("diagonal")
def diagonal(step: Step) -> State:
    shape, state = step.only()
    gone = {step["dim1"] % len(shape), step["dim2"] % len(shape)}
    if state.axis in gone:
        raise Meets(MEET)
    return state._replace(axis=state.axis - sum(axis < state.axis for axis in gone))


@register("diag_embed")
def diag_embed(step: Step) -> State:
    shape, state = step.only()
    if state.axis == len(shape) - 1:
        raise Meets(MEET)
    fresh = {step["dim1"] % len(step.out), step["dim2"] % len(step.out)}
    return state._replace(axis=[axis for axis in range(len(step.out)) if axis not in fresh][state.axis])


@register("unfold")
def unfold(step: Step) -> State:
    shape, state = step.only()
    if step["dimension"] % len(shape) == state.axis:
        raise Meets(MEET)
    return state
