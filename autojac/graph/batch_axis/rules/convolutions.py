"""Convolutions, pooling and other operators whose first axis is the batch by definition."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import Rule, register
from autojac.graph.batch_axis.states import Along, Lost, Meets, State, Step
from autojac.graph.ir import Value


def leading(*positions: int) -> Rule:
    """The batch on axis 0 of the tensors at some positions, free or shared tensors elsewhere; all outputs keep it."""

    def rule(step: Step) -> State:
        args = step.operation.args
        allowed = {args[place].number for place in positions if place < len(args) and isinstance(args[place], Value)}
        found = {state for _, state in step.carried()}
        if found != {Along(0, *next(iter(found))[1:])} or not {value.number for value, _ in step.carried()} <= allowed:
            raise Lost("the batch is not in front of what it takes samples from")
        missing = [number for number in allowed if not isinstance(step.states.get(number), Along)]
        if missing:
            raise Lost("only some of its arguments carry the batch")
        return found.pop()

    return rule


@register("convolution")
def convolution(step: Step) -> State:
    _, state = step.only()
    if state.axis != 0:
        raise Meets("it mixes along the batch")
    return state


register(
    "avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d max_pool2d upsample_nearest1d "
    "upsample_nearest2d upsample_bilinear2d upsample_linear1d upsample_bicubic2d upsample_nearest3d im2col "
    "col2im pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
    "_adaptive_avg_pool1d native_channel_shuffle"
)(leading(0))
register(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention"
)(leading(0, 1, 2))
register("grid_sampler_2d grid_sampler_3d")(leading(0, 1))
