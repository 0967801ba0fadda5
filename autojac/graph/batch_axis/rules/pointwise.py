"""Operators that work entry by entry, and those that keep every entry where it is."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, register
from autojac.graph.batch_axis.states import Lost, Meets, State, Step


@register(
    "masked_fill hardswish fill polar complex real imag _conj fmod remainder softplus_backward "
    "log_sigmoid_forward log_sigmoid_backward _prelu_kernel prelu hardtanh_backward elu_backward "
    "leaky_relu_backward hardswish_backward mish_backward hardsigmoid_backward pow sub rsub lerp where clamp "
    "addcmul addcdiv"
)
def pointwise(step: Step) -> State:
    """Broadcast, entry by entry."""
    found, dims = set(), len(step.out)
    for value, state in step.carried():
        shape = step.shape(value)
        axis = state.axis + dims - len(shape)
        if shape[state.axis] != step.out[axis]:
            raise Lost("the batch is broadcast")
        found.add(state._replace(axis=axis))
    if len(found) > 1:
        raise Meets(MEET)
    return found.pop()


@register(
    "clone detach alias _to_copy lift_fresh lift_fresh_copy contiguous _neg_view _conj_physical resolve_conj "
    "view_as_real view_as_complex native_dropout"
)
def same(step: Step) -> State:
    """Shape and order are kept."""
    return step.only()[1]
