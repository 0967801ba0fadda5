"""Seeds times a vector: a diagonal, written where it belongs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from autojac.replay.passes.editor import MOST_ENTRIES, Editor, aten
from autojac.replay.passes.node_facts import has_entries, narrow_repeats

RANK = (35, 62)


def diag_embed(graph: fx.Graph) -> None:
    """Put a diagonal matrix in the place of identity * v: where each output depends on one input alone.

    On CPUs, which write zeros faster than they multiply by them. Where v is not finite, identity * v is NaN off the
    diagonal, and the derivative, which this is, is zero there.
    """
    Editor(graph).sweep(_embed, {aten.mul.Tensor, aten.permute.default})


def _embed(editor: Editor, node: fx.Node) -> fx.Node | None:
    if node.target is aten.permute.default:
        return _transpose(node)
    if node.meta["value"].device.type != "cpu":
        return None
    for seed, vector in (node.args, node.args[::-1]):
        if not (has_entries(seed) and has_entries(vector)):
            return None
        if seed.meta["role"] == "constant" and vector.meta["value"].dtype == node.meta["value"].dtype:
            pair = _identity(seed.meta["value"], vector.meta["value"], node.meta["value"])
            if pair is not None:
                return _diagonal(editor, node, vector, *pair)
    return None


def _transpose(node: fx.Node) -> fx.Node | None:
    """Transpose a diagonal matrix, which is its own transpose."""
    made: Any = node.args[0]
    axes: Any = node.args[1]
    many = len(axes)
    turned = many > 1 and [axis % many for axis in axes] == [*range(many - 2), many - 1, many - 2]
    return made if turned and made.target is aten.diag_embed.default and len(made.args) == 1 else None


def _diagonal(editor: Editor, node: fx.Node, vector: fx.Node, row: int, column: int) -> fx.Node | None:
    shape = list(node.meta["value"].shape)
    lean = [1] * (len(shape) - vector.meta["value"].dim()) + list(vector.meta["value"].shape)
    # axes with several entries, but for the one that the vector does not have
    rest = [axis for axis, size in enumerate(shape) if axis != row and size > 1]
    one = editor.reshape(node, vector, [lean[axis] for axis in rest])
    if one is not None and [lean[axis] for axis in rest] != [shape[axis] for axis in rest]:
        one = editor.make(node, aten.expand.default, one, [shape[axis] for axis in rest])
    order = [axis for axis in rest if axis != column] + [column]
    if one is not None and order != rest:
        one = editor.make(node, aten.permute.default, one, [rest.index(axis) for axis in order])
    made = one and editor.make(node, aten.diag_embed.default, one)
    order.insert(-1, row)
    if made is not None and order != sorted(order):
        made = editor.make(node, aten.permute.default, made, [order.index(axis) for axis in sorted(order)])
    return made and editor.reshape(node, made, shape)


def _identity(seed: Tensor, vector: Tensor, whole: Tensor) -> tuple[int, int] | None:
    """Return the two axes that a seed is the identity of; the vector has no entries of its own along the first."""
    wide = seed.expand(whole.shape)
    lean = narrow_repeats(wide)
    if not 0 < lean.numel() <= MOST_ENTRIES:
        return None
    before = whole.dim() - vector.dim()
    axes = [axis for axis, size in enumerate(lean.shape) if size > 1]
    for row in axes:
        if row >= before and vector.size(row - before) > 1:
            continue
        for column in axes:
            if column == row or lean.size(column) != lean.size(row) or column < before:
                continue
            ones = lean.diagonal(0, row, column)
            if bool((ones == 1).all()) and int(lean.count_nonzero()) == ones.numel():
                return row, column
    return None
