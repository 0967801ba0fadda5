"""The table of operator facts: one row per group of aten operators that everything else here treats alike.

A row says what an operator does to the entries of tensors (its kind), what it does to their axes, which arguments play
which role, and what else sets it apart. The interpreters of a graph have rules for kinds; an operator gets a rule by
getting a row. An operator without a row is pointwise where torch tags it so, and otherwise unknown: whoever asks then
assumes that each result reads everything.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from autojac.graph.operator_kinds import MOVING, Axes, Kind

_AXES_OF_KIND = {
    Kind.POINTWISE: Axes.BROADCAST,
    Kind.COPY: Axes.KEPT,
    Kind.PAIRS: Axes.KEPT,
    Kind.VIEW: Axes.REGROUPED,
    Kind.AXES: Axes.OWN,
    Kind.SCATTER: Axes.OWN,
    Kind.CONVOLUTION: Axes.OWN,
    Kind.WINDOW: Axes.LEADING,
    Kind.ADAPTIVE: Axes.LEADING,
    Kind.CHANNEL: Axes.LEADING,
    Kind.PRODUCT: Axes.FACTORS,
    Kind.DISTANCE: Axes.OWN,
    Kind.REDUCTION: Axes.REDUCED,
    Kind.SCAN: Axes.NAMED,
    Kind.MATRIX: Axes.TRAILING,
}
"""What operators of a kind do to axes unless their row says something else."""


@dataclass(frozen=True)
class Facts:
    """One row of the table.

    Attributes:
        kind, axes: what the operator does to entries and to axes; the axes follow from the kind by default.
        batched: positions of the arguments whose first axis is the batch, for `Axes.LEADING`.
        selectors: arguments whose values decide which entries are read.
        along: the argument that names the axis along which selectors count, or that axis itself.
        source: the argument that is scattered.
        overwrites: what is scattered replaces what was there, instead of being combined with it.
        fillers: arguments that may be numbers to fill gaps with.
        factors: the two arguments that are multiplied.
        addend: the argument that is added to a product.
        window_axes: how many axes a window has.
        batch_size: the argument that tells the number of samples.
        by_value: the values decide whose entries are returned, as those of a maximum do.
        keeps_zeros: results are zero where all arguments are.
        has_derivative: whether a derivative other than zero runs through it.
        drops_nan: a NaN among the arguments need not appear in the result.
        batch_norm: it normalizes over the batch and may update running statistics.
        forward_formula_once: its forward-mode formula is right and the derivative of that is wrong: it takes what the
            operator has saved, such as a mean or factors of a matrix, for constant. A batch norm's is right where it
            uses running statistics. Found by checking all operators against reverse mode on torch 2.13;
            `tests/forward_formulas.py` does so again on the torch installed.
        partition: its results share a storage and no element of it.
        any_layout: it does the same however its arguments lie in memory. Operators that torch tags as pointwise do so
            too, and views. Kernels of others, which torch calls with contiguous tensors alone, read past the end of an
            expanded one (`native_layer_norm_backward`).
        literal: what is written out in the code passes through it.
        shape_by_value: values decide over shapes of results, or how many entries sparse ones hold, and no tag says so.
    """

    kind: Kind
    axes: Axes = Axes.UNKNOWN
    batched: tuple[int, ...] = (0,)
    selectors: tuple[str, ...] = ()
    along: str | int | None = None
    source: str = ""
    overwrites: bool = False
    fillers: tuple[str, ...] = ()
    factors: tuple[str, str] | None = None
    addend: str = ""
    window_axes: int = 0
    batch_size: str = ""
    by_value: bool = False
    keeps_zeros: bool = False
    has_derivative: bool = True
    drops_nan: bool = False
    batch_norm: bool = False
    forward_formula_once: bool = False
    partition: bool = False
    any_layout: bool = False
    literal: bool = False
    shape_by_value: bool = False


UNKNOWN = Facts(Kind.UNKNOWN)
_POINTWISE = Facts(Kind.POINTWISE, Axes.BROADCAST)


def _row(names: str, kind: Kind, **facts: Any) -> tuple[str, Facts]:
    facts.setdefault("axes", _AXES_OF_KIND.get(kind, Axes.UNKNOWN))
    facts.setdefault("keeps_zeros", kind is Kind.COPY or kind in MOVING)
    return names, Facts(kind, **facts)


ROWS = (
    _row("neg", Kind.POINTWISE, keeps_zeros=True),
    _row("mul", Kind.POINTWISE, keeps_zeros=True, factors=("self", "other")),
    _row("floor ceil round sign", Kind.POINTWISE, has_derivative=False),
    _row("where", Kind.POINTWISE, selectors=("condition",), fillers=("self", "other"), drops_nan=True),
    _row("masked_fill", Kind.POINTWISE, selectors=("mask",), fillers=("value",), drops_nan=True),
    _row("nan_to_num fmax fmin", Kind.POINTWISE, drops_nan=True),
    _row(
        "hardswish fill polar complex real imag _conj fmod remainder softplus_backward log_sigmoid_forward "
        "log_sigmoid_backward _prelu_kernel _prelu_kernel_backward prelu hardtanh_backward elu_backward "
        "leaky_relu_backward pow sub rsub lerp clamp addcmul addcdiv",
        Kind.POINTWISE,
    ),
    _row("mish_backward hardswish_backward hardsigmoid_backward", Kind.POINTWISE, any_layout=True),
    _row("clone _to_copy", Kind.COPY, any_layout=True),
    _row("alias contiguous _neg_view _conj_physical resolve_conj native_dropout", Kind.COPY),
    _row("detach", Kind.COPY, has_derivative=False),
    _row("lift_fresh lift_fresh_copy", Kind.COPY, literal=True),
    _row("view_as_real view_as_complex", Kind.PAIRS),
    _row("view _unsafe_view _reshape_alias", Kind.VIEW),
    _row("reshape", Kind.VIEW, any_layout=True),
    _row("permute transpose t unsqueeze squeeze expand", Kind.AXES),
    # entries change place
    _row("repeat diagonal diag_embed unfold select slice", Kind.MOVE, axes=Axes.OWN),
    _row("cat stack", Kind.MOVE, axes=Axes.OWN, any_layout=True),
    _row("constant_pad_nd", Kind.MOVE, axes=Axes.OWN, fillers=("value",), any_layout=True),
    _row(
        "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk",
        Kind.MOVE,
        axes=Axes.SPLIT,
        partition=True,
    ),
    _row("unbind", Kind.MOVE, axes=Axes.OWN, partition=True),
    _row("flip roll", Kind.MOVE, axes=Axes.NAMED),
    _row("tril triu", Kind.MOVE, axes=Axes.TRAILING),
    _row(
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d pixel_shuffle pixel_unshuffle im2col "
        "native_channel_shuffle",
        Kind.MOVE,
        axes=Axes.LEADING,
    ),
    _row("slice_scatter select_scatter diagonal_scatter diagonal_backward", Kind.MOVE),
    _row("slice_backward select_backward", Kind.MOVE, axes=Axes.OWN),
    # entries are chosen by index or by mask
    _row("index_select", Kind.GATHER, axes=Axes.OWN, selectors=("index",), along="dim", any_layout=True),
    _row("gather", Kind.GATHER, axes=Axes.INDEXED, selectors=("index",), along="dim", any_layout=True),
    _row("take", Kind.GATHER, selectors=("index",)),
    _row("embedding", Kind.GATHER, axes=Axes.OWN, selectors=("indices",), along=0),
    _row("index", Kind.GATHER, axes=Axes.OWN, selectors=("indices",), any_layout=True),
    _row("masked_select", Kind.GATHER, selectors=("mask",), by_value=True),
    _row("scatter", Kind.SCATTER, axes=Axes.INDEXED, selectors=("index",), source="src", overwrites=True),
    _row("scatter_add scatter_reduce", Kind.SCATTER, axes=Axes.INDEXED, selectors=("index",), source="src"),
    _row("index_copy", Kind.SCATTER, selectors=("index",), source="source", overwrites=True),
    _row("index_add index_reduce", Kind.SCATTER, selectors=("index",), source="source"),
    _row("index_put _unsafe_index_put", Kind.SCATTER, selectors=("indices",), source="values", overwrites=True),
    _row("_index_put_impl", Kind.SCATTER, selectors=("indices",), source="values", overwrites=True),
    _row("masked_scatter", Kind.UNKNOWN, drops_nan=True),
    _row("nonzero unique_dim _unique2", Kind.UNKNOWN, by_value=True),
    _row(
        "_pack_padded_sequence _nested_tensor_from_mask _to_sparse _to_sparse_csr _to_sparse_csc _to_sparse_bsr "
        "_to_sparse_bsc _coalesce _sparse_sparse_matmul _indices _values indices values row_indices col_indices",
        Kind.UNKNOWN,
        shape_by_value=True,
    ),
    # images
    _row("convolution", Kind.CONVOLUTION),
    _row("avg_pool2d max_pool2d max_pool2d_with_indices", Kind.WINDOW, window_axes=2),
    _row("avg_pool3d max_pool3d_with_indices", Kind.WINDOW, window_axes=3),
    _row("_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d", Kind.ADAPTIVE),
    _row("upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d", Kind.CHANNEL),
    _row(
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_flash_attention",
        Kind.CHANNEL,
        batched=(0, 1, 2),
    ),
    _row(
        "col2im avg_pool2d_backward max_pool2d_with_indices_backward _adaptive_avg_pool2d_backward "
        "upsample_nearest2d_backward upsample_bilinear2d_backward _scaled_dot_product_flash_attention_for_cpu_backward",
        Kind.UNKNOWN,
        axes=Axes.LEADING,
    ),
    _row("grid_sampler_2d grid_sampler_3d", Kind.UNKNOWN, axes=Axes.LEADING, batched=(0, 1)),
    # products
    _row("mm bmm", Kind.PRODUCT, factors=("self", "mat2"), any_layout=True),
    _row("addmm", Kind.PRODUCT, factors=("mat1", "mat2"), addend="self", any_layout=True),
    _row("_sparse_addmm", Kind.PRODUCT, factors=("mat1", "mat2"), addend="self"),
    _row("baddbmm", Kind.PRODUCT, factors=("batch1", "batch2"), addend="self", any_layout=True),
    _row("mv", Kind.PRODUCT, factors=("self", "vec"), any_layout=True),
    _row("addmv", Kind.PRODUCT, factors=("mat", "vec"), addend="self", any_layout=True),
    _row("dot", Kind.PRODUCT, factors=("self", "tensor"), any_layout=True),
    _row("_cdist_forward _euclidean_dist", Kind.DISTANCE),
    # along some axes
    _row("var std var_mean std_mean logsumexp norm linalg_vector_norm count_nonzero nansum", Kind.REDUCTION),
    _row("sum mean prod any all", Kind.REDUCTION, any_layout=True),
    _row("amax amin", Kind.REDUCTION, by_value=True, any_layout=True),
    _row("max min median nanmedian mode kthvalue aminmax", Kind.REDUCTION, by_value=True),
    _row("argmax argmin", Kind.REDUCTION, by_value=True, has_derivative=False),
    _row(
        "cumprod logcumsumexp _softmax _safe_softmax _log_softmax softmax log_softmax glu _fft_r2c _fft_c2c _fft_c2r",
        Kind.SCAN,
    ),
    _row("cumsum", Kind.SCAN, any_layout=True),
    _row("sort topk argsort cummax cummin", Kind.SCAN, by_value=True),
    _row("_softmax_backward_data _log_softmax_backward_data", Kind.SCAN),
    _row("linalg_cross", Kind.SCAN, axes=Axes.UNKNOWN),
    _row("glu_backward", Kind.UNKNOWN, axes=Axes.NAMED),
    _row(
        "linalg_inv_ex linalg_cholesky_ex linalg_qr _linalg_eigh linalg_lu_factor_ex linalg_lu _linalg_svd "
        "linalg_matrix_exp cholesky_solve cholesky_inverse",
        Kind.MATRIX,
    ),
    _row("_linalg_det _linalg_slogdet", Kind.MATRIX, forward_formula_once=True),
    _row("_linalg_solve_ex", Kind.MATRIX, axes=Axes.OWN, forward_formula_once=True),
    _row("linalg_householder_product", Kind.UNKNOWN, forward_formula_once=True),
    _row("native_layer_norm", Kind.NORMALIZATION, axes=Axes.OWN, forward_formula_once=True),
    _row("native_group_norm", Kind.NORMALIZATION, axes=Axes.OWN, batch_size="N"),
    _row("native_layer_norm_backward native_group_norm_backward", Kind.UNKNOWN, axes=Axes.OWN),
    _row("native_batch_norm_backward convolution_backward unfold_backward", Kind.UNKNOWN, axes=Axes.OWN),
    _row(
        "native_batch_norm cudnn_batch_norm _native_batch_norm_legit _batch_norm_with_update",
        Kind.UNKNOWN,
        batch_norm=True,
        forward_formula_once=True,
    ),
    _row(
        "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided zeros ones "
        "full empty empty_strided _new_zeros_with_same_feature_meta",
        Kind.FACTORY,
        has_derivative=False,
    ),
    _row(
        "is_same_size _fused_sdp_choice _has_same_storage_numel _has_compatible_shallow_copy_type sym_size sym_numel",
        Kind.SIZES,
    ),
)
OPERATORS = {name: facts for names, facts in ROWS for name in names.split()}
"""The facts of each operator, by its name without namespace and overload."""


@functools.cache
def facts_of(target: Any) -> Facts:
    """Return the facts of an aten overload; unknown operators read everything.

    A `view` as another dtype is unknown: it takes entries apart.
    """
    facts = OPERATORS.get(target._schema.name.removeprefix("aten::"))
    if facts is None:
        return _POINTWISE if torch.Tag.pointwise in target.tags else UNKNOWN
    if facts.kind is Kind.VIEW and target._overloadname not in ("", "default"):
        return UNKNOWN
    return facts


def names_with(flag: str) -> frozenset[str]:
    """Return the operators that have a flag of `Facts`."""
    return frozenset(name for name, facts in OPERATORS.items() if getattr(facts, flag))
