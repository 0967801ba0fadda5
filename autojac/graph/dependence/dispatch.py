"""What each aten operator does to the sets of inputs behind the elements of tensors.

Most classes of operators are those of `autojac.graph.batch_axis.rules`, which follow the batch. An operator without a
class mixes all that it reads.
"""

from __future__ import annotations

import torch

from autojac.graph.batch_axis.rules import RULES, base, convolutions, linalg, products, reductions, shapes, slicing
from autojac.graph.batch_axis.rules import indexing as selections
from autojac.graph.batch_axis.rules.pointwise import pointwise as elementwise
from autojac.graph.batch_axis.rules.pointwise import same
from autojac.graph.dependence.elementwise_and_moves import (
    SAME,
    choosing,
    constant,
    index,
    indexed,
    masked,
    moving,
    placing,
    pointwise,
    times,
    unknown,
)
from autojac.graph.dependence.index_sets import Reading, Rule, Sets
from autojac.graph.dependence.reductions_and_products import behind, distances, group_norm, mixing, parts, product
from autojac.graph.dependence.windows import adaptive, convolution, pooling


def rule_of(reading: Reading) -> Rule:
    """The rule of an operator; the one that mixes everything where it is not known."""
    name, target = reading.operation.name, reading.operation.target
    if not any(isinstance(state, Sets) for state in map(reading.states.__getitem__, reading.operation.sources)):
        return masked if name in MASKED else constant
    if target._schema.name == "aten::view" and target._overloadname == "dtype":
        return unknown
    if name in NAMED:
        return NAMED[name]
    if name in RULES:
        return CLASSES.get(RULES[name], unknown)
    return pointwise if torch.Tag.pointwise in target.tags else unknown


CLASSES: dict[base.Rule, Rule] = {
    elementwise: pointwise,
    same: pointwise,
    reductions.reduction: mixing,
    reductions.inside: mixing,
    **dict.fromkeys(
        (
            *(shapes.view, shapes.permute, shapes.transpose, shapes.turned, shapes.unsqueeze, shapes.squeeze),
            *(
                shapes.expand,
                shapes.repeat,
                slicing.select,
                slicing.slicing,
                slicing.splitting,
                slicing.unbind,
                slicing.cat,
            ),
            *(slicing.stack, shapes.diagonal, shapes.diag_embed, slicing.pad, shapes.unfold),
        ),
        moving,
    ),
    **dict.fromkeys((linalg.matrices, linalg.solving), behind(lambda reading, dims: max(dims - 2, 0))),
    reductions.layer_norm: behind(lambda reading, dims: dims - len(reading["normalized_shape"])),
    reductions.group_norm: group_norm,
    convolutions.convolution: convolution,
    products.distances: distances,
    selections.index_select: indexed("self", "index", "dim"),
    selections.embedding: indexed("weight", "indices", 0),
    selections.indexing: index,
}
_MOVING = (
    "roll flip tril triu reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d pixel_shuffle pixel_unshuffle native_channel_shuffle upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d im2col slice_backward select_backward slice_scatter select_scatter diagonal_scatter "
    "diagonal_backward"
)
_PLACING = (
    "scatter scatter_add scatter_reduce index_add index_copy index_reduce index_put _unsafe_index_put _index_put_impl"
)
_PRODUCTS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "_sparse_addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "addmv": ("mat", "vec"),
    "dot": ("self", "tensor"),
}
_CHANNELS = (
    "upsample_bilinear2d upsample_linear1d upsample_bicubic2d upsample_trilinear3d "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention"
)
_POOLS = "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d max_pool2d"
_ADAPTIVE = "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d"
NAMED: dict[str, Rule] = {
    **dict.fromkeys(_MOVING.split(), moving),
    **dict.fromkeys(_PLACING.split(), placing),
    **dict.fromkeys(_CHANNELS.split(), behind(2)),
    **dict.fromkeys(_POOLS.split(), pooling),
    **dict.fromkeys(_ADAPTIVE.split(), adaptive),
    **{name: product(*factors) for name, factors in _PRODUCTS.items()},
    **dict.fromkeys(("view_as_real", "view_as_complex"), parts),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data", "linalg_cross"), mixing),
    "mul": times,
    "where": choosing("condition"),
    "masked_fill": choosing("mask"),
    "gather": indexed("self", "index", "dim"),
    "take": indexed("self", "index", None),
}
MASKED = {"mul", *SAME, *_MOVING.split()}
MASKED |= {name for name, rule in RULES.items() if CLASSES.get(rule) is moving}
