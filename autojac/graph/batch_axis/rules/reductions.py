"""Operators along some axes: reductions, scans, sorts, transforms and normalizations."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import Along, Lost, Meets, State, Step
from autojac.graph.operator_facts import Axes


@register(Axes.REDUCED)
def reduction(step: Step) -> State:
    """A reduction over axes other than the batch's."""
    shape, state = step.only()
    name = "dim" if "dim" in step.arguments else "dims"
    gone = step.axes(name, len(shape)) if name in step.arguments else set(range(len(shape)))
    if state.axis in gone:
        raise Meets("it reduces over the batch")
    if step.arguments.get("keepdim"):
        return state
    return state._replace(axis=state.axis - sum(axis < state.axis for axis in gone))


@register(Axes.NAMED)
def inside(step: Step) -> State:
    """Something along one or more other axes, which keep their place (and maybe not their length)."""
    shape, state = step.only()
    if state.axis in step.axes("dim" if "dim" in step.arguments else "dims", len(shape)):
        raise Meets(MEET)
    return state


@register("native_layer_norm")
def layer_norm(step: Step) -> list[State]:
    shape, state = step.only()
    if state.axis >= len(shape) - len(step["normalized_shape"]):
        raise Meets("it normalizes over the batch")
    return [state, state, state]


@register("native_group_norm")
def group_norm(step: Step) -> list[State]:
    _, state = step.only()
    if state != Along(0):
        raise Lost("the batch is not in front")
    return [state, state, state]
