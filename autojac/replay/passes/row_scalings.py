"""Cotangents that are the same for all samples, multiplied by the weights before they meet a sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from autojac.replay.passes import activation_slopes
from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import PRECISE, has_entries, narrow_repeats

RANK = 76
SLOPES = {aten.tanh_backward.default, aten.sigmoid_backward.default}
LEAST_ENTRIES = 2**13
"""Of what is multiplied: below, the product of weights costs more than it brings."""


Slopes = dict[tuple[Any, fx.Node], fx.Node]


class Scaled(NamedTuple):
    """Row times slope, entry by entry: a row of a weight, the same for all samples, and one slope for each sample."""

    row: fx.Node
    slope: fx.Node


def row_scalings(graph: fx.Graph) -> None:
    """Compute slope @ (c[:, None] * W) for (c * slope) @ W, and one product for several such c with one slope.

    So the Jacobian of two layers is a single product of the slopes with what the weights make of each other. Slopes of
    activations alone: factors of any size might be what keeps a product of weights within the range of its type.
    """
    slopes: Slopes = {}

    def rule(editor: Editor, node: fx.Node) -> fx.Node | None:
        if node.target is aten.mm.default:
            return _scale_rows(editor, node, slopes)
        if node.target is aten.stack.default:
            return _merge_products(editor, node)
        return _compute_blocks(editor, node, slopes)

    Editor(graph).sweep(rule, {aten.mm.default, aten.stack.default, aten.permute.default})


def _scale_rows(editor: Editor, node: fx.Node, slopes: Slopes) -> fx.Node | None:
    """Scale the rows of the second factor in the place of the columns of the first."""
    scaled = _find_scaled(editor, node, node.args[0], slopes)
    if scaled is None or scaled.row.meta["value"].dim() != 1:
        return None
    column = editor.make(node, aten.unsqueeze.default, scaled.row, 1)
    weights = column and editor.make(node, aten.mul.Tensor, column, node.args[1])
    return weights and editor.make(node, aten.mm.default, scaled.slope, weights)


def _merge_products(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Multiply by all matrices at a time what is multiplied by each of them, and laid side by side."""
    parts: Any = node.args[0]
    right = node.meta["value"]
    if len(parts) < 2 or node.args[1:] != (1,) or not all(editor.is_read_once(p, aten.mm.default) for p in parts):
        return None
    first = parts[0].args[0]
    if any(part.args[0] is not first for part in parts):
        return None
    whole = editor.make(node, aten.cat.default, [part.args[1] for part in parts], 1)
    product = whole and editor.make(node, aten.mm.default, first, whole)
    return product and editor.reshape(node, product, list(right.shape))


def _compute_blocks(editor: Editor, node: fx.Node, slopes: Slopes) -> fx.Node | None:
    """Return samples' blocks (B, m, n), permuted from those of rows (m, B, n), by one product for all rows."""
    if node.args[1] != [1, 0, 2]:
        return None
    stack: Any = node.args[0]
    product: Any = stack.args[0] if _is_view(editor, stack) else None
    if not editor.is_read_once(product, aten.mm.default):
        return None
    rows: Any = product.args[0]
    batch, count, size = node.meta["value"].shape
    if not _is_view(editor, rows) or rows.args[0].meta["value"].dim() != 3:
        return None
    scaled = _find_scaled(editor, node, rows.args[0], slopes)
    if scaled is None or rows.args[0].meta["value"].shape[:2] != (count, batch):
        return None
    row, factor = scaled.row.meta["value"], product.args[1]
    if row.shape != (count, 1, row.size(-1)):
        return None
    columns = editor.make(node, aten.permute.default, scaled.row, [2, 0, 1])
    factor_columns = editor.make(node, aten.unsqueeze.default, factor, 1)
    weights = columns and factor_columns and editor.make(node, aten.mul.Tensor, columns, factor_columns)
    whole = weights and editor.make(node, aten.reshape.default, weights, [row.size(-1), count * size])
    made = whole and editor.make(node, aten.mm.default, scaled.slope, whole)
    return made and editor.reshape(node, made, [batch, count, size])


def _is_view(editor: Editor, node: Any) -> bool:
    return has_entries(node) and node.target in (aten.view.default, aten._unsafe_view.default) and editor.free(node)


def _find_scaled(editor: Editor, at: fx.Node, node: Any, slopes: Slopes) -> Scaled | None:
    """Return what a factor (…, B, h) of a product is made of, where it is a row for all times each sample's slope."""
    if not has_entries(node) or not editor.free(node) or node.target not in {aten.mul.Tensor, *SLOPES}:
        return None
    value = node.meta["value"]
    if value.numel() < LEAST_ENTRIES or 2 * at.meta["value"].size(-1) > value.size(-2) or value.dtype not in PRECISE:
        return None
    pairs = [node.args] if node.target in SLOPES else [node.args, node.args[::-1]]
    for row, own in pairs:
        if not (has_entries(row) and has_entries(own) and own.meta["value"].shape == value.shape[-2:]):
            continue
        if node.target is aten.mul.Tensor and own.target not in {*SLOPES, *activation_slopes.SLOPES}:
            continue
        if not row.meta["value"].dtype == own.meta["value"].dtype == value.dtype:
            continue
        lean = narrow_repeats(row.meta["value"])
        if lean.dim() == 2 and lean.size(0) == 1:
            lean = lean[0]
        if lean.numel() * value.size(-2) != value.numel() or lean.size(-1) != value.size(-1):
            continue
        made = row if lean.shape == row.meta["value"].shape else editor.narrow(at, row, lean)
        if made is not None:
            return Scaled(made, own if node.target is aten.mul.Tensor else _slope(editor, node, own, slopes))
    return None


def _slope(editor: Editor, node: fx.Node, own: fx.Node, slopes: Slopes) -> fx.Node:
    """Return the slope of an activation, the same node for all that ask for it."""
    if (node.target, own) not in slopes:
        value = own.meta["value"]
        one = editor.constant(torch.ones((), dtype=value.dtype, device=value.device).expand(value.shape))
        made = editor.make(node, node.target, one, own)
        assert made is not None
        slopes[node.target, own] = made
    return slopes[node.target, own]
