"""Operators along some axes: reductions, scans, sorts, transforms and normalizations."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import Along, Lost, Meets, State, Step


@register(
    "sum mean amax amin prod var std var_mean std_mean logsumexp norm linalg_vector_norm argmax argmin any all "
    "max min median nanmedian mode kthvalue count_nonzero nansum aminmax"
)
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


@register(
    "cumsum cumprod logcumsumexp cummax cummin _softmax _log_softmax softmax log_softmax sort topk flip roll "
    "_fft_r2c _fft_c2c argsort glu _fft_c2r"
)
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
