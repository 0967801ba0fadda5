"""Operators that read or write by index."""

from __future__ import annotations

import torch

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import Along, Lost, Meets, State, Step
from autojac.graph.ir import Value
from autojac.graph.operator_facts import Axes


@register("embedding")
def embedding(step: Step) -> State:
    state = step.state(step["indices"])
    if not isinstance(state, Along) or isinstance(step.state(step["weight"]), Along):
        raise Lost("it reads rows of the batch")
    return state


@register(Axes.INDEXED)
def gathering(step: Step) -> State:
    """gather, scatter and their kin: every tensor that carries the batch does so on one axis, which is not `dim`."""
    found = {state for _, state in step.carried()}
    dims = len(step.out)
    values = [value for value in step.operation.args if isinstance(value, Value)]
    if len(found) != 1 or any(len(step.shape(value)) != dims for value in values):
        raise Meets(MEET)
    state = found.pop()
    if step["dim"] % dims == state.axis or any(step.shape(v)[state.axis] != step.out[state.axis] for v in values):
        raise Lost("it takes samples by index")
    return state


@register("index_select")
def index_select(step: Step) -> State:
    shape, state = step.only()
    if step["dim"] % len(shape) == state.axis:
        raise Lost("it takes samples by index")
    return state


@register("index")
def indexing(step: Step) -> State:
    """x[..., index, ...] with one index tensor of integers."""
    indices = step["indices"]
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1 or step.graph.dtypes[used[0][1].number] in (torch.bool, torch.uint8):
        raise Lost("it takes entries by several indices or by a mask")
    (axis, index) = used[0]
    own, by = step.state(step["self"]), step.state(index)
    if isinstance(own, Along) and isinstance(by, Along):
        raise Meets(MEET)
    if isinstance(by, Along):
        return by._replace(axis=by.axis + axis)
    assert isinstance(own, Along)
    if own.axis == axis:
        raise Lost("it takes samples by index")
    return own._replace(axis=own.axis + (len(step.shape(index)) - 1 if axis < own.axis else 0))
