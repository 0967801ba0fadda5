"""Operators that read or write by index."""

from __future__ import annotations

import torch

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import BatchAxis, BatchAxisLost, Meets, RuleContext, State
from autojac.graph.ir import Value
from autojac.graph.operator_facts import Axes


@register("embedding")
def embedding(context: RuleContext) -> State:
    state = context.state(context["indices"])
    if not isinstance(state, BatchAxis) or isinstance(context.state(context["weight"]), BatchAxis):
        raise BatchAxisLost("it reads rows of the batch")
    return state


@register(Axes.INDEXED)
def gathering(context: RuleContext) -> State:
    """gather, scatter and their kin: every tensor that carries the batch does so on one axis, which is not `dim`."""
    found = {state for _, state in context.carried()}
    dims = len(context.out)
    values = [value for value in context.operation.args if isinstance(value, Value)]
    if len(found) != 1 or any(len(context.shape(value)) != dims for value in values):
        raise Meets(MEET)
    state = found.pop()
    size = context.out[state.axis]
    if context["dim"] % dims == state.axis or any(context.shape(value)[state.axis] != size for value in values):
        raise BatchAxisLost("it takes samples by index")
    return state


@register("index_select")
def index_select(context: RuleContext) -> State:
    shape, state = context.only()
    if context["dim"] % len(shape) == state.axis:
        raise BatchAxisLost("it takes samples by index")
    return state


@register("index")
def indexing(context: RuleContext) -> State:
    """x[..., index, ...] with one index tensor of integers."""
    indices = context["indices"]
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1 or context.graph.dtypes[used[0][1].number] in (torch.bool, torch.uint8):
        raise BatchAxisLost("it takes entries by several indices or by a mask")
    (axis, index) = used[0]
    own, by = context.state(context["self"]), context.state(index)
    if isinstance(own, BatchAxis) and isinstance(by, BatchAxis):
        raise Meets(MEET)
    if isinstance(by, BatchAxis):
        return by._replace(axis=by.axis + axis)
    assert isinstance(own, BatchAxis)
    if own.axis == axis:
        raise BatchAxisLost("it takes samples by index")
    return own._replace(axis=own.axis + (len(context.shape(index)) - 1 if axis < own.axis else 0))
