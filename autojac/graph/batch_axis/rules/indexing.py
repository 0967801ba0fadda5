"""Operators that read or write by index."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, only_state, register
from autojac.graph.batch_axis.states import BatchAxis, BatchAxisLost, Meets, RuleContext, State
from autojac.graph.ir import Value
from autojac.graph.operator_kinds import MASKS, Axes


@register("embedding")
def embedding(context: RuleContext) -> State:
    state = context.state(context["indices"])
    if not isinstance(state, BatchAxis) or isinstance(context.state(context["weight"]), BatchAxis):
        raise BatchAxisLost("it reads rows of the batch")
    return state


@register(Axes.INDEXED)
def gathering(context: RuleContext) -> State:
    """Follow gather, scatter and their kin: every tensor with the batch has it on one axis, which is not `dim`."""
    found = {state for _, state in context.carriers()}
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
    """Follow x[..., index, ...] with one index tensor of integers."""
    axis, index = _only_index(context, "takes")
    own, by = context.state(context["self"]), context.state(index)
    if isinstance(own, BatchAxis) and isinstance(by, BatchAxis):
        raise Meets(MEET)
    if isinstance(by, BatchAxis):
        return by._replace(axis=by.axis + axis)
    assert isinstance(own, BatchAxis)
    if own.axis == axis:
        raise BatchAxisLost("it takes samples by index")
    return own._replace(axis=own.axis + (len(context.shape(index)) - 1 if axis < own.axis else 0))


def _only_index(context: RuleContext, does: str) -> tuple[int, Value]:
    """Return the axis and the tensor of the one index; several, and masks, are not followed."""
    used = [(axis, index) for axis, index in enumerate(context["indices"]) if index is not None]
    if len(used) != 1 or context.graph.dtypes[used[0][1].number] in MASKS:
        raise BatchAxisLost(f"it {does} entries by several indices or by a mask")
    return used[0]


WRITES = "it writes samples by index"


@register("index_add index_copy index_reduce")
def index_add(context: RuleContext) -> State:
    """Put slices of the source to places along `dim`; the batch lies on one other axis of both tensors."""
    if isinstance(context.state(context["index"]), BatchAxis):
        raise BatchAxisLost(WRITES)
    state = only_state({state for _, state in context.carriers()})
    if context["dim"] % max(1, len(context.out)) == state.axis:
        raise BatchAxisLost(WRITES)
    return state


@register("index_put _unsafe_index_put _index_put_impl")
def index_put(context: RuleContext) -> State:
    """Follow x[..., index, ...] = values with one index tensor of integers, the same for all samples."""
    axis, index = _only_index(context, "writes")
    own, source = context.state(context["self"]), context.state(context["values"])
    found = {own} if isinstance(own, BatchAxis) else set()
    if isinstance(source, BatchAxis):
        # values are broadcast to what the index takes, which has the index's axes in the place of one
        shape, more = context.shape(context["values"]), len(context.shape(index)) - 1
        place = source.axis + len(context.out) + more - len(shape)
        at = place if place < axis else place - more
        if axis <= place <= axis + more or context.out[at] != shape[source.axis]:
            raise BatchAxisLost(WRITES)
        found.add(source._replace(axis=at))
    if isinstance(context.state(index), BatchAxis) or axis in {state.axis for state in found}:
        raise BatchAxisLost(WRITES)
    return only_state(found)
